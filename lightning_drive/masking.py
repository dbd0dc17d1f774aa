"""Keep masks: what they say, how they are stored, and how they are put on live parameters.

Nothing is reparametrised: a pruned weight is a zero in the dense tensor, so names, order and ``state_dict`` keys stay
those of the dense module. Zeros are filled in, never multiplied in: a product would keep NaN and make -0.0.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, Adagrad, Optimizer, Rprop
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_drive import forms, joining, plain, shards
from lightning_drive import sparsity as measures
from lightning_drive.messages import listed

_VERSION = 1

_CHUNK = 1 << 19
"""Numbers masked together where masks are bytes, so that what they are widened to stays in the processor's cache."""

_ELEMENT_WISE = frozenset(
    {
        "acc_delta",
        "exp_avg",
        "exp_avg_slow",
        "exp_avg_sq",
        "exp_avg_var",
        "exp_inf",
        "grad_avg",
        "max_exp_avg_sq",
        "momentum",
        "momentum_buffer",
        "slow",
        "slow_buffer",
        "square_avg",
        "z",  # of schedule-free optimizers, which bring it into the weights outside of steps
    }
)
"""Names under which optimizers keep one number for each weight."""

_OWN_NAMES = {Adagrad: {"sum"}, ASGD: {"ax"}, Rprop: {"prev", "step_size"}}
"""Names that mean it in these optimizers alone: elsewhere ``sum`` may be one of matrices."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number to the integers that have as many."""


