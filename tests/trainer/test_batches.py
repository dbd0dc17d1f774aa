"""Scoring reads the batches that training will read, and data that know where they are lose nothing to it."""

import copy
import itertools
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import Value
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
)

NUM = 6


def sample(number: float) -> Tensor:
    return torch.tensor([float(number) + 1, 1.0])


class Resumable:
    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return NUM

    def __iter__(self) -> Iterator[Tensor]:
        for k in range(self.at % NUM, NUM):
            self.at = k + 1
            yield sample(k).view(1, 2)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Stateful(DataLoader[Any]):
    """Keeps its iterator and the batches it gave, as torchdata's StatefulDataLoader does."""

    given, live = 0, None

    def __iter__(self) -> Any:
        self.live = iter(super().__iter__())
        return self._counted()

    def _counted(self) -> Iterator[Any]:
        for batch in self.live:  # type: ignore[attr-defined]
            self.given += 1
            yield batch + self.given

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


class Stream(IterableDataset[Tensor]):
    def __init__(self, place: Callable[[], Any] = lambda: [0]) -> None:
        self.place = place()

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(NUM):
            self.place[0] += 1
            yield sample(self.place[0])


class Data(Dataset[Tensor]):
    """Adds to each sample what a function of its own gives, which may be another at each call."""

    def __init__(self, noise: Callable[[], float]) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Tensor:
        return sample(index + self.noise())


class Counting:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


class OfTheClass(Data):
    rng = np.random.default_rng(2)

    def __init__(self) -> None:
        type(self).rng = np.random.default_rng(2)

    def __getitem__(self, index: int) -> Tensor:
        return sample(index + self.rng.random())


class Shared(Data):
    def __init__(self) -> None:
        self.value = Value("i", 0)

    def __getitem__(self, index: int) -> Tensor:
        self.value.value += 1
        return sample(self.value.value)


class Shuffled(Dataset[Tensor]):
    """Shuffles its own order in place when the first sample is asked for."""

    def __init__(self, order: Any) -> None:
        self.order, self.rng = order, np.random.RandomState(1)

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Tensor:
        if index == 0:
            self.rng.shuffle(self.order)
        return sample(int(self.order[index]) % 10)


