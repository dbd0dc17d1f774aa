"""Log numbers and pictures of a pruning by the loggers of a Trainer."""

import io
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_drive.report.pruning_report import PruningReport
from lightning_drive.trainer import lightning_internals
from lightning_drive.trainer.terminal import is_installed

_WITH_PICTURES = (TensorBoardLogger, WandbLogger, MLFlowLogger)
"""Loggers that take pictures."""


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Log numbers at once, with the step and epoch that Lightning logs with its own."""
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=lightning_internals.logged_step(trainer))


def log_with_epoch(trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: Mapping[str, float]) -> None:
    """Have Lightning log numbers when the epoch ends; of numbers that were given before in the epoch the highest."""
    if not trainer.barebones:
        settings: Any = {"on_step": False, "on_epoch": True, "reduce_fx": "max", "sync_dist": True}
        # With a batch size of 1 Lightning does not look for one in batches, which may be of any kind.
        pl_module.log_dict(metrics, batch_size=1, **settings)


def log_pictures(trainer: pl.Trainer, report: PruningReport) -> None:
    """Log all pictures of a report by the loggers that take some, if matplotlib is installed; warn if that fails."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, _WITH_PICTURES)]
    if not loggers or not trainer.is_global_zero or not is_installed("matplotlib"):
        return
    for logger in loggers:
        try:
            _log_pictures(logger, report, lightning_internals.logged_step(trainer))
        except Exception as error:  # a picture is not worth ending the training
            rank_zero_warn(
                f"The pictures of the pruning could not be logged by {type(logger).__name__}"
                f" ({type(error).__name__}: {error})."
            )


def _log_pictures(logger: Logger, report: PruningReport, step: int) -> None:
    for kind in report.pictures:
        name = f"pruning/figures/{kind}"  # "pruning/density" is a number: W&B would have one take the other's place
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, report.figure(kind), step)
        elif isinstance(logger, WandbLogger):
            from PIL import Image  # matplotlib needs it, too

            file = io.BytesIO()
            report.figure(kind).savefig(file, format="png", dpi=150)
            logger.log_image(name, [Image.open(file)], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, report.figure(kind), f"{name}.png")
