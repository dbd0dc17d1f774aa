"""Choose the form of a layer: dense, or one of the sparse forms, whichever is the fastest here."""

from collections.abc import Callable, Mapping

from lightning_drive.acceleration import timing
from lightning_drive.report.acceleration_report import DENSE, LayerForm


def fastest(
    name: str, sparsity: float, dense: Callable[[], object], forms: Mapping[str, Callable[[], object]]
) -> LayerForm:
    """Time the dense form of a layer and its sparse forms, and choose the fastest; without any, it stays dense."""
    if not forms:
        return LayerForm(name, sparsity, reason="no sparse form gives its outputs")
    seconds = timing.least_seconds({DENSE: dense, **forms})
    dense_seconds = seconds.pop(DENSE)
    form = min(seconds, key=lambda form: seconds[form])
    chosen = form if timing.is_faster(seconds[form], dense_seconds) else DENSE
    return LayerForm(name, sparsity, chosen, dense_seconds, seconds[form])
