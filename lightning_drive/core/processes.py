"""Collectives over the processes of a run (sums, means, broadcasts, shared errors); no-ops for one process.

All ranks call every method, in the same order. No Lightning: ``torch.distributed`` alone.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """A group of processes that this one belongs to.

    Args:
        size: The number of processes.
        index: The place of this process among them, from 0.
        group: Their process group; ``None``: all processes.
        device: The device that the group's backend needs tensors on.

    Examples:
        >>> ALONE.size, ALONE.sum(torch.tensor([1, 2])), ALONE.broadcast("text")
        (1, tensor([1, 2]), 'text')

    """

    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, device: torch.device) -> "Ranks":
        """Return the processes of a group (``None``: all), whose backend needs tensors on ``device``."""
        return cls(dist.get_world_size(group), dist.get_rank(group), group, device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor, of one shape and type, over all ranks, on the tensor's device."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Average tensors on the group's device over all ranks, in place and to the same bits everywhere."""
        if self.size == 1:
            return
        tensors = list(tensors)
        transfers = [dist.all_reduce(tensor, group=self.group, async_op=True) for tensor in tensors]
        for tensor, transfer in zip(tensors, transfers, strict=True):
            transfer.wait()
            tensor.div_(self.size)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, of one shape and type, stacked to ``(size, *tensor.shape)``."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        sent = tensor.detach().to(self.device).contiguous()
        gathered = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(gathered, sent, group=self.group)
        return torch.stack(gathered).to(tensor.device)

    def broadcast(self, value: T) -> T:
        """Return the first rank's value, which can be pickled, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(values, first, group=self.group, device=self.device)
        return values[0]

    @contextmanager
    def together(self) -> Generator[None]:
        """Make an error of one rank an error of all, since the others would wait for it forever.

        The rank whose work failed raises its own error, and the others a ``RuntimeError``. Inside, every rank works by
        itself, but for other blocks of this kind: where one rank leaves the outer block with an error, the others hear
        of it at the end of their next inner one. What else they exchange must come right after such an end.
        """
        try:
            yield
        except BaseException as error:
            if not vars(error).get(_ALL_KNOW):
                vars(error)[_ALL_KNOW] = True
                self.gather(torch.tensor(True))
            raise
        failed = self.gather(torch.tensor(False)).tolist()
        if any(failed):
            known = RuntimeError(
                f"Pruning failed on rank {failed.index(True)} of {self.size}, whose own error has the reason. No"
                " rank has pruned anything."
            )
            vars(known)[_ALL_KNOW] = True
            raise known


_ALL_KNOW = "_all_ranks_know"
"""The attribute of an error that all ranks have heard of."""

ALONE = Ranks()
"""This process by itself."""
