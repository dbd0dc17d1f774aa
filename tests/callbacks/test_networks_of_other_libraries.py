"""Networks that people train, as other libraries build them: what is pruned is what is trained, counted by hand."""

import ast
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import fits
import imitations
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from imitations import ListConfig
from torch import Tensor, nn

from lightning_drive import (
    SNIP,
    DRIVEPruningCallback,
    IMPPruningCallback,
    Magnitude,
    PruningReport,
    SNIPPruningCallback,
    SynFlow,
    SynFlowPruningCallback,
    find_masks,
)
from lightning_drive.callbacks.hooks import PruningCallback

SPARSITY = 0.8

CALLBACKS: dict[str, Any] = {
    "DRIVE": lambda **settings: DRIVEPruningCallback(
        **{"sparsity": SPARSITY, "warmup_epochs": 1, "rounds": 4, **settings}
    ),
    "SNIP": lambda **settings: SNIPPruningCallback(**{"sparsity": SPARSITY, **settings}),
    "IMP": lambda **settings: IMPPruningCallback(
        **{"sparsity": SPARSITY, "cycles": 2, "epochs_per_cycle": 1, **settings}
    ),
}
EACH = pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)


class Fitted(NamedTuple):
    """A run that is over."""

    trainer: pl.Trainer
    said: list[str]
    """Every warning, and those of the report."""
    report: PruningReport


def fit(
    tmp_path: Path, module: pl.LightningModule, callback: PruningCallback, *others: pl.Callback, **kwargs: Any
) -> Fitted:
    """Train, and say what was said; what must not be said is for the tests to see."""
    trainer = fits.trainer(tmp_path, callback, *others, **{"max_epochs": 3, **kwargs})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    assert callback.report is not None
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return Fitted(trainer, [*said, *callback.report.warnings], callback.report)


def zeros(tensors: Iterable[Tensor]) -> float:
    """Return the share of exact zeros; 0 without tensors."""
    flat = torch.cat([torch.ones(0), *(tensor.detach().float().flatten() for tensor in tensors)])
    return float((flat == 0).sum()) / max(1, flat.numel())


def assert_pruned(module: pl.LightningModule, callback: PruningCallback, *names: str) -> None:
    """Assert that these parameters, in any order, and no others have the zeros that were asked for."""
    parameters = dict(module.named_parameters())
    assert sorted(callback.masks) == sorted(names)
    num_weights = sum(parameters[name].numel() for name in names)
    num_kept = sum(int(parameters[name].count_nonzero()) for name in names)
    assert num_kept == pytest.approx(num_weights * (1 - SPARSITY), abs=len(names))
    assert callback.masks.hold_for(module)
    assert zeros(parameter for name, parameter in parameters.items() if name not in names and parameter.ndim > 1) < 0.1


def assert_measured(report: PruningReport) -> None:
    """Assert that paths were followed, and found what is kept to be on one, or nearly all of it."""
    assert report.effective_sparsity is not None, report.warnings
    assert report.sparsity <= report.effective_sparsity < 0.5 + report.sparsity / 2


def pasted(texts: Iterable[str], argument: str, about: str) -> list[str]:
    """Return the patterns that a warning about something offers to paste."""
    offers = [match for text in texts if about in text for match in re.findall(rf"{argument}=(\[.*?\])", text)]
    assert offers, f"nothing to paste as `{argument}` was said of {about}"
    patterns = ast.literal_eval(offers[0])
    assert patterns
    assert all(isinstance(pattern, str) for pattern in patterns)
    return patterns  # type: ignore[no-any-return]


# Settings as hydra gives them.


@pytest.mark.parametrize(
    "kind",
    [ListConfig, tuple, set, np.array, lambda items: dict.fromkeys(items).keys()],
    ids=["ListConfig", "tuple", "set", "array", "keys"],
)
def test_hydra__patterns_in_any_container(tmp_path: Path, kind: Any) -> None:
    module = imitations.Classifier()
    callback = CALLBACKS["DRIVE"](include=kind(["net.*"]), exclude=kind(["net.0.*"]))
    fit(tmp_path, module, callback)
    assert_pruned(module, callback, "net.2.weight", "net.4.weight")


