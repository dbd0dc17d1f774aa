"""Warn if zeros are lost before the network multiplies with them, or only a small part of its weights is prunable."""

from collections.abc import Iterator, Sequence

from torch import nn

from lightning_drive.core.messages import listed
from lightning_drive.network.costs import Costs
from lightning_drive.network.masks import Masks


def warnings(module: nn.Module, masks: Masks, others: Sequence[str], costs: Costs) -> Iterator[str]:
    """Warn if products are dense again, and if matrices that stay dense (``others``) hold most of the weights."""
    if costs.dense_again:
        names = costs.dense_again
        yield (
            f"The network does not multiply by {listed(map(repr, names))} directly: it computes other weights from them"
            " (by standardising, centring or adding, for example), which are not 0 where the masks prune. Leave them"
            f" out with `exclude={[*names]}`, or let the layer use a weight whose zeros stay zeros."
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
    """Return how to prune the matrices that the network multiplies by, or why they cannot be pruned."""
    multiplied = [name for name in dense if name in costs.in_products and name not in complex_]
    looked_up = [name for name in dense if name not in multiplied]
    if complex_ and not multiplied:
        return " Complex weights cannot be pruned: scores are defined for real ones."
    if not costs.in_products:
        return " Select those to prune with `include`."
    if not multiplied:
        return " The network does not multiply by them: it looks them up or adds them."
    if not looked_up:
        return ' To prune them, too, set `include=["*"]`.'
    if len(looked_up) <= len(multiplied) + len(masks):
        return f' To prune all that the network multiplies by, set `include=["*"], exclude={looked_up}`.'
    return f" To prune all that the network multiplies by, set `include={[*masks, *multiplied]}`."
