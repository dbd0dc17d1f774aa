"""Name parameters that cannot score: those without a gradient, behind norms of scale 0, or in pairs of zeros."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor, nn

from lightning_drive.core.messages import listed
from lightning_drive.search import methods
from lightning_drive.search.methods import Method

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def patterns(names: Collection[str], among: Iterable[str]) -> list[str]:
    """Return glob patterns that match ``names`` but no other name in ``among``, one pattern for a whole submodule.

    Examples:
        >>> patterns(["teacher.0.weight", "teacher.2.weight"], ["0.weight", "teacher.0.weight", "teacher.2.weight"])
        ['teacher.*']
        >>> patterns(["0.weight", "2.weight"], ["0.weight", "1.weight", "2.weight"])
        ['0.weight', '2.weight']

    """
    others = [name for name in among if name not in names]
    matching = []
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) + "." for length in range(1, len(parts)))
        whole = next((prefix for prefix in prefixes if not any(other.startswith(prefix) for other in others)), name)
        several = sum(other.startswith(whole) for other in names) > 1
        matching.append(f"{whole}*" if several else name)
    return list(dict.fromkeys(matching))


def unreached(names: Collection[str], among: Iterable[str], method: Method) -> str:
    """Return the warning that parameters without a gradient were left out; ``among`` names all prunable ones."""
    reads_loss = methods.reads(method) == "loss"
    what = "the loss" if reads_loss else "the output of `forward`"
    more = (
        " Where only some inputs use them, as with experts, more rounds or more `batches_per_round` may reach them."
        if reads_loss
        else ""
    )
    return (
        f"{listed(map(repr, names))} had no gradient in any round: {what} does not depend on them, since they are not"
        " used, or only under `no_grad` or through `detach`. They were left out and stay dense. Masks were searched for"
        f" again without them, which `exclude={patterns(names, among)}` saves.{more}"
    )


def unreached_before_cut(names: Collection[str], among: Iterable[str], phase: str) -> str:
    """Return the warning that parameters without a gradient before the first cut are left out."""
    return (
        f"{listed(map(repr, names))} had no gradient in all of the {phase}: the loss does not depend on them, since"
        " they are not used, or only under `no_grad` or through `detach`. They are left out and stay dense, as with"
        f" `exclude={patterns(names, among)}`."
    )


def dead_pairs(masks: Mapping[str, Tensor], zeros: Collection[str]) -> Iterator[str]:
    """Warn if both factors of a low-rank adapter are zero, or will be, since neither has a gradient then.

    ``zeros`` names the parameters that were 0 throughout before pruning.
    """
    dead: list[str] = []
    for name, mask in masks.items():
        partner = re.sub(r"(lora[_.](?:embedding_)?)(a|down)\b", _second, name, flags=re.IGNORECASE)
        if partner != name and partner in masks:
            pair = {name: mask, partner: masks[partner]}
            if any(factor in zeros or not kept.any() for factor, kept in pair.items()):
                dead.extend(pair)
    if dead:
        yield (
            f"Low-rank adapters: one factor of {listed(map(repr, dead), most=4)} is 0 throughout, from the beginning"
            " or by pruning. If pruning removes all of the other factor as well, neither ever gets a gradient again."
            " Leave them out with `exclude=['*lora*']`, or prune the weights that they are merged into."
        )


def _second(match: re.Match[str]) -> str:
    return match[1] + {"A": "B", "a": "b"}.get(match[2], "up")


def nothing_to_rank(masks: Mapping[str, Tensor], near_zero: Mapping[str, float]) -> str:
    """Return the error for scores that are all zero, with the parameters that cause it, if they are known."""
    error = "Every score is zero, so there is nothing to rank: the weights or all their gradients are zero."
    zeros = [name for name in masks if near_zero.get(name) == 0]
    if not zeros:
        return f"{error} Check that the loss depends on the weights and that no layer is initialised with zeros."
    pairs = " ".join(dead_pairs(masks, zeros))
    return (
        f"{error} The weights of {listed(map(repr, zeros), most=3)} are 0 throughout, so those in front of them have no"
        f" gradient. Initialise them with other values, or prune after a warm-up. {pairs}".rstrip()
    )


def silent_norms(module: nn.Module) -> list[str]:
    """Return the names of the scales of norms that are 0, so that nothing passes."""
    return [
        f"{name}.weight" if name else "weight"
        for name, layer in module.named_modules()
        if isinstance(layer, _NORMS) and layer.weight is not None and not layer.weight.any()
    ]


def behind_norms(module: nn.Module) -> Iterator[str]:
    """Warn of norms whose scale is 0, so that nothing passes."""
    scales = silent_norms(module)
    if scales:
        yield (
            f"The scale of {listed(map(repr, scales), most=3)} is 0 throughout, as some libraries initialise residual"
            " branches: all weights in front of it score 0. Initialise it with 1 (timm: `zero_init_last=False`), or"
            " prune after a warm-up."
        )