def test_hydra__numbers_of_numpy_are_kept_as_plain_ones(tmp_path: Path) -> None:
    module = imitations.Classifier()
    settings = {"sparsity": np.float32(0.75), "warmup_epochs": np.int64(1), "rounds": np.int32(4)}
    callback = DRIVEPruningCallback(**settings, include=ListConfig(["net.*"]))  # type: ignore[arg-type]
    trainer = fit(tmp_path, module, callback).trainer
    assert type(callback.sparsity) is float
    assert type(callback.warmup_epochs) is int
    assert type(callback.include) in (list, tuple)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    torch.load(tmp_path / "plain.ckpt", weights_only=True)
    again = DRIVEPruningCallback(sparsity=0.75, warmup_epochs=1, rounds=4, include=["net.*"])
    fits.trainer(tmp_path, again, max_epochs=4).fit(imitations.Classifier(), ckpt_path=tmp_path / "plain.ckpt")
    assert again.masks.digest() == callback.masks.digest()


def test_hydra__a_string_is_no_list_of_patterns() -> None:
    with pytest.raises(TypeError, match="include"):
        DRIVEPruningCallback(sparsity=0.5, include="net.*")  # type: ignore[arg-type]


# GPT-2 and its like.

CONV1D = [f"model.h.{block}.{layer}.weight" for block in (0, 1) for layer in ("c_attn", "c_proj", "c_fc", "c_out")]


@EACH
def test_gpt2__layers_of_transformers_are_pruned(tmp_path: Path, make: Any) -> None:
    module, callback = imitations.Language(), make()
    report = fit(tmp_path, module, callback).report
    assert_pruned(module, callback, *CONV1D)  # the head is the embedding's table, and stays dense
    assert_measured(report)
    assert report.multiply_adds is not None


def test_gpt2__the_share_of_all_weights(tmp_path: Path) -> None:
    module, callback = imitations.Language(), CALLBACKS["DRIVE"]()
    fitted = fit(tmp_path, module, callback)
    pruned = sum(int((parameter == 0).sum()) for name, parameter in module.named_parameters() if name in callback.masks)
    share = pruned / sum(parameter.numel() for parameter in module.parameters())
    assert fitted.report.overall_sparsity == pytest.approx(share, abs=0.02)
    assert fitted.report.overall_sparsity < fitted.report.sparsity
    logged = fitted.trainer.callback_metrics["pruning/overall_sparsity"].item()
    assert logged == pytest.approx(fitted.report.overall_sparsity)
    assert f"{fitted.report.overall_sparsity:.2%}" in str(fitted.report)


# Recurrent layers.


def recurrent_weights(layers: int = 1, bidirectional: bool = False) -> list[str]:
    ends = ["", "_reverse"] if bidirectional else [""]
    return [f"rnn.weight_{kind}_l{n}{end}" for n in range(layers) for end in ends for kind in ("ih", "hh")]


@EACH
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent__weights_are_pruned(tmp_path: Path, kind: Any, make: Any) -> None:
    module, callback = imitations.Recurrent(kind), make()
    fit(tmp_path, module, callback)
    assert_pruned(module, callback, *recurrent_weights(), "head.weight")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent__packed_both_ways_in_layers(tmp_path: Path, kind: Any) -> None:
    module = imitations.Recurrent(kind, packed=True, num_layers=2, bidirectional=True)
    callback = CALLBACKS["DRIVE"]()
    fit(tmp_path, module, callback)
    assert_pruned(module, callback, *recurrent_weights(2, bidirectional=True), "head.weight")


def test_recurrent__what_cannot_be_counted_is_named_and_no_useless_remedy_given(tmp_path: Path) -> None:
    fitted = fit(tmp_path, imitations.Recurrent(), CALLBACKS["DRIVE"]())
    named = [text for text in fitted.said if "rnn.weight_hh_l0" in text and "ultiply-adds" in text]
    assert bool(named) == (fitted.report.multiply_adds is None)
    assert not [text for text in fitted.said if "example_input_array" in text]
    assert fitted.report.overall_sparsity > 0.6  # embedding and biases stay dense


# Graphs.

GRAPH = ("first.lin.weight", "second.lin.weight", "head.weight")


@EACH
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_graph__layers_of_torch_geometric_are_pruned(tmp_path: Path, precision: str, make: Any) -> None:
    module, callback = imitations.GraphNetwork(), make()
    fit(tmp_path, module, callback, precision=precision)
    assert_pruned(module, callback, *GRAPH)