class Noise(nn.Module):
    """A transform that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self) -> float:
        self.count += 1
        return float(self.count)


class Epochs(Sampler[int]):
    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return NUM

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(NUM, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Permuting(Epochs):
    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)

    def __iter__(self) -> Iterator[int]:
        yield from self.rng.permutation(NUM).tolist()


class Placed(Epochs):
    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        for index in range(self.at % NUM, NUM):
            self.at = index + 1
            yield index


class Batches(BatchSampler):
    def __init__(self) -> None:
        super().__init__(range(NUM), 1, False)
        self.turn = itertools.cycle([1, 2, 0, 4])

    def __iter__(self) -> Iterator[list[int]]:
        return ([(index + next(self.turn)) % NUM] for [index] in super().__iter__())


class WithLines(IterableDataset[Tensor]):
    """Goes on in an open file, from the start at its end."""

    def __init__(self, path: Path) -> None:
        path.write_text("".join(f"{k}\n" for k in range(NUM)))
        self.file = path.open()

    def __iter__(self) -> Iterator[Tensor]:
        while line := self.file.readline():
            yield sample(int(line))
        self.file.seek(0)

    def __del__(self) -> None:
        self.file.close()


class Cached(Data):
    """Keeps what it gave, beside much that is there already."""

    def __init__(self, keep: Callable[[dict[int, Tensor]], Any]) -> None:
        large = torch.zeros(2**22)  # 16 MiB, of which five are taken for data
        self.kept: dict[int, Tensor] = {-k: large for k in range(1, 6)}
        self.place = keep(self.kept)

    def __getitem__(self, index: int) -> Tensor:
        self.kept[index] = sample(index + len(self.kept))
        return self.kept[index]


class Kept(DataLoader[Any]):
    """Keeps the iterator, but makes a new one each time."""

    def __iter__(self) -> Any:
        self.last = super().__iter__()
        return self.last


class EpochLoader(DataLoader[Any]):
    """Tells its dataset, also one that workers copy, in which epoch it is."""

    def __iter__(self) -> Any:
        self.dataset.noise.count += 10
        return super().__iter__()


def closure() -> Callable[[], float]:
    generator = torch.Generator().manual_seed(1)
    return lambda: float(torch.rand((), generator=generator))


def collate(counter: Counting, batch: list[Tensor]) -> Tensor:
    return torch.stack(batch) + counter()


def chained() -> DataLoader[Any]:
    return DataLoader(ChainDataset([Stream(), Stream(lambda: torch.zeros(1))]))


DATA: dict[str, Callable[[Path], Any]] = {
    "loader": lambda _: Resumable(),
    "stateful": lambda _: Stateful(Data(lambda: 0)),
    "epoch_loader": lambda _: EpochLoader(Data(Counting())),
    "epoch_loader_with_worker": lambda _: EpochLoader(Data(Counting()), num_workers=1),
    "kept_iterator": lambda _: Kept(Data(Counting())),
    "stream": lambda _: DataLoader(Stream(), batch_size=None),
    "stream_in_worker": lambda _: DataLoader(Stream(), num_workers=1, persistent_workers=True),
    "stream_tensor": lambda _: DataLoader(Stream(lambda: torch.zeros(1))),
    "stream_array": lambda _: DataLoader(Stream(lambda: np.zeros(1))),
    "stream_dict": lambda _: DataLoader(Stream(lambda: {0: 0})),
    "chained": lambda _: chained(),
    "counter": lambda _: DataLoader(Data(Counting())),
    "module": lambda _: DataLoader(Data(Noise())),
    "closure": lambda _: DataLoader(Data(closure())),
    "python_random": lambda _: DataLoader(Data(random.Random(1).random)),
    "numpy_method": lambda _: DataLoader(Data(np.random.default_rng(4).random)),
    "legacy_numpy": lambda _: DataLoader(Data(np.random.RandomState(4).rand)),
    "counted": lambda _: DataLoader(Data(partial(next, itertools.count()))),
    "class_generator": lambda _: DataLoader(OfTheClass()),
    "shared_value": lambda _: DataLoader(Shared()),
    "shuffled_list": lambda _: DataLoader(Shuffled(list(range(NUM)))),
    "shuffled_long_list": lambda _: DataLoader(Shuffled(list(range(20_000)))),
    "shuffled_array": lambda _: DataLoader(Shuffled(np.arange(NUM))),
    "cache": lambda _: DataLoader(Cached(lambda _: None)),
    "cache_in_list": lambda _: DataLoader(Cached(lambda kept: [[kept], {"kept": kept}])),
    "cache_in_tuple": lambda _: DataLoader(Cached(lambda kept: (kept, (kept, 1)))),
    "subset": lambda _: DataLoader(Subset(Data(Counting()), range(3))),
    "concatenated": lambda _: DataLoader(ConcatDataset([Data(Counting()), Subset(Data(closure()), [1, 2])])),
    "sampler_epoch": lambda _: DataLoader(Data(lambda: 0), sampler=Epochs()),
    "sampler_epoch_workers": lambda _: DataLoader(Data(lambda: 0), sampler=Epochs(), num_workers=1),
    "sampler_numpy": lambda _: DataLoader(Data(lambda: 0), sampler=Permuting()),
    "sampler_position": lambda _: DataLoader(Data(lambda: 0), sampler=Placed()),
    "batch_sampler": lambda _: DataLoader(Data(lambda: 0), batch_sampler=Batches()),
    "batch_sampler_around": lambda _: DataLoader(Data(lambda: 0), batch_sampler=BatchSampler(Epochs(), 2, False)),
    "generator": lambda _: DataLoader(
        Data(lambda: 0), sampler=RandomSampler(range(NUM), generator=torch.Generator().manual_seed(1))
    ),
    "collate": lambda _: DataLoader(Data(lambda: 0), collate_fn=partial(collate, Counting())),
    "dict": lambda _: {"a": Resumable(), "b": DataLoader(Data(Counting()))},
    "list": lambda _: [Resumable(), DataLoader(Data(lambda: 0), sampler=Epochs())],
    "max_size": lambda _: CombinedLoader([Resumable(), DataLoader(Stream())], "max_size"),
    "file": lambda path: DataLoader(WithLines(path / "lines"), batch_size=None),
}


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 4)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list) else [batch]
        return sum((self.net(value).square().mean() for value in values if value is not None), torch.zeros(()))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.current_epoch, copy.deepcopy(str(batch))))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.001)


def seen(path: Path, loader: Any, *callbacks: pl.Callback) -> list[Any]:
    net = Net()
    fits.trainer(path, *callbacks, max_epochs=2).fit(net, loader)
    return net.seen


KEEP_ITERATORS = ["loader", "stateful", "kept_iterator", "epoch_loader_with_worker", "stream_in_worker", "file"]


@pytest.mark.parametrize(
    ("name", "warmup_epochs"), [*((name, 1) for name in DATA), *((name, 0) for name in KEEP_ITERATORS)]
)
def test_training__same_batches(name: str, warmup_epochs: int, tmp_path: Path) -> None:
    """Training reads what it would without pruning, whatever the data keep and wherever.

    The iterator of the first epoch is there before scoring, those of later ones are not.
    """
    pruned = seen(tmp_path, DATA[name](tmp_path), fits.drive(warmup_epochs=warmup_epochs, rounds=8, sparsity=0.5))
    assert pruned == seen(tmp_path, DATA[name](tmp_path))


class Player(Net):
    """Makes its own data, as agents do, or puts its own numbers into them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.rng, self.replay = 0, np.random.default_rng(1), [sample(1)]

    def played(self) -> Iterator[Tensor]:
        for _ in range(NUM):
            self.steps += 1
            self.replay.append(sample(self.steps + self.rng.random()))
            yield self.replay[-1]

    def collate(self, batch: list[Tensor]) -> Tensor:
        self.steps += 1
        return torch.stack(batch) + self.steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.replay.append(sample(self.rng.random()))
        return super().training_step(batch, batch_idx)


