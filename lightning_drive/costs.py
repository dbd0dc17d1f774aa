"""What the prunable weights of a network cost: bytes of memory, and multiply-adds in one forward pass."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_drive import shards
from lightning_drive.messages import listed
from lightning_drive.undisturbed import undisturbed


@dataclass(frozen=True)
class Costs:
    """The costs of a dense network."""

    itemsizes: Mapping[str, int]
    """Parameter name to the bytes of one of its weights."""
    multiply_adds: Mapping[str, int | None]
    """Parameter name to the multiply-adds that its weights do for one sample; ``None`` where that is not known."""
    others: int | None
    """The multiply-adds in which no such parameter takes part; ``None`` if they are not known."""
    error: str | None = None
    """Why nothing could be counted; ``None`` if it could, or if it was not to be."""
    warnings: tuple[str, ...] = ()
    """What could not be counted, by name."""


def measure(module: nn.Module, parameters: Mapping[str, nn.Parameter], example_input: Tensor | None) -> Costs:
    """Count, with torch's flop counter, the multiply-adds of one forward pass of one sample. The module stays as it is.

    One multiply-add is two of the counter's flops. It counts products of matrices, convolutions and attention, but
    not, for example, norms and activations. What an operation costs belongs to the parameter that it is given, in
    whatever layer or function that happens.

    Args:
        module: The network; its ``forward`` takes one tensor.
        parameters: Parameter name to parameter; those that are sharded over ranks are not counted for.
        example_input: An input of the right shape, batch dimension first, of which the first sample is used.

    """
    itemsizes = {name: parameter.dtype.itemsize for name, parameter in parameters.items()}
    unknown: dict[str, int | None] = dict.fromkeys(parameters)
    if example_input is None or any(map(shards.is_sharded, parameters.values())):
        return Costs(itemsizes, unknown, None)
    try:
        with undisturbed(module, "eval") as (scored, _):
            known_names = dict(scored.named_parameters())
            copies = {name: known_names[name] for name in parameters}
            first = next(iter(copies.values()))
            sample = (example_input[:1] if example_input.ndim else example_input).to(first.device)
            if sample.is_floating_point():
                sample = sample.to(torch.promote_types(sample.dtype, first.dtype))
            with (
                sdpa_kernel(SDPBackend.MATH),  # the counter has formulas for its parts, but not for all that is fused
                FlopCounterMode(display=False) as counter,
                _Takers(counter, copies) as takers,
            ):
                scored(sample)
    except Exception as error:  # the module's own `forward`, called in a way it may not be made for
        return Costs(itemsizes, unknown, None, f"{type(error).__name__}: {error}")
    known = takers.counted | takers.unused.keys()
    found = {name: flops // 2 if name in known else None for name, flops in takers.flops.items()}
    return Costs(
        itemsizes,
        found,
        (counter.get_total_flops() - sum(takers.flops.values())) // 2,
        warnings=tuple(_remarks(takers.unused, [name for name, number in found.items() if number is None])),
    )


def _remarks(unused: Collection[str], uncounted: Collection[str]) -> Iterator[str]:
    if unused:
        yield f"`forward` did not use {listed(map(repr, unused))} in eval mode, so it counts as no multiply-adds."
    if uncounted:
        yield (
            f"The multiply-adds of {listed(map(repr, uncounted))} are not known: torch's flop counter has no formula"
            " for the operation that `forward` uses it in."
        )


class _Takers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the flops of the operations that take a parameter, by parameter, as the counter outside sees them."""

    def __init__(self, counter: FlopCounterMode, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter
        self._places = {name: (each.data_ptr(), each.data_ptr() + each.nbytes) for name, each in parameters.items()}
        self.flops = dict.fromkeys(parameters, 0)
        self.counted: set[str] = set()
        self.unused = dict.fromkeys(parameters)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        flops = self._counter.get_total_flops() - before
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        taken = dict.fromkeys(name for tensor in tensors for name in self._in(tensor))
        for name in taken:
            self.unused.pop(name, None)
        if taken and flops:
            self.counted.update(taken)
            self.flops[max(taken, key=self._size)] += flops  # the weight, where a bias is prunable, too
        return result

    def _size(self, name: str) -> int:
        start, end = self._places[name]
        return end - start

    def _in(self, tensor: Tensor) -> Iterator[str]:
        """Find the parameter that a tensor is, or is a view of, by its place in memory."""
        return (name for name, (start, end) in self._places.items() if start <= tensor.data_ptr() < end)
