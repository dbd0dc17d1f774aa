"""Reports of what was pruned, and plans of what will be: records, their texts and tables, and pictures."""

from lightning_drive.report.parts import CycleReport, LayerReport
from lightning_drive.report.pruning_report import PruningReport

__all__ = ["CycleReport", "LayerReport", "PruningReport"]