class Played(IterableDataset[Tensor]):
    def __init__(self, play: Callable[[], Iterator[Tensor]]) -> None:
        self.play = play

    def __iter__(self) -> Iterator[Tensor]:
        return self.play()


class Replayed(IterableDataset[Tensor]):
    def __init__(self, replay: list[Tensor]) -> None:
        self.replay, self.rng = replay, random.Random(1)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.rng.choice(self.replay) for _ in range(NUM))


@pytest.mark.parametrize("warmup_epochs", [0, 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda net: DataLoader(Played(net.played)),
        lambda net: DataLoader(Played(lambda: net.played())),
        lambda net: DataLoader(Data(lambda: 0), collate_fn=net.collate),
        lambda net: DataLoader(Replayed(net.replay)),
    ],
    ids=["method", "closure", "collate", "replay"],
)
def test_training__data_of_the_module(make: Callable[[Any], Any], warmup_epochs: int, tmp_path: Path) -> None:
    """What the module counts and draws to make its data is that of the run without pruning."""
    dense, pruned = Player(), Player()
    fits.trainer(tmp_path, max_epochs=3).fit(dense, make(dense))
    callback = fits.drive(warmup_epochs=warmup_epochs, rounds=8, sparsity=0.5)
    fits.trainer(tmp_path, callback, max_epochs=3).fit(pruned, make(pruned))
    assert (pruned.seen, pruned.steps, len(pruned.replay)) == (dense.seen, dense.steps, len(dense.replay))
    assert pruned.rng.random() == dense.rng.random()


