"""Numbers and pictures reach the loggers of Lightning, the real ones, and can be read back from what those wrote."""

import csv
import io
import json
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import fits
import lightning.pytorch as pl
import matplotlib.image
import mlflow
import pytest
import torch
import torch.nn.functional as F
import wandb
from fits import BiaslessMLP, ConvModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import default_collate
from wandb.proto.wandb_internal_pb2 import Record

from lightning_drive.callbacks.hooks import PruningCallback

History: TypeAlias = dict[str, list[tuple[int, float]]]
"""Metric to its steps and values, as they were written."""


def make_loggers(folder: Path) -> dict[str, Logger]:
    return {
        "csv": CSVLogger(folder, version=0),
        "tensorboard": TensorBoardLogger(folder, version=0),
        "wandb": WandbLogger(save_dir=folder, offline=True),
        "mlflow": MLFlowLogger(tracking_uri=(folder / "mlflow").as_uri()),
    }


@pytest.fixture(scope="module", autouse=True)
def _local() -> Iterator[None]:
    """Have W&B and MLflow write files, say nothing, and ask nobody outside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_DISABLE_GIT", "true")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("GIT_PYTHON_REFRESH", "quiet")
        uri = mlflow.get_tracking_uri()
        yield
        mlflow.set_tracking_uri(uri)
        wandb.teardown()


def read_csv(logger: CSVLogger) -> History:
    history: History = {}
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value:
                    history.setdefault(key, []).append((int(row["step"]), float(value)))
    return history


def read_tensorboard(logger: TensorBoardLogger) -> History:
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]  # files of two runs that began within a second come in any order
    return {tag: sorted((event.step, event.value) for event in events.Scalars(tag)) for tag in tags}


def read_mlflow(logger: MLFlowLogger) -> History:
    client = mlflow.MlflowClient(logger._tracking_uri)
    return {
        key: [(metric.step, metric.value) for metric in client.get_metric_history(logger.run_id, key)]
        for key in client.get_run(logger.run_id).data.metrics
    }


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """Read all rows of the history in an offline run's file; what is of several parts, such as a picture, is a dict."""
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in wandb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        row: dict[str, Any] = {}
        for item in record.history.item:
            first, *others = item.nested_key or [item.key]
            if others:
                row.setdefault(first, {})[others[0]] = json.loads(item.value_json)
            else:
                row[first] = json.loads(item.value_json)
        rows.append(row)
    return [row for row in rows if row]


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Take a file apart that has the form of LevelDB's log: 7 bytes, then records, cut where a block of 32 KiB ends."""
    assert data.startswith(b":W&B")
    position, record = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)  # checksum, size, whole, first, middle or last
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


def read_wandb(logger: WandbLogger) -> History:
    history: History = {}
    for row in wandb_rows(Path(logger.save_dir or "")):
        for key, value in row.items():
            if isinstance(value, (int, float)):
                history.setdefault(key, []).append((row["trainer/global_step"], value))
    return history


READERS: dict[str, Callable[[Any], History]] = {
    "csv": read_csv,
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
}


def pruning_of(history: History) -> History:
    return {key: values for key, values in history.items() if key.startswith("pruning/")}


@dataclass
class Run:
    folder: Path
    callback: PruningCallback
    loggers: dict[str, Any]

    def read(self, name: str) -> History:
        return READERS[name](self.loggers[name])


