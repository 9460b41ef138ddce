"""Models for other engines."""

from sparsekit.export.quick import register_quick_plugins

__all__ = ["register_quick_plugins"]