class Repeating(DataLoader[Any]):
    """Keeps one iterator for all epochs, as timm's and Ultralytics' loaders do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.iterator = super().__iter__()

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self) // 3):
            yield next(self.iterator)


class Generating(IterableDataset[Tensor]):
    def __init__(self) -> None:
        self.stream = (sample(k) for k in range(100))

    def __iter__(self) -> Iterator[Tensor]:
        yield from itertools.islice(self.stream, NUM)


class Mapped(Generating):
    def __init__(self) -> None:
        self.stream = map(sample, (k for k in range(100)))


class Piped(Generating):
    def __init__(self) -> None:
        read, write = os.pipe()
        os.write(write, b"".join(b"%d\n" % k for k in range(100)))
        os.close(write)
        self.stream = os.fdopen(read, "rb")

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(NUM):
            yield sample(int(self.stream.readline()))

    def close(self) -> None:
        self.stream.close()


class Nested(Data):
    def __init__(self, depth: int = 5000) -> None:
        super().__init__(lambda: 0)
        for _ in range(depth):
            inner = copy.copy(self)
            vars(self).update(inner=inner)


class ItsOwnIterator:
    def __iter__(self) -> "ItsOwnIterator":
        return self

    def __next__(self) -> Tensor:
        return sample(1)


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: Repeating(Data(lambda: 0)), r"\(Data\) goes on in `Repeating.iterator`"),
        (lambda: DataLoader(Generating(), batch_size=None), r"\(Generating\) goes on in `Generating.stream`"),
        (lambda: DataLoader(Mapped(), batch_size=None), r"\(Mapped\) goes on in `Mapped.stream`"),
        (lambda: DataLoader(ChainDataset([Generating()])), r"\(ChainDataset\) goes on in `Generating.stream`"),
        (lambda: DataLoader(Nested()), r"\(Nested\) goes on in `Nested.inner` \(nested too deep\)"),
        (ItsOwnIterator, r"\(ItsOwnIterator\) is an iterator"),
    ],
)
def test_check_data__error(make: Callable[[], Any], place: str, tmp_path: Path) -> None:
    """What goes on in something that has no copy is refused before training, by name."""
    net = Net()
    with pytest.raises(MisconfigurationException, match=place + ".*batches read to score weights would be lost"):
        fits.trainer(tmp_path, fits.drive(warmup_epochs=1, sparsity=0.5)).fit(net, make())
    assert net.seen == []


def test_check_data__pipe_error(tmp_path: Path) -> None:
    data = Piped()
    with pytest.raises(MisconfigurationException, match=r"\(Piped\) goes on in `Piped.stream` \(BufferedReader\)"):
        fits.trainer(tmp_path, fits.drive(sparsity=0.5)).fit(Net(), DataLoader(data, batch_size=None))
    data.close()


STATEFUL = ["loader", "stateful", "stream", "counter", "sampler_epoch", "batch_sampler", "dict"]


class AtScoring(Net):
    """Calls something in the middle of the rounds."""

    calls = 0
    on_scoring: Callable[[Any], None]  # of the class, since what the module itself has is copied for scoring

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.fit_loop.epoch_loop.batch_progress.current.started == 0 or self.calls:
            self.calls += 1
        if self.calls == 5:
            type(self).on_scoring(self)
        return super().training_step(batch, batch_idx)


def state_of(value: Any) -> Any:
    """Note what is in the attributes of the data, however deep."""
    if isinstance(value, CombinedLoader | DataLoader | Dataset | Sampler | Resumable):
        return {
            name: state_of(attribute) for name, attribute in vars(value).items() if name not in ("_iterator", "live")
        }
    if isinstance(value, dict):
        return {name: state_of(entry) for name, entry in value.items()}
    return value.count if isinstance(value, Counting) else repr(value)


@pytest.mark.parametrize("name", STATEFUL)
def test_interrupt__data_as_before(name: str, tmp_path: Path) -> None:
    """An interrupt in the rounds finds the data as training left them, and so does whoever saves there."""
    loader, states = DATA[name](tmp_path), []

    def interrupt(net: Net) -> None:
        states.append(state_of(loader))
        raise KeyboardInterrupt

    class Before(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            states.append(state_of(loader))

    trainer = fits.trainer(tmp_path, Before(), fits.drive(warmup_epochs=0, rounds=8, sparsity=0.5))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(type("Interrupting", (AtScoring,), {"on_scoring": interrupt})(), loader)
    assert len(states) == 2
    assert states[0] == states[1] == state_of(loader)


@pytest.mark.parametrize("name", ["loader", "stateful", "dict"])
def test_save_while_scoring__places(name: str, tmp_path: Path) -> None:
    """A checkpoint that is saved in the rounds has the places from before them."""
    saved: list[Any] = []

    def save(net: Net) -> None:
        saved.append(net.trainer.fit_loop._combined_loader._state_dicts())

    class Before(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            saved.append(copy.deepcopy(trainer.fit_loop._combined_loader._state_dicts()))

    trainer = fits.trainer(tmp_path, Before(), fits.drive(warmup_epochs=0, rounds=8, sparsity=0.5), max_epochs=1)
    trainer.fit(type("Saving", (AtScoring,), {"on_scoring": save})(), DATA[name](tmp_path))
    assert len(saved) == 2
    assert saved[0] == saved[1] != []


# Which batches scoring reads.


class Samples(IterableDataset[Any]):
    """An endless-looking stream without a length, restarted by each ``iter``."""

    def __init__(self, num_batches: int = 4) -> None:
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[Any]:
        return (sample for index, sample in enumerate(fits.dataset(16 * self.num_batches)) if index >= 0)


class Reiterable:
    """Not a DataLoader, but it gives batches."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list(fits.loader()))


