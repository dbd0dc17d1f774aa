"""Keep masks: counts and fractions, packed storage, and zeros in the parameters that they prune.

Nothing is reparametrised: a pruned weight is a zero in the dense tensor, so names, order and ``state_dict`` keys stay
those of the dense module. Zeros are filled in, never multiplied in: a product would keep NaN and make -0.0.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core import counting, saved_values, shards, tensor_kinds, zeroing
from lightning_drive.core.bits import pack, unpacked
from lightning_drive.core.messages import listed, shown
from lightning_drive.network import prunable

_VERSION = 1


class Masks(Mapping[str, Tensor]):
    """Which weights are kept: parameter name to a boolean tensor, ``True`` keeps.

    Names are those of ``module.named_parameters()``. Without any masks nothing is pruned: sparsity 0, density 1.

    Args:
        masks: Parameter name to boolean mask.

    Raises:
        TypeError: If a value is not a boolean tensor (named).

    Examples:
        >>> masks = Masks({"weight": torch.tensor([[True, False], [False, False]])})
        >>> masks.sparsity, masks.num_kept, masks.num_prunable
        (0.75, 1, 4)
        >>> Masks.from_state_dict(masks.state_dict()) == masks
        True

    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._masks = dict(masks or {})
        for name, mask in self._masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"The mask of {name!r} must be a boolean tensor (`True` keeps), got {kind}.")

    @staticmethod
    def of(module: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None) -> "Masks":
        """Read the masks of a network that is sparse already off its zeros.

        Only prunable weights are read, so what is 0 for another reason, such as a new position embedding or the row of
        a ``padding_idx``, gets no mask. Frozen weights get none, either: unfreeze them first.

        Args:
            module: The network, with plain weights.
            include: Glob patterns over parameter names, see
                :func:`lightning_drive.network.prunable.prunable_parameters`; default: the weights of all layers that
                multiply by them.
            exclude: Glob patterns over parameter names that get no mask, such as a new layer that starts at zero.

        Returns:
            The masks, on the devices of the weights; ``True`` wherever a weight is not 0.

        Raises:
            TypeError: If ``include`` or ``exclude`` is no list of strings, or the numbers of a weight cannot be read
                (named).
            ValueError: If a pattern matches nothing, there is nothing prunable, or a weight is computed from others,
                such as a value and a mask of ``torch.nn.utils.prune`` (named, with the call that makes it plain).

        Examples:
            >>> layer = nn.Linear(2, 2)
            >>> layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
            >>> Masks.of(layer)["weight"]
            tensor([[ True, False],
                    [False,  True]])

        """
        return of_zeros(prunable.prunable_parameters(module, include, exclude))

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(mask, other[name].to(mask.device)) for name, mask in self.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        kept = f"{self.num_kept:,} of {self.num_prunable:,} weights kept"
        return f"Masks({len(self)} parameters, {kept}, sparsity {self.sparsity:.2%})"

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is removed, in ``[0, 1]``; 0 without any masks."""
        return (self.num_prunable - self.num_kept) / self.num_prunable if self.num_prunable else 0.0

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that is kept, in ``[0, 1]``; 1 without any masks."""
        return self.num_kept / self.num_prunable if self.num_prunable else 1.0

    @property
    def num_kept(self) -> int:
        """How many weights are kept."""
        return sum(counting.count_each(self.values()))

    @property
    def num_prunable(self) -> int:
        """How many weights the masks cover, kept or not."""
        return sum(mask.numel() for mask in self.values())

    def to(self, device: torch.device | str) -> "Masks":
        """Return the same masks with all tensors on one device.

        Args:
            device: The device.

        """
        return Masks({name: mask.to(device) for name, mask in self.items()})

    def shuffled(self, generator: torch.Generator, among: Mapping[str, Tensor] | None = None) -> "Masks":
        """Return random masks that keep as many weights of every parameter as these do.

        The control of Frankle et al. (2021, "Pruning Neural Networks at Initialization: Why Are We Missing the
        Mark?"): a method whose masks do no better than their shuffled copies has only found out how many weights each
        layer needs.

        Args:
            generator: A random generator; equal seeds on equal devices give equal masks.
            among: Masks that keep at least as much of every parameter; only what they keep may be kept. Default: all.

        Examples:
            >>> masks = Masks({"weight": torch.tensor([[True, True, False], [False, False, False]])})
            >>> shuffled = masks.shuffled(torch.Generator().manual_seed(0))
            >>> shuffled.num_kept, shuffled == masks
            (2, False)

        """
        masks = {}
        for name, mask in self.items():
            places = slice(None) if among is None else among[name].flatten()
            kept = mask.flatten()
            candidates = kept if among is None else kept[places]
            order = torch.randperm(len(candidates), generator=generator, device=generator.device).to(mask.device)
            shuffled = torch.zeros_like(kept)
            shuffled[places] = candidates[order]
            masks[name] = shuffled.view_as(mask)
        return Masks(masks)

    def apply_(self, module: nn.Module) -> None:
        """Set the pruned weights of a module to exactly 0, in place.

        Args:
            module: Has every masked parameter under its name, in the mask's shape.

        Raises:
            TypeError: If a parameter is quantised, or otherwise of a form that zeros cannot be written into (named).
            ValueError: If a parameter is missing or has another shape (named).

        """
        zeroing.zero_(self.parameters_of(module), self)

    def parameters_of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that the masks are for.

        Args:
            module: Has every masked parameter under its name, in the mask's shape.

        Returns:
            Parameter name to live parameter, in the order of the masks.

        Raises:
            TypeError: If a parameter is a nested tensor (named).
            ValueError: If a parameter is missing or has another shape (named).

        """
        parameters = dict(module.named_parameters())
        for name, mask in self.items():
            if name not in parameters:
                raise ValueError(
                    f"The masks hold {name!r}, but the module has no parameter of that name: they belong to another"
                    f" module. It has: {listed(parameters, most=20)}."
                )
            if parameters[name].is_nested:
                raise tensor_kinds.not_maskable(parameters[name], name)
            if parameters[name].shape != mask.shape:
                raise ValueError(
                    f"The mask of {name!r} has shape {tuple(mask.shape)}, but the parameter has shape"
                    f" {tuple(parameters[name].shape)}: the masks belong to another module."
                )
        return {name: parameters[name] for name in self}

    def hold_for(self, module: nn.Module) -> bool:
        """Whether a module is pruned by these masks: it has the parameters, and 0 wherever the masks prune.

        Weights may be sparse or quantised by now; the numbers that they stand for count.

        Args:
            module: Any module.

        Raises:
            TypeError: If the numbers that a parameter stands for cannot be read (named).

        """
        parameters = dict(module.named_parameters())
        return all(
            name in parameters
            and not parameters[name].is_nested
            and parameters[name].shape == mask.shape
            and not tensor_kinds.numbers(shards.local(parameters[name].detach()), name)[
                zeroing.where_pruned(mask, parameters[name])
            ].any()
            for name, mask in self.items()
        )

    def state_dict(self) -> dict[str, Any]:
        """Pack the masks, one bit per weight, into plain types and tensors on the CPU.

        Returns:
            A dictionary that :meth:`from_state_dict` reads and ``torch.load(weights_only=True)`` accepts.

        """
        packed = {name: {"shape": list(mask.shape), "bits": pack(mask)} for name, mask in self.items()}
        return {"version": _VERSION, "masks": packed}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> "Masks":
        """Unpack masks that :meth:`state_dict` packed.

        Args:
            state_dict: The packed masks.

        Returns:
            The masks, on the CPU.

        Raises:
            ValueError: If it was written by a newer version, is damaged, or the bits do not fit the shape (named).

        """
        version = saved_values.check(dict[str, object], state_dict, "the state of the masks").get("version")
        if type(version) is not int or version != _VERSION:
            raise ValueError(
                f"These masks have version {shown(version)}, but this lightning_drive reads version {_VERSION}."
            )
        masks = saved_values.check(
            dict[str, dict[Any, Any]], state_dict.get("masks"), "the dictionary of the packed masks"
        )
        return cls({name: unpacked(name, packed) for name, packed in masks.items()})

    def digest(self) -> str:
        """Return a digest of the content: equal masks, on any device and in any order, have equal digests.

        Returns:
            A SHA-256 in hexadecimal, over names, shapes and bits.

        """
        digest = hashlib.sha256()
        for name in sorted(self):
            digest.update(f"{name}{tuple(self[name].shape)}".encode())
            digest.update(pack(self[name]).numpy().tobytes())
        return digest.hexdigest()


def of_zeros(weights: Mapping[str, Tensor]) -> Masks:
    """Return the masks that keep what is not 0 in weights by name, which may be split over ranks or quantised.

    Examples:
        >>> of_zeros({"weight": torch.tensor([0.5, 0.0, -0.0])})["weight"]
        tensor([ True, False, False])

    """
    local = {name: shards.local(weight.detach()) for name, weight in weights.items()}
    live = {name: tensor_kinds.numbers(weight, name) != 0 for name, weight in local.items()}
    return Masks({name: shards.joined(mask, of=weights[name]) for name, mask in live.items()})


def collapsed_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors with no survivor: layer collapse (Tanaka et al., 2020, Section 2).

    Without an empty layer a signal may still be cut off: see :func:`lightning_drive.network.synflow.active_masks`.

    Examples:
        >>> collapsed_layers({"a": torch.tensor([True]), "b": torch.tensor([False])})
        ['b']

    """
    return [name for name, mask in masks.items() if not mask.any()]