@pytest.fixture(scope="module", params=["DRIVE", "IMP"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One training of four epochs of three steps, with all loggers at once."""
    folder = tmp_path_factory.mktemp(request.param)
    run = Run(folder, fits.CALLBACKS[request.param](), make_loggers(folder))
    fits.trainer(folder, run.callback, logger=list(run.loggers.values())).fit(ConvModule(), fits.loader())
    run.loggers["wandb"].experiment.finish()
    return run


def expected(callback: PruningCallback) -> History:
    """What the loggers should have: a number at every cut, and at the ends of epochs what callbacks could look at."""
    report = callback.report
    assert report is not None
    last = 1 - fits.NUM_KEPT / fits.NUM_PRUNABLE
    of_all = fits.NUM_PRUNABLE / sum(parameter.numel() for parameter in ConvModule().parameters())
    overall = last * of_all
    if report.cycle is None:
        return {
            "pruning/sparsity": [(6, last), (8, last), (11, last)],
            "pruning/overall_sparsity": [(6, overall), (8, overall), (11, overall)],
            "pruning/density": [(6, 1 - last)],
            "pruning/effective_sparsity": [(6, report.effective_sparsity)],
            "pruning/seconds": [(6, report.seconds)],
        }
    first = 1 - round(fits.NUM_PRUNABLE * 0.2**0.5) / fits.NUM_PRUNABLE
    some = pytest.approx(0.5, abs=0.5)  # the report has the last cut only
    return {
        "pruning/cycle": [(2, 0), (3, 1), (5, 1), (6, 2), (8, 2), (11, 2)],
        "pruning/sparsity": [(3, first), (5, first), (6, last), (8, last), (11, last)],
        "pruning/overall_sparsity": [
            (step, share) for step, share in zip((3, 5, 6, 8, 11), (first * of_all,) * 2 + (overall,) * 3, strict=True)
        ],
        "pruning/density": [(3, 1 - first), (6, 1 - last)],
        "pruning/effective_sparsity": [(3, some), (6, report.effective_sparsity)],
        "pruning/seconds": [(3, pytest.approx(30, abs=30)), (6, report.seconds)],
    }


@pytest.mark.parametrize("name", READERS)
def test_metrics(run: Run, name: str) -> None:
    """Every logger of several has every number once, at its step: that of the cut, or the last one of an epoch."""
    written = pruning_of(run.read(name))
    wanted = expected(run.callback)
    assert steps_of(written) == steps_of(wanted)
    for key, values in wanted.items():
        for (_, value), (_, want) in zip(written[key], values, strict=True):
            assert value == (pytest.approx(want, rel=1e-6) if isinstance(want, (int, float)) else want), key


@pytest.mark.parametrize("name", ["csv", "wandb"])
def test_metrics__epoch(run: Run, name: str) -> None:
    """What is written beside the numbers of a cut says in which epoch it was, as Lightning has it for all others."""
    if name == "csv":
        with Path(run.loggers["csv"].log_dir, "metrics.csv").open(newline="") as file:
            cuts = [row for row in csv.DictReader(file) if row["pruning/seconds"]]
    else:
        cuts = [row for row in wandb_rows(run.folder) if "pruning/seconds" in row]
    assert [int(row["epoch"]) for row in cuts] == ([2] if run.callback.report.cycle is None else [1, 2])


def kinds(run: Run) -> list[str]:
    return ["density", "rounds", "scores"] + ["cycles"] * (run.callback.report.cycle is not None)


def check_picture(data: bytes) -> None:
    assert matplotlib.image.imread(io.BytesIO(data)).std() > 0.05


def test_pictures__tensorboard(run: Run) -> None:
    """Every picture once, at the step of the (last) cut, as an image that can be read."""
    events = EventAccumulator(run.loggers["tensorboard"].log_dir, size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == [f"pruning/figures/{kind}" for kind in kinds(run)]
    for tag in events.Tags()["images"]:
        [image] = events.Images(tag)
        assert (image.step, image.width) == (6, 800)
        check_picture(image.encoded_image_string)


def test_pictures__wandb(run: Run) -> None:
    """Every picture once, at the step of the cut; no name is a number's too, which W&B would replace by a picture."""
    rows = wandb_rows(run.folder)
    pictures = {key: (value, row) for row in rows for key, value in row.items() if isinstance(value, dict)}
    assert list(pictures) == [f"pruning/figures/{kind}" for kind in kinds(run)]
    for picture, row in pictures.values():
        assert row["trainer/global_step"] == 6
        [file] = picture["filenames"]
        check_picture(next(run.folder.glob(f"wandb/offline-run-*/files/{file}")).read_bytes())
    numbers = {key for row in rows for key, value in row.items() if not isinstance(value, dict)}
    assert not numbers & pictures.keys()


def test_pictures__mlflow(run: Run) -> None:
    logger = run.loggers["mlflow"]
    client = mlflow.MlflowClient(logger._tracking_uri)
    files = [artifact.path for artifact in client.list_artifacts(logger.run_id, "pruning/figures")]
    assert sorted(files) == sorted(f"pruning/figures/{kind}.png" for kind in kinds(run))
    for file in files:
        check_picture(Path(client.download_artifacts(logger.run_id, file)).read_bytes())


def test_pictures__one_logger_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger that takes no picture is named in a warning; the others get theirs, and training goes on."""
    loggers = make_loggers(tmp_path)
    mlflow_logger, tensorboard = loggers["mlflow"], loggers["tensorboard"]
    monkeypatch.setattr(type(mlflow_logger.experiment), "log_figure", lambda *_: 1 / 0)
    running = fits.trainer(tmp_path, fits.drive(warmup_epochs=0), logger=[mlflow_logger, tensorboard], max_epochs=1)
    with pytest.warns(UserWarning, match=r"could not be logged by MLFlowLogger \(ZeroDivisionError"):
        running.fit(ConvModule(), fits.loader())
    assert running.current_epoch == 1
    events = EventAccumulator(tensorboard.log_dir, size_guidance={"images": 0}).Reload()
    assert len(events.Tags()["images"]) == 3


class CrashError(Exception):
    pass


class Crash(pl.Callback):
    """Let a run fail at the start of an epoch, or of a later batch of it, and have a checkpoint to go on from."""

    def __init__(self, epoch: int, batch: int, file: Path) -> None:
        self.epoch, self.batch, self.file = epoch, batch, file

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if (trainer.current_epoch, 0) == (self.epoch, self.batch):
            raise CrashError

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0 and (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            raise CrashError

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.file)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.batch > 0:
            trainer.save_checkpoint(self.file)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("moment", [(1, 0), (2, 0), (2, 1), (3, 0)], ids="epoch_and_batch-{}".format)
@pytest.mark.parametrize("method", ["DRIVE", "IMP"])
def test_metrics__resumed(
    method: str, moment: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that crashed, and went on in the same run of its loggers, has what an unbroken one has, and nothing twice.

    In the middle of an epoch, Lightning does not go on at the very step.
    """
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures take time

    def make(run_id: str | None = None) -> dict[str, Any]:
        uri = (tmp_path / "mlflow").as_uri()
        return {
            "tensorboard": TensorBoardLogger(tmp_path, version=0),
            "mlflow": MLFlowLogger(tracking_uri=uri, run_id=run_id),
        }

    loggers = make()
    crash = Crash(*moment, checkpoint := tmp_path / "crashed.ckpt")
    crashing = fits.trainer(tmp_path, crash, fits.CALLBACKS[method](), logger=list(loggers.values()))
    with pytest.raises(CrashError):
        crashing.fit(ConvModule(), fits.loader())
    loggers, callback = make(loggers["mlflow"].run_id), fits.CALLBACKS[method]()
    resumed = fits.trainer(tmp_path, callback, logger=list(loggers.values()))
    resumed.fit(ConvModule(), fits.loader(), ckpt_path=checkpoint)
    wanted = steps_of(expected(callback))
    for name, logger in loggers.items():
        written = steps_of(pruning_of(READERS[name](logger)))
        if moment[1] == 0:
            assert written == wanted, name
        else:
            assert {key: len(steps) for key, steps in written.items()} == {key: len(wanted[key]) for key in wanted}
            assert all(steps == sorted(set(steps)) for steps in written.values()), name


class AnyBatch(BiaslessMLP):
    """Logs nothing, and so does not care what Lightning makes of its batches."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def ragged(samples: list[Any]) -> list[torch.Tensor]:
    return [*default_collate(samples), torch.zeros(3)]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_metrics__resumed_with_any_batch(tmp_path: Path) -> None:
    """The numbers need no batch size: Lightning would warn that it had guessed one, or refuse."""
    crash = Crash(2, 1, checkpoint := tmp_path / "crashed.ckpt")
    with pytest.raises(CrashError):
        fits.trainer(tmp_path, crash, fits.drive()).fit(AnyBatch(), fits.loader(collate_fn=ragged))
    resumed = fits.trainer(tmp_path, fits.drive(), max_epochs=3)
    resumed.fit(AnyBatch(), fits.loader(collate_fn=ragged), ckpt_path=checkpoint)
    assert resumed.callback_metrics["pruning/sparsity"] == pytest.approx(0.8, abs=1e-3)


def steps_of(history: History) -> dict[str, list[int]]:
    return {key: [step for step, _ in values] for key, values in history.items()}


class TwoOptimizers(ConvModule):
    """Both step with every batch, so that Lightning counts two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.features, self.head)]


def test_metrics__two_optimizers(tmp_path: Path) -> None:
    """The step is the one that Lightning gives to losses."""
    logger = CSVLogger(tmp_path)
    callback = fits.drive(loss_fn=fits.loss_fn)
    fits.trainer(tmp_path, callback, logger=logger, max_epochs=3).fit(TwoOptimizers(), fits.loader())
    history = read_csv(logger)
    assert [step for step, _ in history["train_loss"]] == list(range(9))
    assert [step for step, _ in history["pruning/seconds"]] == [6]
    assert [step for step, _ in history["pruning/sparsity"]] == [6, 8]


def test_metrics__no_logger(tmp_path: Path) -> None:
    """Without a logger, monitors and names of checkpoints still have the sparsity."""
    name = "{epoch}-{pruning/sparsity:.3f}"
    checkpoints = ModelCheckpoint(tmp_path, filename=name, save_top_k=-1, auto_insert_metric_name=False)
    fits.trainer(tmp_path, fits.drive(), checkpoints, logger=False).fit(ConvModule(), fits.loader())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt"))[2:] == ["2-0.800.ckpt", "3-0.800.ckpt"]
