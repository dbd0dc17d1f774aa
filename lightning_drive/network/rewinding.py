"""A rewind point: weights, optimizers and schedulers at one moment of training, and the return to them under a mask."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_drive.core import saved_values, zeroing
from lightning_drive.core.messages import listed


@dataclass(frozen=True)
class RewindPoint:
    """A module with its optimizers and learning-rate schedulers at one moment of training, on the CPU.

    Args:
        weights: Values of all parameters and buffers by name, those of non-persistent buffers, too, which
            ``state_dict()`` of a module leaves out. A tied parameter is held once; ``None`` stands for a buffer that is
            registered but not set.
        optimizers: ``state_dict()`` of every optimizer.
        schedulers: ``state_dict()`` of every scheduler.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> start = RewindPoint.take(layer, [], [])
        >>> _ = layer.weight.data.fill_(5.0)
        >>> start.rewind_module_(layer, {"weight": torch.tensor([[True, False]])})
        >>> bool(layer.weight[0, 0] == start.weights["weight"][0, 0]), layer.weight[0, 1].item()
        (True, 0.0)

    """

    weights: Mapping[str, Tensor | None]
    optimizers: Sequence[Mapping[str, Any]]
    schedulers: Sequence[Mapping[str, Any]]

    @classmethod
    def take(cls, module: nn.Module, optimizers: Iterable[Optimizer], schedulers: Iterable[Any]) -> "RewindPoint":
        """Copy all states as they are now, into memory that nothing else writes to."""
        buffers = {name: owner[key] for name, owner, key in _buffers_of(module)}
        tensors = {**dict(module.named_parameters()), **buffers}
        return cls(
            {name: None if value is None else _on_cpu(value) for name, value in tensors.items()},
            [_copied(optimizer.state_dict()) for optimizer in optimizers],
            [_copied(scheduler.state_dict()) for scheduler in schedulers],
        )

    def redrawn(self, names: Iterable[str], generator: torch.Generator) -> "RewindPoint":
        """Return a rewind point in which the named parameters hold their initial values in a random order.

        Where the values of a layer were drawn independently of each other, as common initialisations do, a random
        order of them is a new draw from the same distribution, whichever that was.
        """
        redrawn = dict(self.weights)
        for name in names:
            value = redrawn[name]
            assert value is not None  # a parameter
            redrawn[name] = value.flatten()[_permutation(value, generator)].view_as(value)
        return replace(self, weights=redrawn)

    def rewind_module_(self, module: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        """Return to the remembered values, in place; what the masks prune becomes exactly 0.

        Masks are boolean, ``True`` keeps; parameters without one return as a whole. A buffer that has another shape by
        now is replaced, one that did not exist yet is removed again. Raise a ``ValueError`` before anything is written
        if a parameter is missing, new, or in another shape (named).
        """
        parameters = dict(module.named_parameters())
        self._check(parameters, {name for name, _, _ in _buffers_of(module)})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.weights[name])  # type: ignore[arg-type]
                if masks and name in masks:
                    zeroing.zero_({name: parameter}, masks)
            for name, owner, key in list(_buffers_of(module)):
                now, then = owner[key], self.weights.get(name)
                if name not in self.weights:
                    del owner[key]
                elif now is not None and then is not None and now.shape == then.shape:
                    now.copy_(then)
                else:
                    device = next(iter(parameters.values())).device if now is None else now.device
                    owner[key] = None if then is None else then.to(device, copy=True)

    def rewind_optimizers_(self, optimizers: Sequence[Optimizer], *, learning_rates: bool) -> None:
        """Return the state of the optimizers, such as momenta; with ``learning_rates`` also all settings of the groups.

        Raise a ``ValueError`` if optimizers or parameter groups were added or removed since.
        """
        states = [optimizer.state_dict() for optimizer in optimizers]
        now, then = ([len(state.get("param_groups", ())) for state in states] for states in (states, self.optimizers))
        if now != then:
            raise ValueError(
                f"The optimizers had {then} parameter groups at the rewind point, but have {now} now, so they cannot"
                " return. Something added or removed groups during training, such as a finetuning callback."
            )
        for optimizer, state, current in zip(optimizers, self.optimizers, states, strict=True):
            kept = {} if learning_rates else {"param_groups": current["param_groups"]}
            optimizer.load_state_dict(_copied({**state, **kept}))

    def rewind_schedulers_(self, schedulers: Sequence[Any]) -> None:
        """Return the state of the learning-rate schedulers; after the optimizers, whose learning rates they read."""
        for scheduler, state in zip(schedulers, self.schedulers, strict=True):
            scheduler.load_state_dict(_copied(state))

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors for a checkpoint."""
        return {**self._states(), "digest": self._digest}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> "RewindPoint":
        """Read what :meth:`state_dict` returned; raise a ``ValueError`` if it is of another form, or damaged."""
        saved_values.check(dict[str, object], state_dict, "the rewind point")
        weights, optimizers, schedulers = (state_dict.get(name) for name in ("snapshot", "optimizers", "schedulers"))
        for state in saved_values.check(list[dict[Any, Any]], optimizers, "the list of optimizers in the rewind point"):
            saved_values.check(
                list[dict[Any, Any]], state.get("param_groups", []), "the list of parameter groups in the rewind point"
            )
        saved_values.check(list[dict[Any, Any]], schedulers, "the list of schedulers in the rewind point")
        weights = saved_values.check(dict[str, Tensor | None], weights, "the remembered weights")
        point = cls(weights, optimizers, schedulers)  # type: ignore[arg-type]
        if state_dict.get("digest", point._digest) != point._digest:  # a former version has none
            raise ValueError(
                f"The rewind point is not what was saved: its digest is another one. {saved_values.REMEDY}"
            )
        return point

    def _states(self) -> dict[str, Any]:
        return {
            "snapshot": dict(self.weights),
            "optimizers": list(self.optimizers),
            "schedulers": list(self.schedulers),
        }

    @cached_property
    def _digest(self) -> str:
        return saved_values.digest([*self._states().values()])

    def _check(self, parameters: Mapping[str, Tensor], buffers: set[str]) -> None:
        missing = [name for name in self.weights if name not in parameters and name not in buffers]
        new = [name for name in parameters if name not in self.weights]
        if missing or new:
            different = listed(sorted(missing + new))
            raise ValueError(f"The rewind point is of another module: {different} is in only one of the two.")
        for name, parameter in parameters.items():
            then = self.weights[name]
            if then is None or parameter.shape != then.shape:
                raise ValueError(
                    f"The rewind point holds {name!r} in shape {then if then is None else tuple(then.shape)}, but the"
                    f" module has it in shape {tuple(parameter.shape)}."
                )


def _buffers_of(module: nn.Module) -> Iterator[tuple[str, dict[str, Tensor | None], str]]:
    """Yield every buffer's full name, the dictionary that holds it, and its key there."""
    for path, submodule in module.named_modules():
        for key in submodule._buffers.keys():  # noqa: SIM118 - those of TorchScript are no dictionary
            yield (f"{path}.{key}" if path else key), submodule._buffers, key


def _on_cpu(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _copied(state: Any) -> Any:
    """Copy nested dictionaries and lists, tensors to the CPU."""
    return tree_map(_copied_leaf, state)


def _copied_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return _on_cpu(leaf)
    optimizer = getattr(leaf, "optimizer", None)  # of a scheduler inside another one's state: it stays the same
    return copy.deepcopy(leaf, None if optimizer is None else {id(optimizer): optimizer})


def _permutation(value: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randperm(value.numel(), generator=generator, device=generator.device).to(value.device)
