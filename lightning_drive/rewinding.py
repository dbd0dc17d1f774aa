"""Remember a module as it is at some step, and return to it under a mask."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """All parameters and buffers of a module at one moment, non-persistent buffers too, on the CPU.

    ``state_dict()`` of a module would leave non-persistent buffers out. A tied parameter is held once.

    Args:
        tensors: Parameter or buffer name to a value that nothing else writes to; see :meth:`take`.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> start = Snapshot.take(layer)
        >>> _ = layer.weight.data.fill_(5.0)
        >>> start.rewind_(layer, {"weight": torch.tensor([[True, False]])})
        >>> bool(layer.weight[0, 0] == start.tensors["weight"][0, 0]), layer.weight[0, 1].item()
        (True, 0.0)

    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @classmethod
    def take(cls, module: nn.Module) -> "Snapshot":
        """Copy the module's parameters and buffers as they are now.

        Args:
            module: The module to remember.

        """
        return cls({name: value.detach().to("cpu", copy=True) for name, value in _tensors_of(module).items()})

    def rewind_(self, module: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        """Return to the remembered values, in place; what the masks prune becomes exactly 0.

        Args:
            module: The module, with the same parameters and buffers as then.
            masks: Parameter name to boolean mask, ``True`` keeps; parameters without one return as a whole.

        Raises:
            ValueError: If a name or shape is not the remembered one (named).

        """
        tensors = _tensors_of(module)
        if tensors.keys() != self.tensors.keys():
            different = ", ".join(sorted(tensors.keys() ^ self.tensors.keys()))
            raise ValueError(f"The snapshot is of another module: {different} is in only one of the two.")
        for name, value in tensors.items():
            if value.shape != self.tensors[name].shape:
                raise ValueError(
                    f"The snapshot holds {name!r} in shape {tuple(self.tensors[name].shape)}, but the module has it in"
                    f" shape {tuple(value.shape)}."
                )
        with torch.no_grad():
            for name, value in tensors.items():
                value.copy_(self.tensors[name])
                if masks and name in masks:
                    value.masked_fill_(~masks[name].to(value.device), 0)

    def state_dict(self) -> dict[str, Any]:
        """Give plain types and tensors for a checkpoint."""
        return dict(self.tensors)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> "Snapshot":
        """Read what :meth:`state_dict` gave.

        Args:
            state_dict: The remembered values.

        """
        return cls(state_dict)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
