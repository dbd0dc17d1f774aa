"""Reports made by hand: a small one, one with all fields, and one with strange names."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_drive import Masks, PruningReport
from lightning_drive.core.rounds import Round, ScoreHistogram
from lightning_drive.report.acceleration_report import AccelerationReport, LayerForm
from lightning_drive.report.parts import CutReport, CycleReport, LayerReport

CONV = torch.zeros(8, 4, 3, 3, dtype=torch.bool)
CONV[0] = True
FC = torch.zeros(10, 130, dtype=torch.bool)
MASKS = Masks({"conv.weight": CONV, "fc.weight": FC})
ACTIVE = Masks({"conv.weight": CONV & (torch.arange(3) < 2), "fc.weight": FC})
HISTOGRAM = ScoreHistogram(-4.0, -1.0, (0,) * 30 + (1, 5) * 15, (0, 3) * 15 + (0,) * 30, kept_below=0, pruned_below=2)

ACCELERATION = AccelerationReport(
    "training step",
    (
        LayerForm("conv.weight", 0.875, "windows", dense_seconds=0.5, sparse_seconds=0.25),
        LayerForm("fc.weight", 1.0, reason="no linear layer or convolution of torch computes with it"),
    ),
    threads=2,
    dense_seconds=0.75,
    seconds=0.5,
)


def small_report(active: Masks | None = ACTIVE, warnings: Sequence[str] = ()) -> PruningReport:
    return PruningReport.of(
        MASKS, active, method="DRIVE(rounds=100)", seconds=12.34, epoch=5, step=1955, warnings=warnings
    )


def full_report(**others: Any) -> PruningReport:
    """With all there can be in one: costs, phases, rounds, scores, cycles and cuts."""
    return replace(
        small_report(warnings=["Layer collapse: no weight is left in 'fc.weight'."]),
        layers=(
            LayerReport("conv.weight", (8, 4, 3, 3), 288, 36, 24, itemsize=4, multiply_adds=288 * 64),
            LayerReport("fc.weight", (10, 130), 1300, 0, 0, itemsize=2, multiply_adds=1300),
        ),
        phases={"warmup": 83.14, "rounds": 12.0, "batch_norm": 0.34},
        rounds=(Round(1, 1e-3, (100, 700)), Round(2, 2e-3, (152, 600))),
        scores=HISTOGRAM,
        cycles=(
            CycleReport(1, 788, {"training": 2.5}, {"val_loss": 0.5, "val_accuracy": 0.9}),
            CycleReport(2, 36, {"training": 2.5}, {"val_loss": 0.75}),
        ),
        other_multiply_adds=2_000,
        acceleration=ACCELERATION,
        cuts=(
            CutReport(1, 1.5, 30, 788, {}),
            CutReport(2, 2.0, 40, 36, {"val_loss": 0.5, "val_accuracy": 0.9}),
        ),
        **others,
    )


STRANGE = 'blocks[red]|<b>&"quoted".weight'


def strange_report() -> PruningReport:
    """Names and warnings that mean something to Markdown, HTML and rich."""
    layers = (replace(full_report().layers[0], name=STRANGE), full_report().layers[1])
    return replace(full_report(), layers=layers, warnings=("[bold]<script>alert(1)</script>\nnext line",))
