"""Checkpoints larger than memory: `streaming` is `prune_file`."""
