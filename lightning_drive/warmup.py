"""The callback for a method of your own: see "Adding a method" in the documentation."""

from lightning_drive.callbacks.warmup_base import WarmupPruningCallback

__all__ = ["WarmupPruningCallback"]