def two_loaders(shape: str, mode: str) -> Any:
    first, second = fits.loader(48), fits.loader(32)
    loaders = {"dict": {"a": first, "b": second}, "list": [first, second]}[shape]
    return CombinedLoader(loaders, mode)


class PairModule(ConvModule):
    """Trains on a pair of batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = batch.values() if isinstance(batch, dict) else batch
        self.calls.append(first[0][:, 0, 0, 0].clone())
        return F.cross_entropy(self(first[0]), first[1]) + (
            0.0 if second is None else F.cross_entropy(self(second[0]), second[1])
        )


@pytest.mark.parametrize(
    ("module", "data"),
    [
        (ConvModule, lambda: fits.loader()),
        (ConvModule, lambda: fits.loader(num_workers=1, persistent_workers=True)),
        (ConvModule, lambda: fits.loader(num_workers=2)),
        (ConvModule, lambda: DataLoader(Samples(), batch_size=16)),
        (ConvModule, lambda: DataLoader(Samples(), batch_size=16, num_workers=1, persistent_workers=True)),
        (ConvModule, lambda: Reiterable()),
        (PairModule, lambda: {"a": fits.loader(48), "b": fits.loader(32)}),
        (PairModule, lambda: [fits.loader(48), fits.loader(32)]),
        (PairModule, lambda: two_loaders("dict", "min_size")),
        (PairModule, lambda: two_loaders("list", "max_size")),
    ],
    ids=[
        "plain",
        "persistent",
        "workers",
        "stream",
        "stream_in_worker",
        "any_iterable",
        "dict",
        "list",
        "min_size",
        "max_size",
    ],
)
@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_training_batches(tmp_path: Path, module: Any, data: Any, warmup_epochs: int) -> None:
    """Scoring reads the loader's own order from its first batch, cycled, and training loses none of its batches."""
    plain = module()
    fits.trainer(tmp_path, max_epochs=2).fit(plain, data())
    trained = [batch.tolist() for batch in plain.calls]
    epoch = trained[: len(trained) // 2]

    scored = module()
    rounds = len(epoch) + 2
    callback = fits.drive(warmup_epochs=warmup_epochs, rounds=rounds, bn_batches=0)
    fits.trainer(tmp_path, callback, max_epochs=2).fit(scored, data())
    calls = [batch.tolist() for batch in scored.calls]
    start = warmup_epochs * len(epoch)
    assert calls[start : start + rounds] == (epoch + epoch)[:rounds]
    assert calls[:start] + calls[start + rounds :] == trained
    assert callback.pruned


def test_training_batches__limit(tmp_path: Path) -> None:
    """``limit_train_batches`` holds for scoring, too."""
    module = ConvModule()
    callback = fits.drive(warmup_epochs=0, rounds=4, bn_batches=0)
    fits.trainer(tmp_path, callback, max_epochs=1, limit_train_batches=2).fit(module, fits.loader())
    first, second = module.calls[0].tolist(), module.calls[1].tolist()
    assert [call.tolist() for call in module.calls] == [first, second] * 3


def test_training_batches__transfer_hooks(tmp_path: Path) -> None:
    """A module that moves or augments its batches on the way does so for scoring as well."""

    class Doubled(ConvModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 1, batch[1]

    module = Doubled()
    fits.trainer(tmp_path, fits.drive(warmup_epochs=0, rounds=1, bn_batches=0), max_epochs=1).fit(module, fits.loader())
    assert torch.equal(module.calls[0], next(iter(fits.loader()))[0][:, 0, 0, 0] * 2 + 1)


class Spent(IterableDataset[Any]):
    """A stream that can be read only once."""

    def __init__(self) -> None:
        self.samples = iter(fits.dataset())

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.samples)


def test_training_batches__iterator_error(tmp_path: Path) -> None:
    """Reading ahead in a stream that cannot be restarted would take batches away from training: refused."""
    with pytest.raises(MisconfigurationException, match=r"\(Spent\) is an iterator: .*`num_workers=1`"):
        fits.trainer(tmp_path, fits.drive(warmup_epochs=0)).fit(ConvModule(), DataLoader(Spent(), batch_size=16))
