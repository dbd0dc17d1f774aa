"""What the processes of a training run do together; in a run of one process all of it does nothing.

Every method here is to be called by all ranks, in the same order. No Lightning: ``torch.distributed`` alone.
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
    """Some processes, one of which is this one.

    Args:
        size: How many they are.
        index: Which of them this one is, from 0.
        group: Their process group; ``None``: all processes there are.
        device: Where tensors have to be for the group's backend.

    Example:
        >>> ALONE.size, ALONE.sum(torch.tensor([1, 2])), ALONE.broadcast("text")
        (1, tensor([1, 2]), 'text')

    """

    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, device: torch.device) -> "Ranks":
        """Take the processes of a group.

        Args:
            group: A process group; ``None``: all processes.
            device: Where tensors have to be for the group's backend.

        """
        return cls(dist.get_world_size(group), dist.get_rank(group), group, device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks.

        Args:
            tensor: Of the same shape and type on every rank; left as it is.

        Returns:
            The sum, on the tensor's device.

        """
        if self.size == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Average tensors over all ranks, in place and to the same bits everywhere.

        Args:
            tensors: On the group's device, of the same shapes and types on every rank.

        """
        if self.size == 1:
            return
        tensors = list(tensors)
        transfers = [dist.all_reduce(tensor, group=self.group, async_op=True) for tensor in tensors]
        for tensor, transfer in zip(tensors, transfers, strict=True):
            transfer.wait()
            tensor.div_(self.size)

    def gather(self, tensor: Tensor) -> Tensor:
        """Stack the tensors of all ranks.

        Args:
            tensor: Of the same shape and type on every rank.

        Returns:
            Shape ``(size, *tensor.shape)``, on the tensor's device.

        """
        if self.size == 1:
            return tensor.unsqueeze(0)
        sent = tensor.detach().to(self.device).contiguous()
        gathered = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(gathered, sent, group=self.group)
        return torch.stack(gathered).to(tensor.device)

    def broadcast(self, value: T) -> T:
        """Give every rank what the first one has.

        Args:
            value: Anything that can be pickled.

        Returns:
            The first rank's value.

        """
        if self.size == 1:
            return value
        values = [value]
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(values, first, group=self.group, device=self.device)
        return values[0]

    @contextmanager
    def together(self) -> Generator[None]:
        """Let an error of one rank be an error of all, instead of having the others wait for it without end.

        Inside, ranks work for themselves. The rank whose work failed raises its own error.

        Raises:
            RuntimeError: If the work failed on another rank.

        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            failed = self.gather(torch.tensor(error is not None)).tolist()
            if error is None and any(failed):
                raise RuntimeError(
                    f"Pruning failed on rank {failed.index(True)} of {self.size}, whose own error says why. No rank has"
                    " pruned anything."
                )


ALONE = Ranks()
"""This process by itself."""