class Masks(Mapping[str, Tensor]):
    """Which weights are kept: parameter name to a boolean tensor, ``True`` keeps.

    Names are those of ``module.named_parameters()``. Without any, it says "not pruned": sparsity 0, density 1.

    Args:
        masks: Parameter name to boolean mask.

    Raises:
        TypeError: If a value is not a boolean tensor (named).

    Example:
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
        """Fraction of the prunable weights that is removed, in ``[0, 1]``."""
        return measures.sparsity(self)

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that is kept, in ``[0, 1]``."""
        return measures.density(self)

    @property
    def num_kept(self) -> int:
        """How many weights are kept."""
        return measures.num_kept(self)

    @property
    def num_prunable(self) -> int:
        """How many weights the masks cover, kept or not."""
        return measures.num_prunable(self)

    def to(self, device: torch.device | str) -> "Masks":
        """Give the same masks with all tensors on one device.

        Args:
            device: Where to.

        """
        return Masks({name: mask.to(device) for name, mask in self.items()})

    def shuffled(self, generator: torch.Generator) -> "Masks":
        """Give random masks that keep as many weights of every parameter as these do.

        The control of Frankle et al. (2021, "Pruning Neural Networks at Initialization: Why Are We Missing the
        Mark?"): a method whose masks do no better than their shuffled copies has only found out how many weights each
        layer needs.

        Args:
            generator: A random generator; equal seeds on equal devices give equal masks.

        Example:
            >>> masks = Masks({"weight": torch.tensor([[True, True, False], [False, False, False]])})
            >>> shuffled = masks.shuffled(torch.Generator().manual_seed(0))
            >>> shuffled.num_kept, shuffled == masks
            (2, False)

        """
        orders = {
            name: torch.randperm(mask.numel(), generator=generator, device=generator.device).to(mask.device)
            for name, mask in self.items()
        }
        return Masks({name: mask.flatten()[orders[name]].view_as(mask) for name, mask in self.items()})

    def apply_(self, module: nn.Module) -> None:
        """Set the pruned weights of a module to exactly 0, in place.

        Args:
            module: Has every masked parameter under its name, in the mask's shape.

        Raises:
            TypeError: If a parameter is quantised, or otherwise of a form that zeros cannot be written into (named).
            ValueError: If a parameter is missing or has another shape (named).

        """
        for name, parameter in self.parameters_of(module).items():
            zero_(parameter, self[name], name)

    def parameters_of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Find the parameters that the masks are for.

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
                raise plain.not_maskable(parameters[name], name)
            if parameters[name].shape != mask.shape:
                raise ValueError(
                    f"The mask of {name!r} has shape {tuple(mask.shape)}, but the parameter has shape"
                    f" {tuple(parameters[name].shape)}: the masks belong to another module."
                )
        return {name: parameters[name] for name in self}

    def hold_for(self, module: nn.Module) -> bool:
        """Whether the module is pruned as the masks say: it has these parameters, and 0 wherever they prune.

        Weights may be sparse or quantised by now; what counts are the numbers that they stand for.

        Args:
            module: Any module.

        Raises:
            TypeError: If it cannot be read what numbers a parameter stands for (named).

        """
        parameters = dict(module.named_parameters())
        return all(
            name in parameters
            and not parameters[name].is_nested
            and parameters[name].shape == mask.shape
            and not plain.numbers(shards.local(parameters[name].detach()), name)[_pruned(mask, parameters[name])].any()
            for name, mask in self.items()
        )

    def state_dict(self) -> dict[str, Any]:
        """Pack the masks, one bit per weight, into plain types and tensors on the CPU.

        Returns:
            What :meth:`from_state_dict` reads and ``torch.load(weights_only=True)`` accepts.

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
        version = forms.check(dict[str, object], state_dict, "the state of the masks").get("version")
        if type(version) is not int or version != _VERSION:
            raise ValueError(
                f"These masks have version {forms.shown(version)}, but this lightning_drive reads version {_VERSION}."
            )
        masks = forms.check(dict[str, dict[Any, Any]], state_dict.get("masks"), "the dictionary of the packed masks")
        return cls({name: _unpacked(name, packed) for name, packed in masks.items()})

    def digest(self) -> str:
        """Name the masks by their content: equal masks, on any device and in any order, have equal digests.

        Returns:
            A SHA-256 in hexadecimal, over names, shapes and bits.

        """
        digest = hashlib.sha256()
        for name in sorted(self):
            digest.update(f"{name}{tuple(self[name].shape)}".encode())
            digest.update(pack(self[name]).numpy().tobytes())
        return digest.hexdigest()


class MaskedParameters:
    """The live parameters of one module under its masks: what a training step needs, looked up once.

    Of parameters that are split over ranks, every rank looks after its own part.

    Args:
        module: Has every masked parameter under its name, in the mask's shape.
        masks: Parameter name to boolean mask, on any device; ``True`` keeps.

    Attributes:
        may_divide_by_zero: Whether an optimizer's ``eps`` may be 0 in the precision of a parameter, and its step 0/0
            for a zero.

    Raises:
        TypeError: If a parameter is not dense, or a subclass that may keep its numbers elsewhere (named).
        ValueError: If a parameter is missing or has another shape (named).

    """

    def __init__(self, module: nn.Module, masks: Masks) -> None:
        parameters = masks.parameters_of(module)
        for name, parameter in parameters.items():
            if not plain.is_plain(shards.local(parameter)):
                raise plain.not_maskable(shards.local(parameter), name)
        self.may_divide_by_zero = any(parameter.dtype == torch.float16 for parameter in parameters.values())
        self._parameters = parameters
        self._covers = {parameter: _Cover(masks[name], parameter) for name, parameter in parameters.items()}

    def replaced_in(self, module: nn.Module) -> list[str]:
        """Name the parameters that the module no longer has, or has another one in place of.

        Args:
            module: The module that these were the parameters of.

        """
        now = dict(module.named_parameters(remove_duplicate=False))
        return [
            name
            for name, parameter in self._parameters.items()
            if now.get(name) is not parameter and type(parameter) is nn.Parameter  # shards come and go
        ]

    @torch.no_grad()
    def zero_weights_(self) -> None:
        """Set the pruned weights to exactly 0."""
        for parameter, cover in self._covers.items():
            cover.zero_(parameter)

    @torch.no_grad()
    def renew_weights_(self) -> dict[str, int]:
        """Set the pruned weights to exactly 0 where they are not, also on another device than before.

        Returns:
            Name of every parameter where some were not, and how many.

        """
        covers = {name: self._covers[parameter].on(parameter.device) for name, parameter in self._parameters.items()}
        counts = {name: cover.count_broken(self._parameters[name]) for name, cover in covers.items()}
        broken = {name: int(count) for name, count in counts.items() if count}
        for name in broken:
            covers[name].zero_(self._parameters[name])
        return broken

    @torch.no_grad()
    def zero_gradients_(self) -> None:
        """Set the gradients of pruned weights to exactly 0, where there are gradients."""
        for parameter, cover in self._covers.items():
            if parameter.grad is not None:
                cover.zero_(parameter.grad)

    def zero_gradients_at_once(self, *, keep_overflow: bool) -> list[RemovableHandle]:
        """Have every backward pass set the gradients of pruned weights to exactly 0 as soon as they are there.

        Args:
            keep_overflow: Whether infinite and NaN gradients stay, by which a ``GradScaler`` sees that it must skip
                the step, as it would in dense training.

        Returns:
            Handles whose ``remove`` ends it.

        """
        return [
            parameter.register_post_accumulate_grad_hook(_GradientHook(cover, keep_overflow))  # type: ignore[no-untyped-call]
            for parameter, cover in self._covers.items()
            if parameter.requires_grad
        ]

    @torch.no_grad()
    def zero_optimizer_state_(self, optimizer: Optimizer) -> None:
        """Make an optimizer forget pruned weights: its momentum would bring them back.

        State that is known to be kept element by element is masked, also in optimizers that this one wraps (SAM,
        Lookahead). Where there is any other beside it (a preconditioner, say), none is. The history of ``LBFGS``,
        which is of all parameters together, is of no use to a network with fewer of them, and begins anew, unless it
        is one of a pruned network already. Doing it twice does no harm.

        Args:
            optimizer: The optimizer.

        """
        for inner in with_wrapped(optimizer):
            if isinstance(inner, LBFGS) and self._is_in_history_of(inner):
                inner.state.clear()
            if not _keeps_tensors_elsewhere(inner):
                for parameter, cover in self._covers.items():
                    for value in _element_wise(inner, parameter):
                        cover.zero_(value)

    def _is_in_history_of(self, optimizer: LBFGS) -> bool:
        """Whether a pruned weight has moved, or had a gradient, in the steps that the optimizer remembers."""
        flat = [
            (self._covers[each].pruned if each in self._covers else torch.zeros_like(each, dtype=torch.bool))
            .reshape(-1)
            .repeat_interleave(1 + each.is_complex())
            for each in optimizer.param_groups[0]["params"]
        ]
        length = sum(map(len, flat))
        history = tree_leaves([dict(state) for state in optimizer.state.values()])
        vectors = [value for value in history if isinstance(value, Tensor) and value.shape == (length,)]
        return any(bool(vector[torch.cat(flat)].any()) for vector in vectors)


class _Cover:
    """What a mask prunes of a parameter, or of this rank's part of it, in the form that is applied the fastest.

    On a CPU ``masked_fill_`` looks at one number after the other. Clearing their bits is the same and several times as
    fast, most of all with masks as wide as the numbers.
    """

    def __init__(self, mask: Tensor, parameter: Tensor) -> None:
        self._bits: Tensor | None = None
        weights = shards.local(parameter.detach())
        if weights.device.type == "cpu" and weights.is_floating_point():
            kept = shards.part(mask, of=parameter)
            self._bits = torch.empty_like(weights, dtype=INTEGERS[weights.itemsize]).copy_(kept).neg_()
        else:
            self._pruned = _pruned(mask, parameter)

    @property
    def pruned(self) -> Tensor:
        """The same as a boolean tensor."""
        return self._pruned if self._bits is None else self._bits == 0

    def on(self, device: torch.device) -> "_Cover":
        """Return the same on a device: when training ends, Lightning moves the module to the CPU."""
        if (self._pruned if self._bits is None else self._bits).device == device:
            return self
        moved = copy(self)
        moved._bits, moved._pruned = None, self.pruned.to(device)
        return moved

    def count_broken(self, tensor: Tensor) -> Tensor:
        """Count the pruned weights that are not 0."""
        tensor = shards.local(tensor.detach())
        if self._bits is not None and _is_like(tensor, self._bits):
            return tensor.view(self._bits.dtype).bitwise_and(~self._bits).view(tensor.dtype).count_nonzero()
        return tensor.masked_fill(~self.pruned, 0).count_nonzero()

    def zero_(self, tensor: Tensor, *, keep_overflow: bool = False) -> None:
        """Fill in zeros, also into a sparse tensor, such as the gradient of an ``nn.Embedding(sparse=True)``."""
        tensor = shards.local(tensor)
        if self._bits is not None and not keep_overflow and _is_like(tensor, self._bits):
            tensor.view(self._bits.dtype).bitwise_and_(self._bits)
            return
        pruned = self.pruned
        if tensor.is_sparse:
            tensor, pruned = tensor._values(), pruned[tuple(tensor._indices())]
        tensor.masked_fill_(pruned & tensor.isfinite() if keep_overflow else pruned, 0)


def _element_wise(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """Return the state tensors of a parameter, if they are known to have one number for each of its weights.

    If there is anything else but single numbers, return none: it may be a preconditioner or a basis, and even moments
    are then often those of rotated weights, whose zeros mean nothing.
    """
    state = optimizer.state.get(parameter)
    if not isinstance(state, Mapping):
        return []
    names = _ELEMENT_WISE.union(*(own for kind, own in _OWN_NAMES.items() if isinstance(optimizer, kind)))
    found = []
    for name, value in state.items():
        if name in names and _is_plain(value) and value.shape == parameter.shape:
            found.append(value)
        elif not (value is None or isinstance(value, (int, float, str)) or _is_single_number(value)):
            return []
    return found


def _keeps_tensors_elsewhere(optimizer: Optimizer) -> bool:
    """Whether an optimizer has tensors that are neither parameters nor the state of one: bases, say, of rotations."""
    own = [value for name, value in vars(optimizer).items() if name != "state"]
    parameters = {id(each) for group in optimizer.param_groups for each in group["params"]}
    return any(
        isinstance(value, Tensor) and id(value) not in parameters and not _is_single_number(value)
        for value in tree_leaves(own)
    )


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor of floating-point numbers that are what they say: no codes, no packed numbers."""
    return (
        isinstance(value, Tensor) and value.is_floating_point() and type(shards.local(value)) in (Tensor, nn.Parameter)
    )


