"""Warn if zeros are lost before the network multiplies with them, or only a small part of its weights is prunable."""

from collections.abc import Iterator, Sequence

from torch import nn

from lightning_drive.core.masks import Masks
from lightning_drive.core.messages import listed
from lightning_drive.network.costs import Costs


def warnings(module: nn.Module, masks: Masks, others: Sequence[str], costs: Costs) -> Iterator[str]:
    """Yield a warning where products are dense again, and one if most matrices (``others``) are not prunable."""
    if costs.dense_again:
        names = costs.dense_again
        yield (
            f"{listed(map(repr, names))} {'is' if len(names) == 1 else 'are'} not what the network multiplies with: it"
            " computes other weights from them (standardised or centred ones, or with something added, say), which are"
            f" not 0 where the masks prune. Leave them out with `exclude={[*names]}`, or let the layer compute with a"
            " weight whose zeros stay zeros."
        )
    matrices = {name: parameter for name, parameter in module.named_parameters() if name in others}
    sizes = {name: parameter.numel() for name, parameter in matrices.items()}
    dense = sum(sizes.values())
    if dense <= masks.num_prunable:
        return
    share = masks.num_prunable / (masks.num_prunable + dense)
    largest = sorted(sizes, key=lambda name: -sizes[name])  # stable
    remedy = _remedy(masks, largest, [name for name in largest if matrices[name].is_complex()], costs)
    yield (
        f"Only {share:.1%} of the weights in matrices are prunable, so a sparsity of {masks.sparsity:.1%} is"
        f" {masks.sparsity * share:.1%} of all of them. The largest that stay dense are"
        f" {listed((f'{name!r} ({sizes[name]:,})' for name in largest), most=3)}.{remedy}"
    )


def _remedy(masks: Masks, dense: Sequence[str], complex_: Sequence[str], costs: Costs) -> str:
    """Return how to prune the matrices that the network multiplies with."""
    multiplied = [name for name in dense if name in costs.in_products and name not in complex_]
    looked_up = [name for name in dense if name not in multiplied]
    if complex_ and not multiplied:
        return " Complex weights cannot be pruned: scores are defined for real ones."
    if not costs.in_products:
        return " Name those that are to be pruned with `include`."
    if not multiplied:
        return " The network does not multiply with them: it looks them up or adds them."
    if not looked_up:
        return ' Prune them, too, with `include=["*"]`.'
    if len(looked_up) <= len(multiplied) + len(masks):
        return f' Prune what the network multiplies with by `include=["*"], exclude={looked_up}`.'
    return f" Prune what the network multiplies with by `include={[*masks, *multiplied]}`."