def test_graph__paths_follow_what_training_calls_the_network_with(tmp_path: Path) -> None:
    fitted = fit(tmp_path, imitations.GraphNetwork(), CALLBACKS["DRIVE"]())
    assert_measured(fitted.report)
    assert fitted.report.multiply_adds is not None


def test_graph__synflow(tmp_path: Path) -> None:
    module, callback = imitations.GraphNetwork(), SynFlowPruningCallback(sparsity=SPARSITY, rounds=4)
    fit(tmp_path, module, callback)
    assert_pruned(module, callback, *GRAPH)


@EACH
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_graph__neighbours_in_a_sparse_matrix(tmp_path: Path, layout: Any, precision: str, make: Any) -> None:
    module, callback = imitations.SparseGraphNetwork(layout), make(scope="layerwise")
    fitted = fit(tmp_path, module, callback, precision=precision)
    assert_pruned(module, callback, "net.0.weight", "net.2.weight")
    assert_measured(fitted.report)
    assert fitted.report.other_multiply_adds is None
    assert [text for text in fitted.said if "sparse_addmm" in text]


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_graph__neighbours_in_a_sparse_matrix__synflow(tmp_path: Path, layout: Any) -> None:
    module, callback = (
        imitations.SparseGraphNetwork(layout),
        SynFlowPruningCallback(sparsity=SPARSITY, rounds=4, scope="layerwise"),
    )
    assert_measured(fit(tmp_path, module, callback).report)
    assert_pruned(module, callback, "net.0.weight", "net.2.weight")


# Complex numbers.


@EACH
def test_fourier__a_complex_parameter_comes_first(tmp_path: Path, make: Any) -> None:
    module, callback = imitations.Fourier(), make(scope="layerwise")
    fitted = fit(tmp_path, module, callback)
    assert_pruned(module, callback, "net.0.weight", "net.2.weight")
    assert_measured(fitted.report)
    assert fitted.report.other_multiply_adds is None
    assert [text for text in fitted.said if "`aten::_fft_r2c`" in text]


# Frozen parameters of kinds that cannot be trained, before what is.


@EACH
@pytest.mark.parametrize("kind", imitations.STORED)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_stored__frozen_first_layer(tmp_path: Path, kind: str, make: Any) -> None:
    module, callback = imitations.Stored(kind), make(scope="layerwise")
    fitted = fit(tmp_path, module, callback)
    assert sorted(callback.masks) == ["net.0.weight", "net.2.weight"]
    assert zeros([module.net[0].weight, module.net[2].weight]) == pytest.approx(SPARSITY, abs=0.01)
    assert_measured(fitted.report)


@pytest.mark.parametrize("kind", imitations.STORED)
@pytest.mark.parametrize("method", [SNIP(), SynFlow(rounds=2), Magnitude()], ids=lambda method: type(method).__name__)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_stored__find_masks(kind: str, method: Any) -> None:
    module, batch = imitations.Stored(kind), (torch.randn(4, 8), torch.zeros(4, dtype=torch.long))
    masks = find_masks(
        module, method, sparsity=0.5, batches=[batch], loss_fn=lambda net, part: F.cross_entropy(net(part[0]), part[1])
    )
    assert sorted(masks) == ["net.0.weight", "net.2.weight"]
    assert masks.num_kept == masks.num_prunable // 2


# Mixtures of experts.

ROUTERS = ("net.0.weight", "net.1.gate.weight", "net.2.weight")
EXPERTS = ("net.1.gate_up_proj", "net.1.down_proj")


def test_mixture__what_stays_dense_is_named_and_can_be_pasted(tmp_path: Path) -> None:
    module, callback = imitations.Mixture(), CALLBACKS["DRIVE"]()
    fitted = fit(tmp_path, module, callback)
    assert_pruned(module, callback, *ROUTERS)
    assert fitted.report.overall_sparsity < 0.2
    patterns = pasted(fitted.said, "include", "net.1.gate_up_proj")

    module, callback = imitations.Mixture(), CALLBACKS["DRIVE"](include=patterns)
    fitted = fit(tmp_path, module, callback)
    assert set(EXPERTS) <= set(callback.masks)
    assert zeros(dict(module.named_parameters())[name] for name in EXPERTS) > 0.6
    assert fitted.report.overall_sparsity > 0.6