def _is_single_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() <= 1


def _is_like(tensor: Tensor, bits: Tensor) -> bool:
    return tensor.itemsize == bits.itemsize and tensor.is_floating_point() and not tensor.is_sparse


class _GradientHook:
    """Masks the gradient of a parameter after it was accumulated."""

    def __init__(self, cover: _Cover, keep_overflow: bool) -> None:
        self._cover, self._keep_overflow = cover, keep_overflow

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._cover.zero_(parameter.grad, keep_overflow=self._keep_overflow)


def pack(mask: Tensor) -> Tensor:
    """Pack a boolean tensor into bits, the first entry in the highest bit.

    Args:
        mask: Boolean tensor of any shape.

    Returns:
        ``uint8`` tensor on the CPU, of shape ``(ceil(mask.numel() / 8),)``.

    Example:
        >>> pack(torch.tensor([True, False, False, False, False, False, False, True, True]))
        tensor([129, 128], dtype=torch.uint8)

    """
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (padded << _bit_positions(padded.device)).sum(1, dtype=torch.uint8).cpu()


def unpack(bits: Tensor, shape: list[int]) -> Tensor:
    """Unpack what :func:`pack` packed.

    Args:
        bits: ``uint8`` tensor of shape ``(ceil(prod(shape) / 8),)``.
        shape: The shape of the mask.

    Returns:
        Boolean tensor of that shape.

    """
    flat = (bits.view(-1, 1) >> _bit_positions(bits.device) & 1).view(-1)
    return flat[: prod(shape)].view(shape).bool()


