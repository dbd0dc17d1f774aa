"""The lines above and below the report's table, each from the numbers that it states."""

from collections.abc import Mapping

from lightning_drive.core.arguments import Control
from lightning_drive.report import labels, tables


def headline(method: str, cycle: int | None, epoch: int, step: int, seconds: float) -> str:
    """Return what pruned the network, when, and how long it took.

    Example:
        >>> headline("IMP()", 2, epoch=8, step=400, seconds=1.25)
        'Pruned by IMP(), cycle 2, in epoch 8, before step 400 (1.2 s)'

    """
    after = "" if cycle is None else f", cycle {cycle},"
    return f"Pruned by {method}{after} in epoch {epoch}, before step {step} ({seconds:.1f} s)"


def changed_afterwards(control: Control) -> str:
    """Return what a control changed after pruning."""
    return f"control: {labels.CONTROLS[control]}"


def sparsities(sparsity: float, effective: float | None) -> str:
    """Return the sparsity of the prunable weights, with and without weights that are cut off."""
    measured = "not measured" if effective is None else f"{effective:.2%}"
    return f"sparsity {sparsity:.2%}, effective sparsity {measured} (active: kept and on a path from input to output)"


def overall_sparsity(overall: float, prunable: int, parameters: int) -> str:
    """Return the sparsity of all weights of the module, and which fraction of them is prunable."""
    return (
        f"overall sparsity {overall:.2%}, of all {parameters:,} weights:"
        f" {prunable / (parameters or 1):.2%} of them are prunable"
    )


def multiply_adds(dense: int, nonzero: int | None, others: int | None) -> str:
    """Return what one sample costs; ``others`` are multiply-adds without prunable weights."""
    without = ""
    if others is None:
        without = "; how many there are without prunable weights is not known"
    elif others:
        without = f", and {tables.count(others)} without prunable weights"
    return (
        f"multiply-adds of one sample (MACs; one is 2 FLOPs): {tables.count(dense)} dense,"
        f" {tables.count(nonzero)} by non-zero weights{without}"
    )


def memory(dense: int, nonzero: int | None) -> str:
    """Return the bytes of the prunable weights, with the zeros and without."""
    return (
        f"prunable weights: {tables.count(dense)}B dense, as in memory;"
        f" {tables.count(nonzero)}B if only the non-zero ones and a mask of 1 bit per weight are stored"
    )


def seconds_by_phase(phases: Mapping[str, float]) -> str:
    """Return the seconds of every phase."""
    return "seconds: " + ", ".join(
        f"{labels.PHASES.get(phase, phase)} {seconds:.1f}" for phase, seconds in phases.items()
    )
