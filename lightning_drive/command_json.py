"""What ``lightning-drive report --json`` prints; its keys are described in ``docs/reference/command.md``."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_drive.report import parts, zeros
from lightning_drive.report.pruning_report import PruningReport

SCHEMA_VERSION = 1
"""Raised when a key goes or changes its meaning, not when one is added."""


def of_report(callback: str, report: PruningReport) -> str:
    """Return the report of a callback, with its sparsities and totals."""
    totals = {
        "weights": report.num_weights,
        "kept": report.num_kept,
        "active": parts.total(layer.num_active for layer in report.layers),
        "parameters": report.num_parameters,
        "multiply_adds": report.multiply_adds,
        "nonzero_multiply_adds": report.nonzero_multiply_adds,
        "other_multiply_adds": report.other_multiply_adds,
        "dense_bytes": report.dense_bytes,
        "nonzero_bytes": report.nonzero_bytes,
    }
    sparsities = (report.sparsity, report.effective_sparsity, report.overall_sparsity)
    return _text(callback, sparsities, totals, report=report.to_dict(), tensors=None)


def of_zeros(callback: str, counts: Sequence[Mapping[str, Any]]) -> str:
    """Return the zeros in the tensors of a file without a report, which does not say what of them was pruned."""
    return _text(callback, (None, None, None), zeros.totals(counts), report=None, tensors=counts)


def _text(
    callback: str, sparsities: tuple[float | None, float | None, float | None], totals: object, **details: object
) -> str:
    names = ("sparsity", "effective_sparsity", "overall_sparsity")
    values = {
        "schema_version": SCHEMA_VERSION,
        "callback": callback or None,
        **dict(zip(names, sparsities, strict=True)),
        "totals": totals,
        **details,
    }
    return json.dumps(_finite(values), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return a value with ``None`` for each number that JSON cannot write: infinity, and what is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
