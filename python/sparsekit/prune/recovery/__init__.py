"""Winning accuracy back: distillation, one block at a time, and statistics of batch norm."""