@EACH
def test_mixture__everything(tmp_path: Path, make: Any) -> None:
    module, callback = imitations.Mixture(), make(include=["*"], scope="layerwise")
    fitted = fit(tmp_path, module, callback)
    assert_pruned(module, callback, *ROUTERS, *EXPERTS)
    assert not [text for text in fitted.said if "include=" in text]


# Detection.

DETECTOR = ("model.body.0.weight", "model.body.2.weight", "model.classes.weight", "model.boxes.weight")


@EACH
def test_detector__lists_of_images_and_targets(tmp_path: Path, make: Any) -> None:
    module, callback = imitations.Detector(), make()
    fitted = fit(tmp_path, module, callback)
    assert_pruned(module, callback, *DETECTOR)
    assert_measured(fitted.report)
    assert not [text for text in fitted.said if "example_input_array" in text]


# Networks beside the one that is trained.

ONLINE = ("net.0.weight", "net.2.weight", "net.4.weight")


@EACH
def test_target__the_online_network_is_pruned_not_its_target(tmp_path: Path, make: Any) -> None:
    module, callback = imitations.DQN(sync_every=1000), make()
    fitted = fit(tmp_path, module, callback)
    assert zeros(module.target_net.parameters()) == 0.0
    assert_pruned(module, callback, *ONLINE)
    assert not [text for text in fitted.said if "collapse" in text]


@EACH
def test_target__becomes_sparse_when_it_is_updated(tmp_path: Path, make: Any) -> None:
    module, callback = imitations.DQN(sync_every=1), make()
    fit(tmp_path, module, callback, max_epochs=4)
    weights = dict(module.target_net.named_parameters())
    for name, mask in callback.masks.items():
        assert not weights[name.removeprefix("net.")][~mask].any()


@EACH
def test_distillation__the_teacher_stays_as_it_is(tmp_path: Path, make: Any) -> None:
    module, callback = imitations.Distilled(), make(scope="layerwise")
    before = fits.state_of(module.teacher)
    fitted = fit(tmp_path, module, callback)
    assert fits.equal_states(fits.state_of(module.teacher), before)
    assert_pruned(module, callback, "student.0.weight", "student.2.weight")
    assert_measured(fitted.report)
    assert not [text for text in fitted.said if "collapse" in text]


def assert_left_out_or_named(module: imitations.Distilled, said: list[str], again: Any) -> None:
    """Assert that the student is what is pruned, if need be after pasting what the warning offers."""
    assert not [text for text in said if "collapse" in text]
    if zeros(parameter for parameter in module.teacher.parameters() if parameter.ndim > 1):
        again(pasted(said, "exclude", "teacher"))
        return
    matrices = [parameter for parameter in module.student.parameters() if parameter.ndim > 1]
    assert zeros(matrices) == pytest.approx(SPARSITY, abs=1e-3)


@pytest.mark.parametrize("make", [CALLBACKS["DRIVE"], CALLBACKS["SNIP"]], ids=["DRIVE", "SNIP"])
def test_distillation__a_teacher_without_gradient_in_the_optimizer(tmp_path: Path, make: Any) -> None:
    module = imitations.Distilled(holds_teacher=True)
    fitted = fit(tmp_path, module, make())

    def again(exclude: list[str]) -> None:
        module, callback = imitations.Distilled(holds_teacher=True), make(exclude=exclude)
        fit(tmp_path, module, callback)
        assert_pruned(module, callback, "student.0.weight", "student.2.weight")

    assert_left_out_or_named(module, fitted.said, again)


