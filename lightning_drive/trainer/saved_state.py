"""The state that a pruning callback saves in checkpoints, and that a resume restores."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_drive.core import saved_values
from lightning_drive.core.messages import listed, shown
from lightning_drive.export import checkpoints
from lightning_drive.network.masks import Masks
from lightning_drive.network.rewinding import RewindPoint
from lightning_drive.report.pruning_report import PruningReport
from lightning_drive.trainer import other_callbacks, restored_masks

_VERSION = 1


class Pruning(NamedTuple):
    """Masks and their report, replaced as a whole, so that they belong together in a save at any moment."""

    masks: Masks = Masks()
    """The masks, on the CPU; empty before pruning."""
    report: PruningReport | None = None
    unfinished: Mapping[str, Mapping[str, Tensor]] | None = None
    """The new statistics of BatchNorm, by layer and buffer, while the masks are being put into effect."""


class SavedState(NamedTuple):
    """The state of a pruning callback."""

    pruning: Pruning
    start: RewindPoint | None
    """The weights and optimizers to return to, while they are needed."""
    settings: Mapping[str, Any]
    """The settings that the masks depend on, in plain types."""

    def to_dict(self) -> dict[str, Any]:
        """Return the state in plain types and tensors; masks take one bit per weight."""
        masks, report, unfinished = self.pruning
        return {
            "version": _VERSION,
            "masks": masks.state_dict(),
            "report": None if report is None else report.to_dict(),
            "start": None if self.start is None else self.start.state_dict(),
            "unfinished": unfinished,
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], what: str) -> "SavedState":
        """Read what :meth:`to_dict` returned; raise ValueError if it has another version or is damaged."""
        version = saved_values.check(dict[str, object], values, what).get("version")
        if type(version) is not int or version != _VERSION:
            raise ValueError(
                f"{what[:1].upper()}{what[1:]} has version {shown(version)}, but this lightning_drive"
                f" reads version {_VERSION}."
            )
        start = values.get("start")
        masks, report = Masks.from_state_dict(values.get("masks")), values.get("report")  # type: ignore[arg-type]
        report = None if report is None else PruningReport.from_dict(report)
        restored_masks.check_belong_together(masks, report)
        unfinished = saved_values.check(
            dict[str, dict[str, Tensor]] | None,
            values.get("unfinished"),
            "the unfinished part of the callback state",
        )
        settings = values.get("settings", {})
        return cls(
            Pruning(masks, report, unfinished),
            None if start is None else RewindPoint.from_state_dict(start),
            saved_values.check(dict[str, object], settings, "the settings in the checkpoint's callback state"),
        )


def of_renamed(
    callback: pl.Callback, own_names: Iterable[object], trainer: pl.Trainer, checkpoint: Mapping[str, Any]
) -> tuple[str, Mapping[str, Any]] | None:
    """Return name and state of the one pruning callback in a checkpoint that has another name, but the same kind.

    Lightning itself restores a state of the same name. Raise ValueError if the checkpoint was pruned by callbacks whose
    masks this one cannot take over.
    """
    states = checkpoint.get("callbacks") or {}
    own = [states[name] for name in own_names if name in states]
    taken = {other.state_key for other in other_callbacks.callbacks_of(trainer)}
    others = {name: states[name] for name in checkpoints.pruning_states(checkpoint) if name not in taken}
    pruned = [name for name, state in others.items() if state["report"] is not None]
    if own and (not pruned or saved_values.check(dict[str, object], own[0], "the callback state").get("report")):
        return None
    fitting = [name for name, state in others.items() if _kind(state) == _kind(callback.state_dict())]
    if len(others) == 1 and fitting and not own:
        return fitting[0], others[fitting[0]]
    if pruned and trainer.state.fn == TrainerFn.FITTING:
        raise ValueError(
            f"{type(callback).__name__} can only take over the masks of one callback of its kind (IMP, gradual"
            f" pruning, or neither), but the checkpoint was pruned by {listed(others)}. Resume with the callback that"
            " the checkpoint was saved with, or begin anew from a dense checkpoint."
        )
    return None


def hold_still(checkpoint: dict[str, Any], callback: pl.Callback, pruning: Callable[[], Pruning]) -> None:
    """Copy the state that another thread saves, which may still be writing it when the network is pruned."""
    before = None
    while before is not pruning():  # or it was pruned meanwhile: copy once more
        before = pruning()
        copies = {name: _copied(checkpoint[name]) for name in ("state_dict", "optimizer_states")}
        state = callback.state_dict()
    checkpoint.update(copies)
    checkpoint["callbacks"][callback.state_key] = state


def _kind(state: Mapping[str, Any]) -> set[str]:
    """Return which of the settings that only IMP or only gradual pruning has are in the state of a callback."""
    settings = state.get("settings")
    return {"cycles", "cuts_per_epoch"} & set(settings if isinstance(settings, dict) else ())


def _copied(state: Any) -> Any:
    """Copy tensors in dictionaries and lists, with what hangs on the dictionaries, such as the versions of modules."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        twin = copy.copy(state)
        twin.update({key: _copied(value) for key, value in state.items()})
        return twin
    return [_copied(value) for value in state] if isinstance(state, list) else state