def _unpacked(name: str, packed: Mapping[str, Any]) -> Tensor:
    """Unpack one mask, once its parts are known to fit together."""
    shape, bits = packed.get("shape"), packed.get("bits")
    if not isinstance(shape, list) or not isinstance(bits, Tensor):
        raise ValueError(f"The packed mask of {name!r} needs a `shape` and `bits`: the file is damaged.")
    forms.check(list[int], shape, f"the shape of the mask of {name!r}")
    number = prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != ((number + 7) // 8,) or not forms.has_memory(bits):
        raise ValueError(f"The packed mask of {name!r} does not hold {forms.shown(number)} bits: the file is damaged.")
    if number % 8 and int(bits[-1]) & (255 >> number % 8):
        raise ValueError(
            f"The packed mask of {name!r} has bits set behind the {number} that it should have: the file is damaged."
        )
    try:
        return unpack(bits, shape)
    except (RuntimeError, TypeError):  # of shapes that torch cannot have, such as one of a hundred dimensions
        raise ValueError(f"The packed mask of {name!r} has a shape that no tensor has: the file is damaged.") from None


@torch.no_grad()
def zero_(tensor: Tensor, mask: Tensor, name: str = "a tensor") -> None:
    """Set what a mask prunes to exactly 0, once; what is masked again and again has :class:`MaskedParameters`.

    Args:
        tensor: A parameter, which may be split over ranks, or any other tensor.
        mask: Boolean tensor of the same shape, on any device; ``True`` keeps.
        name: What to call the tensor in the message.

    Raises:
        TypeError: If zeros cannot be written into it, and it is not 0 already where the mask prunes.

    """
    mask, tensor = shards.part(mask, of=tensor).to(tensor.device), shards.local(tensor)
    if not plain.is_plain(tensor):
        plain.zero_(tensor, ~mask, name)
        return
    if tensor.device.type != "cpu" or not tensor.is_floating_point() or not tensor.ndim:
        tensor.masked_fill_(~mask, 0)
        return
    rows = max(1, _CHUNK * len(tensor) // max(1, tensor.numel()))
    bits = tensor.view(INTEGERS[tensor.itemsize])
    for values, kept in zip(torch.split(bits, rows), torch.split(mask, rows), strict=True):
        values.bitwise_and_(kept.view(torch.int8).neg())  # -1 has all bits set


@torch.no_grad()
def zero_each_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Do :func:`zero_` to many tensors, with few operations for those that are small.

    Args:
        tensors: Dense tensors, none of them split over ranks.
        masks: A mask for each, on its device.

    """
    for each in joining.groups(tensors):
        group = [*tensors[each]]
        if len(group) == 1:
            zero_(group[0], masks[each.start])
        else:
            flat = joining.joined(group)
            zero_(flat, joining.joined(masks[each]))
            torch._foreach_copy_(group, [*joining.parted(flat, group)])


def _pruned(mask: Tensor, parameter: Tensor) -> Tensor:
    """Say which entries of a parameter, or of this rank's part of it, a mask prunes."""
    return ~shards.part(mask, of=parameter).to(parameter.device)


def _bit_positions(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


def with_wrapped(optimizer: Optimizer) -> list[Optimizer]:
    """Find the optimizer and those that it wraps, in attributes or in lists and dictionaries there, each once.

    What has parameter groups is taken for an optimizer: wrappers need not be of that class.

    Args:
        optimizer: An optimizer, such as SAM or Lookahead.

    """
    found = [optimizer]
    for outer in found:  # grows as wrapped optimizers turn up
        found += [
            value
            for value in tree_leaves(list(vars(outer).values()))
            if isinstance(getattr(value, "param_groups", None), list) and value not in found
        ]
    return found
