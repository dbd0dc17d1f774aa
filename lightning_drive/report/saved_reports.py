"""Read the report out of a checkpoint or sparse file, and check that its numbers agree."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from lightning_drive.core.messages import listed, shown
from lightning_drive.core.rounds import Round, ScoreHistogram
from lightning_drive.export import checkpoint_metadata, checkpoints, sparse_reader
from lightning_drive.report.parts import LayerReport


def plain(value: Any) -> Any:
    """Return dictionaries, lists and tuples with lists in place of tuples, as JSON has them."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def values_in(path: Path) -> Mapping[str, Any]:
    """Return the saved values of the report in a file; raise ``ValueError`` with the reason if it has none."""
    if checkpoints.is_safetensors(path):
        checkpoint = checkpoint_metadata.unpacked(sparse_reader.read_metadata(path), path)
    else:
        checkpoint = checkpoints.load(path, needs_weights=False)
    callback, values = checkpoints.pruning_in(checkpoint)
    if values is not None:
        report: Mapping[str, Any] = values
        return report
    epoch, step = (shown(checkpoint.get(name)) for name in ("epoch", "global_step"))
    where = f"{str(path)!r} (epoch {epoch}, step {step})"
    if callback:
        raise ValueError(f"{where} holds no report yet: {callback} had not pruned when it was saved.")
    states = checkpoint.get("callbacks")
    if not isinstance(states, dict):
        raise ValueError(
            f"{str(path)!r} is not a checkpoint of a Lightning Trainer that has callbacks in it. Name one that was"
            " saved by ModelCheckpoint or `trainer.save_checkpoint(path)`, without `weights_only`."
        )
    raise ValueError(
        f"{where} holds no report: it was saved without a pruning callback of lightning_drive. Its callbacks:"
        f" {listed(name if isinstance(name, str) else shown(name) for name in states)}."
    )


def contradictions(
    layers: Sequence[LayerReport],
    rounds: Sequence[Round],
    scores: ScoreHistogram | None,
    num_parameters: int | None,
) -> Iterator[str]:
    """Yield a sentence for each number that cannot be of the same pruning as the others."""
    names = [layer.name for layer in layers]
    if not names or len(set(names)) < len(names):
        yield "it has no layers, or one of them twice"
    for layer in layers:
        if not layer.num_weights or layer.num_weights != prod(layer.shape):
            yield f"{layer.name!r} cannot have {layer.num_weights} weights in the shape {layer.shape}"
        elif layer.num_kept > layer.num_weights or (layer.num_active or 0) > layer.num_kept:
            yield f"{layer.name!r} has more kept weights than weights, or more active ones than kept ones"
    if num_parameters is not None and num_parameters < sum(layer.num_weights for layer in layers):
        yield "its module has fewer weights in all than prunable ones"
    if any(len(pruning_round.removed) != len(names) for pruning_round in rounds):
        yield f"its rounds are not of {len(names)} layers"
    if scores is not None and len(scores.kept) != len(scores.pruned):
        yield "its histogram of scores has more bins of kept ones than of pruned ones, or fewer"