def test_distillation__find_masks_without_a_trainer() -> None:
    module = imitations.Distilled()
    batches = list(module.train_dataloader())

    def loss_fn(network: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            goal = network.teacher(batch[0]).softmax(-1)
        return F.cross_entropy(network(batch[0]), goal)

    def search(**kwargs: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            masks = find_masks(module, SNIP(), sparsity=SPARSITY, batches=batches, loss_fn=loss_fn, **kwargs)
        student = {name: mask for name, mask in masks.items() if name.startswith("student.")}
        pruned.append(1 - sum(int(mask.sum()) for mask in student.values()) / sum(map(torch.numel, student.values())))
        return [str(warning.message) for warning in caught]

    pruned: list[float] = []
    said = search()
    assert not [text for text in said if "collapse" in text]
    if pruned[0] < SPARSITY - 0.01:
        search(exclude=pasted(said, "exclude", "teacher"))
    assert pruned[-1] == pytest.approx(SPARSITY, abs=0.01)


# Averages of one's own.


@EACH
def test_own_ema__what_it_leaves_in_the_module_is_sparse(tmp_path: Path, make: Any) -> None:
    module, callback = imitations.Classifier(), make()
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, module, callback, imitations.OwnEMA(), checkpoint, max_epochs=4)
    assert_pruned(module, callback, *ONLINE)
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    assert zeros(saved[name] for name in ONLINE) == pytest.approx(SPARSITY, abs=1e-3)


@EACH
def test_own_ema__a_copy_in_the_module_is_named(tmp_path: Path, make: Any) -> None:
    module, callback = imitations.MeanTeacher(), make()
    fitted = fit(tmp_path, module, callback)
    assert_pruned(module, callback, *ONLINE)
    named = [text for text in fitted.said if "average" in text and "averages" in text]
    assert len(named) == 1, fitted.said


@pytest.mark.parametrize("kind", [DRIVEPruningCallback, SNIPPruningCallback, IMPPruningCallback])
def test_own_ema__a_copy_that_averages_returns_is_pruned_along(tmp_path: Path, kind: Any) -> None:
    class Along(kind):  # type: ignore[misc]
        def averages(self, pl_module: Any) -> list[Any]:
            return [{f"net.{name}": parameter for name, parameter in pl_module.average.named_parameters()}]

    settings = {
        DRIVEPruningCallback: {"warmup_epochs": 1, "rounds": 4},
        SNIPPruningCallback: {},
        IMPPruningCallback: {"cycles": 2, "epochs_per_cycle": 1},
    }[kind]
    module, callback = imitations.MeanTeacher(), Along(sparsity=SPARSITY, **settings)
    fitted = fit(tmp_path, module, callback)
    copies = dict(module.average.named_parameters())
    for name, mask in callback.masks.items():
        assert not copies[name.removeprefix("net.")][~mask].any()
        assert copies[name.removeprefix("net.")][mask].all()
    assert not [text for text in fitted.said if "average" in text]


# Low-rank adapters.

ADAPTERS = [f"net.{layer}.lora_{part}.default.weight" for layer in (0, 2) for part in "AB"]


@pytest.mark.parametrize("kind", [DRIVEPruningCallback, SNIPPruningCallback])
def test_lora__adapters_that_die_are_named_with_what_to_exclude(tmp_path: Path, kind: Any) -> None:
    module, callback = imitations.LowRank(), kind(sparsity=SPARSITY, warmup_epochs=0)  # one factor is 0 throughout then
    frozen = fits.state_of(module.net[0].base_layer)
    fitted = fit(tmp_path, module, callback)
    assert fits.equal_states(fits.state_of(module.net[0].base_layer), frozen)
    assert set(callback.masks) <= {*ADAPTERS, "net.4.weight"}
    patterns = pasted(fitted.said, "exclude", "lora_A")

    module, callback = imitations.LowRank(), kind(sparsity=SPARSITY, warmup_epochs=0, exclude=patterns)
    fitted = fit(tmp_path, module, callback)
    assert_pruned(module, callback, "net.4.weight")
    assert not [text for text in fitted.said if "lora_A" in text and "exclude=" in text]


# Batches that are mappings, but no dicts.


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("kind", [dict, imitations.Features, imitations.Fields])
@EACH
def test_batch_feature__as_with_a_dict(tmp_path: Path, make: Any, kind: Any, precision: str) -> None:
    module, callback = imitations.OfEntries(kind), make()
    fitted = fit(tmp_path, module, callback, precision=precision)
    assert_pruned(module, callback, *ONLINE)
    assert_measured(fitted.report)
    assert fitted.report.multiply_adds is not None


@pytest.mark.parametrize("kind", [imitations.Features, imitations.Fields])
def test_batch_feature__synflow(tmp_path: Path, kind: Any) -> None:
    module, callback = imitations.OfEntries(kind), SynFlowPruningCallback(sparsity=SPARSITY, rounds=4)
    fit(tmp_path, module, callback)
    assert_pruned(module, callback, *ONLINE)
