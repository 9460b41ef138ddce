"""Swap the layers of a model for sparse ones where that is correct and faster."""

from sparsekit.convert.api import convert
from sparsekit.convert.report import ConvertReport, ConvertRow

__all__ = ["ConvertReport", "ConvertRow", "convert"]
