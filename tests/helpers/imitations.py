"""Small imitations of networks, layers and batches as other libraries have them; none of these libraries is needed."""

import copy
from collections import UserDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_CLASSES = 3
NUM_WORDS = 20


class Trained(pl.LightningModule):
    """A module whose Adam holds all parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(limit: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(seed))


def loader(*tensors: Tensor, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), **{"batch_size": 8, **kwargs})


class Classifier(Trained):
    """Linear layers; a batch is a tuple of inputs and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 32, 32, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(normal(24, 8), integers(NUM_CLASSES, 24))


# Settings as hydra gives them.


class ListConfig(Sequence[Any]):
    """As omegaconf has it: a sequence that prints like a list, but is none."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = tuple(items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(list(self._items))


# Transformers.


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight is stored with the inputs first."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)
        self.c_fc, self.c_out = Conv1D(4 * width, width), Conv1D(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (head.unflatten(-1, (2, -1)).transpose(1, 2) for head in self.c_attn(self.ln_1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


@dataclass
class Output:
    """As transformers returns it: entries that are `None` where they do not apply."""

    logits: Tensor
    loss: Tensor | None = None


class GPT2(nn.Module):
    """A language model of `Conv1D` whose head is tied to the embedding, and which computes its own loss."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(NUM_WORDS, width), nn.Embedding(16, width)
        self.h = nn.ModuleList(_Block(width) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, NUM_WORDS, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if labels is None:
            return Output(logits)
        return Output(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


class Language(Trained):
    """Trains as the tutorials of transformers do: `self(**batch).loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2()

    def forward(self, **inputs: Any) -> Output:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        assert loss is not None
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        ids = integers(NUM_WORDS, 24, 7)
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
        return DataLoader(rows, batch_size=8)  # type: ignore[arg-type]


class Features(UserDict[str, Tensor]):
    """As transformers' BatchFeature and BatchEncoding: a mapping that is no dict, and can be moved."""

    def to(self, *args: Any, **kwargs: Any) -> "Features":
        return Features({key: value.to(*args, **kwargs) for key, value in self.items()})


@dataclass
class Fields:
    """A batch that is a dataclass."""

    inputs: Tensor
    labels: Tensor


class OfEntries(Classifier):
    """Takes its batch apart by name."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        entries = vars(batch) if isinstance(batch, Fields) else batch
        return F.cross_entropy(self(entries["inputs"]).float(), entries["labels"])

    def train_dataloader(self) -> DataLoader[Any]:
        def joined(rows: Any) -> Any:
            inputs, labels = zip(*rows, strict=True)
            return self.kind(inputs=torch.stack(inputs), labels=torch.stack(labels))

        return loader(normal(24, 8), integers(NUM_CLASSES, 24), collate_fn=joined)


# Recurrent layers.


class Recurrent(Trained):
    """An embedding, a recurrent layer over padded or packed sequences, a linear head."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, *, packed: bool = False, **settings: Any) -> None:
        super().__init__()
        self.packed = packed
        self.embedding = nn.Embedding(NUM_WORDS, 8)
        self.rnn = kind(8, 24, batch_first=True, **settings)
        self.head = nn.Linear(24 * (1 + self.rnn.bidirectional), NUM_CLASSES)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        x: Any = self.embedding(words)
        if self.packed:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        x, _ = self.rnn(x)
        if self.packed:
            x, _ = nn.utils.rnn.pad_packed_sequence(x, batch_first=True)
        return self.head(x.mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words, lengths, labels = batch
        return F.cross_entropy(self(words, lengths), labels)

    def train_dataloader(self) -> DataLoader[Any]:
        lengths = torch.tensor([6, 5, 4, 3, 6, 5, 4, 3] * 3)
        return loader(integers(NUM_WORDS, 24, 6), lengths, integers(NUM_CLASSES, 24, seed=1))


# Graphs.


class Linear(nn.Module):
    """As in torch_geometric: a linear layer that is not torch's."""

    __module__ = "torch_geometric.nn.dense.linear"

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels) / in_channels**0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Graphs:
    """As torch_geometric's Batch: several graphs as one, with tensors in attributes; no container that torch knows."""

    def __init__(self, **tensors: Tensor) -> None:
        self.__dict__.update(tensors)

    def to(self, *args: Any, **kwargs: Any) -> "Graphs":
        return Graphs(**{name: value.to(*args, **kwargs) for name, value in vars(self).items()})

    @classmethod
    def random(cls, seed: int, nodes: int = 6, graphs: int = 4) -> "Graphs":
        count = nodes * graphs
        first = integers(nodes, 2, 3 * count, seed=seed) + nodes * torch.arange(graphs).repeat_interleave(3 * nodes)
        return cls(
            x=normal(count, 8, seed=seed),
            edge_index=first,
            batch=torch.arange(graphs).repeat_interleave(nodes),
            y=integers(NUM_CLASSES, graphs, seed=seed),
        )


class _GraphConvolution(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.lin = Linear(channels_in, channels_out, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels_out))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        x = self.lin(x)
        return x + torch.zeros_like(x).index_add(0, target, x.index_select(0, source)) + self.bias


class GraphNetwork(Trained):
    """Two graph convolutions, a mean over each graph, a linear head; `forward` takes the parts of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _GraphConvolution(8, 24), _GraphConvolution(24, 24)
        self.head = Linear(24, NUM_CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.second(self.first(x, edge_index).relu(), edge_index).relu()
        sums = x.new_zeros(int(batch.max()) + 1, x.shape[1]).index_add(0, batch, x)
        return self.head(sums / batch.bincount()[:, None])

    def training_step(self, batch: Graphs, batch_idx: int) -> Tensor:
        parts: Any = batch
        return F.cross_entropy(self(parts.x, parts.edge_index, parts.batch), parts.y)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([Graphs.random(seed) for seed in range(3)], batch_size=None)  # type: ignore[arg-type]


class SparseGraphNetwork(Classifier):
    """As Kipf and Welling have it: `forward` takes the nodes and a sparse matrix of who is whose neighbour."""

    def __init__(self, layout: torch.layout = torch.sparse_coo) -> None:
        super().__init__()
        self.layout = layout
        self.net = mlp(8, 24, NUM_CLASSES)

    def forward(self, nodes: Tensor, neighbours: Tensor) -> Tensor:
        hidden = self.net[0](torch.sparse.mm(neighbours, nodes)).relu()
        return self.net[2](torch.sparse.mm(neighbours, hidden))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        nodes, neighbours, labels = batch
        return F.cross_entropy(self(nodes, neighbours), labels)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        neighbours = (torch.rand(12, 12, generator=generator) > 0.7).float() + torch.eye(12)
        nodes, labels = torch.randn(12, 8, generator=generator), torch.randint(NUM_CLASSES, (12,), generator=generator)
        return DataLoader([(nodes, neighbours.to_sparse(layout=self.layout), labels)] * 3, batch_size=None)  # type: ignore[arg-type]


class Fourier(Classifier):
    """As Fourier neural operators: the first parameter is complex, and the layers between are of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.modes = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.net = mlp(8, 24, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[0](x)
        modes = torch.fft.rfft(x)[:, :3] * self.modes
        return self.net[2](x + torch.fft.irfft(modes, n=24))


STORED: dict[str, Any] = {
    "float8_e4m3fn": lambda weight: weight.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda weight: weight.to(torch.float8_e5m2),
    "sparse_coo": lambda weight: weight.to_sparse(),
    "sparse_csr": lambda weight: weight.to_sparse_csr(),
}


class Stored(Classifier):
    """Its first matrix is frozen, and in float8 or sparse."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        weight = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
        self.stored = nn.Parameter(STORED[kind](weight), requires_grad=False)
        self.net = mlp(8, 24, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        stored = self.stored if self.stored.layout != torch.strided else self.stored.to(x.dtype)
        return self.net((stored @ x.T).T)


# Mixtures of experts.


class Experts(nn.Module):
    """As in Mixtral: the weights of all experts in parameters of three dimensions."""

    def __init__(self, width: int = 16, hidden: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * hidden, width) / width**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, width, hidden) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        result = torch.zeros_like(x)
        for expert in range(len(self.down_proj)):
            token, place = torch.where(chosen == expert)
            gate, up = F.linear(x[token], self.gate_up_proj[expert]).chunk(2, -1)
            output = F.linear(F.silu(gate) * up, self.down_proj[expert]) * weights[token, place, None]
            result = result.index_add(0, token, output)
        return x + result


class Mixture(Classifier):
    """A linear layer, experts, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), Experts(), nn.Linear(16, NUM_CLASSES))


# Detection.


class _Detecting(nn.Module):
    """As in torchvision: lists of images of any size; losses by name in train mode, detections otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.classes, self.boxes = nn.Linear(16, NUM_CLASSES), nn.Linear(16, 4)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if any(image.ndim != 3 for image in images):
            raise ValueError(f"images is expected to be a list of 3d tensors, got {[image.shape for image in images]}")
        size = [max(image.shape[axis] for image in images) for axis in (1, 2)]
        padded = [F.pad(image, (0, size[1] - image.shape[2], 0, size[0] - image.shape[1])) for image in images]
        features = self.body(torch.stack(padded)).mean((2, 3))
        classes, boxes = self.classes(features), self.boxes(features)
        if not self.training:
            found = zip(classes.softmax(-1), boxes, strict=True)
            return [{"scores": line.max(-1).values, "labels": line.argmax(-1), "boxes": box} for line, box in found]
        if targets is None:
            raise ValueError("targets should not be none when in training mode")
        goal = torch.stack([target["boxes"] for target in targets])
        labels = torch.stack([target["labels"] for target in targets])
        return {"classes": F.cross_entropy(classes, labels), "boxes": F.smooth_l1_loss(boxes, goal)}


class Detector(Trained):
    """A batch is a tuple of images and a tuple of targets."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _Detecting()

    def forward(self, images: Any, targets: Any = None) -> Any:
        return self.model(images, targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model(list(images), [dict(target) for target in targets])
        return sum(losses.values())  # type: ignore[no-any-return]

    def train_dataloader(self) -> DataLoader[Any]:
        rows = [
            (
                normal(3, 12, 12 + index % 3, seed=index),
                {"boxes": normal(4, seed=index).abs(), "labels": torch.tensor(index % 3)},
            )
            for index in range(12)
        ]
        return DataLoader(rows, batch_size=4, collate_fn=lambda rows: tuple(zip(*rows, strict=True)))  # type: ignore[arg-type]


# Networks beside the one that is trained.


class DQN(pl.LightningModule):
    """As in the courses: a network that is trained, and a copy of it from some steps ago that gives the goals."""

    def __init__(self, *, sync_every: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp(4, 32, 32, 2)
        self.target_net = copy.deepcopy(self.net)
        self.sync_every = sync_every

    def forward(self, states: Tensor) -> Tensor:
        return self.net(states)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        states, actions, rewards, following = batch
        if self.global_step and self.global_step % self.sync_every == 0:
            self.target_net.load_state_dict(self.net.state_dict())
        values = self.net(states).gather(1, actions[:, None])[:, 0]
        with torch.no_grad():
            goals = rewards + 0.9 * self.target_net(following).max(1).values
        return F.mse_loss(values, goals)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), 1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(normal(24, 4), integers(2, 24), normal(24), normal(24, 4, seed=1))


class Distilled(pl.LightningModule):
    """A student that is trained towards what a teacher says."""

    def __init__(self, *, holds_teacher: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.teacher, self.student = mlp(8, 64, 4), mlp(8, 32, 4)
        self.holds_teacher = holds_teacher

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            goal = self.teacher(batch[0]).softmax(-1)
        return F.cross_entropy(self(batch[0]), goal)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained: nn.Module = self if self.holds_teacher else self.student
        return torch.optim.Adam(trained.parameters(), 1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(normal(24, 8))


class MeanTeacher(Classifier):
    """Keeps a frozen moving average of its network as a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for mean, now in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(now, 0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), 1e-2)


class OwnEMA(pl.Callback):
    """Keeps a moving average, validates with it, and leaves it in the module when training ends."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for name, value in pl_module.state_dict().items():
            self.average[name].lerp_(value, 0.1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average:
            self.kept = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
            pl_module.load_state_dict(self.average)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.kept:
            pl_module.load_state_dict(self.kept)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.load_state_dict(self.average)


# Low-rank adapters.


class Adapted(nn.Module):
    """As in peft: a frozen linear layer, and a product of two small ones of which the second starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class LowRank(Classifier):
    """A frozen network with adapters, under a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Adapted(8, 32), nn.ReLU(), Adapted(32, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES))
