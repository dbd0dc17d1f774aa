"""Recurrent layers and cells are followed for as many steps as change anything, gates and all."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from followed import active_counts, agree, all_active, weights_that_matter
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_drive.network import paths


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.recurrent, self.last = nn.Linear(4, 64), kind(64, 64, batch_first=True), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(self.first(x))[0])


RECURRENT: dict[str, Callable[..., nn.RNNBase]] = {
    "rnn": nn.RNN,
    "relu": partial(nn.RNN, nonlinearity="relu", num_layers=2),
    "gru": partial(nn.GRU, batch_first=True),
    "gru_both_ways": partial(nn.GRU, bidirectional=True, num_layers=2),
    "lstm": nn.LSTM,
    "lstm_both_ways": partial(nn.LSTM, bidirectional=True, num_layers=2, batch_first=True),
    "lstm_projected": partial(nn.LSTM, proj_size=2),
}


class Remembers(nn.Module):
    """A recurrent layer, without biases, and a linear one."""

    def __init__(self, make: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = make(3, 4, bias=False)
        ways = 1 + self.recurrent.bidirectional
        self.last = nn.Linear(ways * (self.recurrent.proj_size or 4), 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(x)[0])


class RemembersByCells(Remembers):
    """The same, written as a loop of cells."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__(nn.RNN)
        self.recurrent = cell(3, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x:
            state = self.recurrent(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.last(torch.stack(outputs))


class RemembersPacked(Remembers):
    """The same for sequences of different lengths."""

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [len(x)] * x.shape[1])
        outputs, last = self.recurrent(packed)
        last = last[0] if isinstance(last, tuple) else last
        return self.last(pad_packed_sequence(outputs)[0]) + 0 * last.sum()


@pytest.mark.parametrize("density", [0.15, 0.3, 0.6])
@pytest.mark.parametrize(
    "make",
    [
        *(partial(Remembers, make) for make in RECURRENT.values()),
        *(partial(RemembersByCells, cell) for cell in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)),
        *(partial(RemembersPacked, make) for make in (nn.RNN, nn.GRU, nn.LSTM)),
    ],
    ids=[*RECURRENT, "rnn_cell", "gru_cell", "lstm_cell", "rnn_packed", "gru_packed", "lstm_packed"],
)
def test_weights_that_matter_in_long_sequences_are_active(make: Callable[[], nn.Module], density: float) -> None:
    """The example has one step: weights between steps matter in sequences that are longer."""
    for seed in range(4):
        torch.manual_seed(seed)
        module = make()
        masks = {name: torch.rand(value.shape) < density for name, value in module.named_parameters()}
        first = (1, 1, 3)
        expected = weights_that_matter(module, masks, torch.zeros(12, *first[1:]))
        if getattr(module.recurrent, "batch_first", False):
            expected = weights_that_matter(module, masks, torch.zeros(1, 12, 3))
        active = paths.active_masks(module, masks, torch.zeros(first))
        assert agree(active, expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("is_biased", [False, True])
def test_gates_alone_let_nothing_in(kind: type[nn.RNNBase], is_biased: bool) -> None:
    """A gate alone lets nothing in, but if a bias holds what it opens."""
    module = nn.ModuleDict({"recurrent": kind(2, 2, bias=is_biased)})
    module.forward = lambda x: module["recurrent"](x)[0]
    masks = {
        name: torch.ones_like(value, dtype=torch.bool) for name, value in module.named_parameters() if "weight" in name
    }
    if kind is nn.RNN:
        masks["recurrent.weight_ih_l0"][:] = False
        assert set(active_counts(module, masks, torch.zeros(1, 1, 2)).values()) == {0}
        return
    new = slice(4, 6)  # of the gates of both layers, the one that is no gate: g of an LSTM, n of a GRU
    for mask in masks.values():
        mask[new] = False
    active = active_counts(module, masks, torch.zeros(1, 1, 2))
    assert any(active.values()) == is_biased


def test_recurrent_layers_pass_paths_on() -> None:
    module = Recurrent(nn.LSTM)
    masks = {
        name: torch.ones_like(value, dtype=torch.bool) for name, value in module.named_parameters() if value.ndim > 1
    }
    assert all_active(module, masks, torch.zeros(1, 5, 4))
    masks["first.weight"][:] = False
    assert not any(mask.any() for mask in paths.active_masks(module, masks, torch.zeros(1, 5, 4)).values())
