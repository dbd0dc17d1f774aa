"""What was or will be done: reports, plans, tables and figures."""

from lightning_drive.report.pruning_report import CycleReport, LayerReport, PruningReport

__all__ = ["CycleReport", "LayerReport", "PruningReport"]
