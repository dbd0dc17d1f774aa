"""What one forward pass of a network costs: its multiply-adds, and which weights it multiplies with."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_drive.core import shards
from lightning_drive.core.messages import listed, shown_error
from lightning_drive.network import forward_passes
from lightning_drive.network.flop_formulas import FORMULAS
from lightning_drive.network.forward_passes import ForwardPass
from lightning_drive.network.parameter_tracker import ParameterTracker
from lightning_drive.network.without_dropout import in_mode


@dataclass(frozen=True)
class Costs:
    """What a network costs while its weights are dense, and which of them it multiplies with."""

    itemsizes: Mapping[str, int]
    """Parameter name to the bytes of one of its weights."""
    multiply_adds: Mapping[str, int | None]
    """Parameter name to the multiply-adds that its weights do for one sample; ``None`` where that is not known."""
    others: int | None
    """The multiply-adds in which no such parameter takes part; ``None`` if they are not known."""
    error: str | None = None
    """Why nothing could be counted; ``None`` if something was, or if the input is not known."""
    warnings: tuple[str, ...] = ()
    """What could not be counted, each with the names of what it is about."""
    in_products: tuple[str, ...] = ()
    """All parameters, prunable or not, that are multiplied with as matrices or kernels, as they are or as what is
    computed from them."""
    dense_again: tuple[str, ...] = ()
    """Masked parameters from which the network computes weights that are not 0 where the masks prune."""


def measure(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], given: Any, masks: Mapping[str, Tensor] | None = None
) -> Costs:
    """Measure one forward pass of a replica, in which the pass leaves traces.

    Multiply-adds are counted by torch's flop counter, for which one of them is two operations. It counts products of
    matrices, convolutions and attention, but not, for example, norms and activations. What an operation costs belongs
    to the parameter that it is given, in whatever layer or function that happens.

    ``parameters`` are the prunable ones; they are not counted if one is sharded over ranks. ``given`` is what the
    module takes, or a :class:`~lightning_drive.network.forward_passes.ForwardPass` of it; ``None`` if it is not known.
    Weights follow ``masks`` already.
    """
    itemsizes = {name: parameter.dtype.itemsize for name, parameter in parameters.items()}
    unknown: dict[str, int | None] = dict.fromkeys(parameters)
    if given is None or any(map(shards.is_sharded, parameters.values())):
        return Costs(itemsizes, unknown, None)
    measured = ForwardPass.of(given)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    try:
        tracker = ParameterTracker(counter, dict(module.named_parameters()), dict(module.named_buffers()), masks or {})
        with (
            in_mode(module, "eval"),
            sdpa_kernel(SDPBackend.MATH),  # the counter has formulas for its parts, but not for all that is fused
            counter,
            tracker,
        ):
            measured.run(module, forward_passes.as_input_of(module))
    except Exception as error:  # from the module's own `forward`, which may not be made for this call
        return Costs(itemsizes, unknown, None, shown_error(error))
    operations = 2 * (measured.num_samples or 1)  # of a multiply-add in each sample
    flops, uncounted = tracker.flops, tracker.uncounted
    others = (counter.get_total_flops() - sum(flops[name] for name in parameters)) // operations
    return Costs(
        itemsizes,
        {name: None if name in uncounted else flops[name] // operations for name in parameters},
        None if uncounted or tracker.uncounted_calls else others,
        warnings=tuple(_remarks(parameters, tracker, measured.num_samples)),
        in_products=tuple(tracker.in_products),
        dense_again=tuple(tracker.dense_again),
    )


def _remarks(parameters: Iterable[str], tracker: ParameterTracker, num_samples: int | None) -> Iterator[str]:
    unused = [name for name in parameters if name not in tracker.used]
    if unused:
        yield f"`forward` did not use {listed(map(repr, unused))} in eval mode, so it counts as no multiply-adds."
    if tracker.uncounted:
        yield (
            f"The multiply-adds of {listed(map(repr, tracker.uncounted))} are not known: torch's flop counter has no"
            " formula for the operation that `forward` uses it in."
        )
    if tracker.uncounted_calls:
        calls = listed(f"`{name}`" for name in tracker.uncounted_calls)
        yield (
            f"The multiply-adds of {calls} are not known, so those of the whole network are not, either: torch's"
            " flop counter has no formula for what `forward` calls."
        )
    if num_samples is None:
        yield "Multiply-adds are those of a whole batch, since it is not known how many samples it has."
