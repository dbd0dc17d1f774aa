"""Two real processes end with the same masks and weights, which are those of one process that sees both their batches.

The processes run ``distributed.py``; every scenario runs once, and the tests look at what its ranks wrote down.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import fits
import processes
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy

from lightning_drive import Masks, Random, find_masks
from lightning_drive.core import shards
from lightning_drive.core.processes import ALONE
from lightning_drive.core.shards import holders, is_sharded, joined, local, part

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

Result = dict[str, Any]
EPOCHS = range(distributed.EPOCHS - 1)


def start(folder: Path, launch: str, *scenarios: str) -> None:
    """Run scenarios in two processes, started by Lightning or by ``torchrun``."""
    arguments = [distributed.__file__, str(folder), launch, *scenarios]
    if launch == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    else:
        done = processes.script(*arguments, folder=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def load(folder: Path, scenario: str) -> list[Result]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{scenario}-[01].pt"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    start(folder, "ddp", *distributed.SCENARIOS)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Callable[[str], list[Result]]:
    def of(scenario: str) -> list[Result]:
        if scenario not in distributed.SCENARIOS:
            pytest.skip("FSDP2 needs a GPU with this torch")
        return load(folder, scenario)

    return of


def weights_of(result: Result) -> dict[str, torch.Tensor]:
    """Leave out BatchNorm's statistics, which DDP lets every rank have of its own until the next forward pass."""
    return {name: value for name, value in result["state"].items() if "running" not in name}


def check_same(first: Result, second: Result) -> Masks:
    """Ranks have the same weights, optimizer state and masks, and zeros exactly where the masks prune."""
    assert first["digest"] == second["digest"]
    assert fits.equal_states(weights_of(first), weights_of(second))
    assert all(torch.equal(*pair) for pair in zip(first["optimizer"], second["optimizer"], strict=True))
    masks = Masks.from_state_dict(first["masks"])
    for name, mask in masks.items():
        assert torch.equal(first["state"][name] != 0, mask)
    assert masks.num_kept == round(masks.num_prunable * 0.2)
    return masks


@pytest.mark.parametrize("warmup_epochs", [0, 1])
@pytest.mark.parametrize("method", ["drive", "snip"])
def test_masks_are_those_of_one_process(ranks: Any, tmp_path: Path, method: str, warmup_epochs: int) -> None:
    """Gradients, not scores, are averaged: half batches on two ranks give what whole batches on one rank give."""
    masks = check_same(*(result[f"{method}-{warmup_epochs}"] for result in ranks("joined")))
    alone = distributed.METHODS[method](warmup_epochs=warmup_epochs, batches_per_round=2)
    trainer = fits.trainer(tmp_path, alone, max_epochs=distributed.EPOCHS)
    trainer.fit(distributed.Exact(), datamodule=distributed.Data(2 * distributed.BATCH))
    assert alone.masks == masks


@pytest.mark.parametrize("goal", distributed.GOALS)
@pytest.mark.parametrize("scenario", ["joined", "sharded"])
def test_goals(ranks: Any, tmp_path: Path, scenario: str, goal: str) -> None:
    """With a sparsity for each group, other densities or a function as a schedule, ranks keep what one process does."""
    first, second = (result[goal] for result in ranks(scenario))
    assert first["digest"] == second["digest"]
    assert first["report"]["rounds"] == second["report"]["rounds"]
    alone = distributed.METHODS["drive"](**distributed.GOALS[goal], batches_per_round=2)
    trainer = fits.trainer(tmp_path, alone, max_epochs=distributed.EPOCHS)
    trainer.fit(distributed.Exact(), datamodule=distributed.Data(2 * distributed.BATCH))
    assert alone.masks == Masks.from_state_dict(first["masks"])


@pytest.mark.parametrize("warmup_epochs", [0, 1])
@pytest.mark.parametrize("variant", distributed.DDP_VARIANTS)
def test_variants(ranks: Any, variant: str, warmup_epochs: int) -> None:
    """However DDP is set up, the result is the same to the bit, also where pruning comes before DDP's first step."""
    first, second = ranks("variants")
    check_same(first[f"{variant}-{warmup_epochs}"], second[f"{variant}-{warmup_epochs}"])
    usual = {"static_graph": "default"}.get(variant, "accumulated" if variant != "default" else "default")
    assert fits.equal_states(first[f"{variant}-{warmup_epochs}"]["state"], first[f"{usual}-{warmup_epochs}"]["state"])


@pytest.mark.parametrize(("method", "control"), distributed.CONTROLLED)
def test_methods(ranks: Any, method: str, control: str) -> None:
    """Unseeded ranks agree: on masks, on what is drawn at random, on the weights to return to, and on the report."""
    first, second = (result[f"{method}-{control}"] for result in ranks("methods"))
    check_same(first, second)
    assert first["start"] == second["start"]
    assert first["statistics"] == second["statistics"]  # BatchNorm's, right after pruning
    assert (first["start"] is None) == (method != "imp" and control != "reinit")
    assert first["changes"] == second["changes"] == {"imp": 2, "gradual": 6, "gradual_by_drive": 6}.get(method, 1)
    assert first["report"]["layers"] == second["report"]["layers"]
    assert first["logged"] == second["logged"]
    assert not any("pruning/" in text for text in first["warned"])  # Lightning's advice on what is not synchronised
    assert first["logged"]["pruning/sparsity"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize(("method", "optimizer"), distributed.RESUMED)
def test_resume(ranks: Any, method: str, optimizer: str, epoch: int) -> None:
    """Resumed from any epoch boundary, with other weights to begin with, the run ends bit for bit as it would have."""
    first, second = ranks("resume")
    resumed = first[f"{method}-{optimizer}-{epoch}"]
    check_same(resumed, second[f"{method}-{optimizer}-{epoch}"])
    whole = first[f"{method}-{optimizer}"]
    assert fits.equal_states(weights_of(resumed), weights_of(whole))
    assert all(torch.equal(*pair) for pair in zip(resumed["optimizer"], whole["optimizer"], strict=True))
    assert resumed["digest"] == whole["digest"]


def test_resume__on_one_rank(folder: Path, tmp_path: Path) -> None:
    """A checkpoint of two ranks goes on with one, and keeps its masks."""
    callback = distributed.METHODS["drive"]()
    trainer = fits.trainer(tmp_path, callback, max_epochs=distributed.EPOCHS)
    module = distributed.Scheduled()
    trainer.fit(module, datamodule=distributed.Data(), ckpt_path=folder / "resume" / "drive-sgd" / "1.ckpt")
    assert callback.masks.digest() == load(folder, "resume")[0]["drive-sgd"]["digest"]
    assert callback.masks.hold_for(module)


def test_resume__on_two_ranks(ranks: Any) -> None:
    """A checkpoint of one process goes on with two ranks, and keeps its masks."""
    first, second = ranks("resume")
    masks = check_same(first["alone-1"], second["alone-1"])
    assert masks.digest() == first["alone"]["digest"]


def test_failing(ranks: Any) -> None:
    """What goes wrong on one rank ends the others, too, and at once."""
    first, second = (result["error"] for result in ranks("failing"))
    assert first.startswith("RuntimeError: Pruning failed on rank 1 of 2")
    assert second.startswith("ValueError: The loss must be finite, got nan")


@pytest.mark.parametrize("name", ["GraSP", "Fisher"])
def test_own__masks_are_those_of_one_process(ranks: Any, tmp_path: Path, name: str) -> None:
    """What a method computes from losses of its own is averaged: two half batches give what one whole batch gives."""
    masks = check_same(*(result[name] for result in ranks("own")))
    alone = distributed.own_callback(distributed.OWN[name]())
    trainer = fits.trainer(tmp_path, alone, max_epochs=1)
    trainer.fit(distributed.Exact(), datamodule=distributed.Data(2 * distributed.BATCH))
    assert alone.masks == masks


def test_own__without_a_mean(ranks: Any) -> None:
    """A method that thinks of one process only has scores that are averaged, so that all ranks find the same masks."""
    first, second = (result["LossGradients"] for result in ranks("own"))
    check_same(first, second)
    assert not any("found other masks" in text for text in first["report"]["warnings"])


def test_own__failing(ranks: Any) -> None:
    """What goes wrong in the method's own code on one rank ends the others in their next mean, and nothing is stuck."""
    first, second = ranks("own")
    assert first["error"].startswith("RuntimeError: Pruning failed on rank 1 of 2")
    assert second["error"] == "ZeroDivisionError: on purpose"
    check_same(first["again"], second["again"])


def test_skipping(ranks: Any) -> None:
    """A rank takes other batches of its own; what any rank has a gradient of is pruned, and the rest left out."""
    first, second = ranks("skipping")
    assert first["digest"] == second["digest"]
    masks = Masks.from_state_dict(first["masks"])
    assert [name for name in masks if "experts" in name] == ["experts.0.weight", "experts.1.weight"]
    assert second["calls"] == first["calls"] + 2
    texts = first["report"]["warnings"]
    assert [text for text in texts if "'experts.2.weight' had no gradient in any round" in text]


def test_disagreeing(ranks: Any) -> None:
    """Ranks whose weights differ get the masks of the first, and are told."""
    first, second = ranks("disagreeing")
    assert first["digest"] == second["digest"]
    [warned] = [text for text in first["warned"] if text.startswith("Rank 1 found other masks than rank 0")]
    assert warned in first["report"]["warnings"]


@pytest.mark.parametrize("of", ["zeros", "given", "resumed", "sharded_zeros", "sharded_given"])
def test_keeping(ranks: Any, of: str) -> None:
    """All ranks hold the zeros of the first one, or the masks that are given, also in parts of their own."""
    if of not in ranks("keeping")[0]:
        pytest.skip("FSDP2 needs a GPU with this torch")
    first, second = (result[of] for result in ranks("keeping"))
    masks = check_same(first, second)
    seed = 5 if "given" in of else 0
    assert masks == find_masks(distributed.Exact(), Random(seed=seed), sparsity=0.8)
    assert first["changes"] == second["changes"] == 1
    assert first["report"]["layers"] == second["report"]["layers"]
    assert not [text for text in first["warned"] if "Rank 1" in text]
    if of == "resumed":
        assert fits.equal_states(first["state"], ranks("keeping")[0]["zeros"]["state"])


@pytest.mark.parametrize("kind", ["True", "False"], ids=["sharded_checkpoint", "joined_checkpoint"])
def test_sharded(ranks: Any, tmp_path: Path, kind: str) -> None:
    """Under FSDP2 ranks score and mask their own parts, and the masks are those of one process."""
    masks = check_same(*(result[kind] for result in ranks("sharded")))
    alone = distributed.METHODS["drive"]()
    trainer = fits.trainer(tmp_path, alone, max_epochs=distributed.EPOCHS)
    trainer.fit(distributed.Exact(), datamodule=distributed.Data(2 * distributed.BATCH))
    assert alone.masks == masks


def test_sharded__report(ranks: Any) -> None:
    """Rounds, scores and bytes are those of the whole network; what would run it on one rank alone is left out."""
    first, second = (result["True"]["report"] for result in ranks("sharded"))
    alone, scores = first["layers"], first["scores"]
    assert (first["rounds"], scores) == (second["rounds"], second["scores"])
    removed = [sum(column) for column in zip(*(one_round["removed"] for one_round in first["rounds"]), strict=True)]
    assert removed == [layer["num_weights"] - layer["num_kept"] for layer in alone]
    assert sum(scores["kept"]) + scores["kept_below"] == sum(layer["num_kept"] for layer in alone)
    assert [(layer["multiply_adds"], layer["itemsize"]) for layer in alone] == [(None, 8)] * len(alone)
    assert any("multiply-adds were not measured" in warning for warning in first["warnings"])


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize("kind", ["True", "False"], ids=["sharded_checkpoint", "joined_checkpoint"])
def test_sharded__resume(ranks: Any, kind: str, epoch: int) -> None:
    first, second = ranks("sharded")
    check_same(first[f"{kind}-{epoch}"], second[f"{kind}-{epoch}"])
    assert fits.equal_states(first[f"{kind}-{epoch}"]["state"], first[kind]["state"])
    assert first[f"{kind}-{epoch}"]["digest"] == first[kind]["digest"]


@pytest.mark.parametrize("method", ["gradual", "gradual_by_drive"])
def test_sharded__gradual(ranks: Any, tmp_path: Path, method: str) -> None:
    """Cut after cut, ranks keep what one process does, also after a resume in the middle of the window."""
    first, second = ranks("sharded")
    masks = check_same(first[method], second[method])
    check_same(first[f"{method}-0"], second[f"{method}-0"])
    assert fits.equal_states(first[f"{method}-0"]["state"], first[method]["state"])
    assert first[method]["changes"] == 6
    alone = distributed.METHODS[method]()
    trainer = fits.trainer(tmp_path, alone, max_epochs=distributed.EPOCHS)
    trainer.fit(distributed.Exact(), datamodule=distributed.Data(2 * distributed.BATCH))
    assert alone.masks == masks


def test_sharded__after_validation(ranks: Any) -> None:
    """Validation leaves parameters whole until something splits them again, as saving does: pruning does, too."""
    first, second = ranks("sharded")
    check_same(first["unsaved"], second["unsaved"])
    assert fits.equal_states(first["unsaved"]["state"], first["True"]["state"])


def test_sharded__again(ranks: Any) -> None:
    """A module that was fitted before, and left whole by validation, is fitted again with pruning."""
    first, second = ranks("sharded")
    check_same(first["again"], second["again"])


def test_sharded__layerwise(ranks: Any) -> None:
    """Every parameter keeps its own share, counted over both ranks, though two ranks cannot share its rows evenly."""
    first, second = (result["layerwise"] for result in ranks("sharded"))
    assert first["digest"] == second["digest"]
    for mask in Masks.from_state_dict(first["masks"]).values():
        assert mask.sum() == round(mask.numel() * 0.2)


def test_sharded__shuffle(ranks: Any) -> None:
    check_same(*(result["shuffle"] for result in ranks("sharded")))


@pytest.mark.filterwarnings("ignore:Layer collapse")
def test_sharded__ties(ranks: Any) -> None:
    """Ties go to the earlier parameter and the lower index, wherever the parts of a parameter are."""
    expected = distributed.masks_among_ties(distributed.Exact())
    for result in ranks("sharded"):
        for name, masks in result["ties"].items():
            assert Masks.from_state_dict(masks) == Masks.from_state_dict(expected[name])


@pytest.mark.parametrize("name", ["synflow", "imp", "reinit"])
def test_sharded__error(ranks: Any, name: str) -> None:
    """What needs all weights in one place is refused by name."""
    for result in ranks("sharded"):
        assert result["refused"][name].startswith("MisconfigurationException")
        assert "with ModelParallelStrategy cannot work on sharded weights" in result["refused"][name]


def test_sharded__own_error(ranks: Any) -> None:
    """A loss with a graph is not to be had where no rank has all weights."""
    for result in ranks("sharded"):
        assert "`network.loss` is not defined while the weights are sharded" in result["refused"]["own"]


def test_sharded__other_ways_error(ranks: Any) -> None:
    """Tensor parallelism, and a module of which only a part is sharded, are refused before the first step."""
    for result in ranks("sharded"):
        assert "works with `tensor_parallel_size=1`, got 2" in result["refused"]["tensor_parallel"]
        assert "sharded or none, but net.2.weight, net.4.weight are not" in result["refused"]["partly_sharded"]
        assert result["steps"] == 0


@pytest.mark.parametrize("launch", [pytest.param("ddp_spawn", marks=pytest.mark.extended), "ddp_fork"])
def test_spawned(tmp_path: Path, launch: str) -> None:
    """The process that started the others has masks and report afterwards, and can go on with them."""
    start(tmp_path, launch)
    [result] = load(tmp_path, "spawned")
    masks = Masks.from_state_dict(result["masks"])
    assert result["pruned"]
    assert result["report"]["digest"] == masks.digest()
    for name, mask in masks.items():
        assert torch.equal(result["state"][name] != 0, mask)
        assert torch.equal(result["again"][name] != 0, mask)
    assert any(not torch.equal(result["again"][name], result["state"][name]) for name in masks)


@pytest.mark.extended
def test_torchrun(tmp_path: Path, ranks: Any) -> None:
    """It does not matter who starts the processes."""
    start(tmp_path, "torchrun", "joined")
    for mine, other in zip(load(tmp_path, "joined"), ranks("joined"), strict=True):
        assert all(fits.equal_states(mine[name]["state"], other[name]["state"]) for name in mine)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategy__error(tmp_path: Path, kind: Any) -> None:
    """A strategy that cannot work is refused by name, before anything is set up.

    This machine has neither a GPU nor DeepSpeed, so the strategy is one by class alone; it is not asked for more.
    """
    trainer = fits.trainer(tmp_path, fits.drive())
    trainer._accelerator_connector.strategy = object.__new__(kind)
    with pytest.raises(MisconfigurationException, match=f"with {kind.__name__}: this strategy keeps parameters"):
        fits.drive().setup(trainer, fits.ConvModule(), "fit")


class Foreign(SingleDeviceStrategy):
    """A strategy of someone else's, over two processes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.world_size = 2


def test_strategy__foreign_error(tmp_path: Path) -> None:
    """Of a strategy that is not known, nobody can say that ranks end with the same masks."""
    trainer = fits.trainer(tmp_path, fits.drive(), strategy=Foreign(torch.device("cpu")))
    with pytest.raises(
        MisconfigurationException, match="DRIVEPruningCallback with Foreign on 2 processes is not known"
    ):
        trainer.fit(fits.ConvModule(), fits.loader())


def test_shards__whole() -> None:
    """A tensor that is not split is its own part."""
    tensor = torch.arange(6).view(3, 2)
    assert not is_sharded(tensor)
    assert local(tensor) is tensor
    assert part(tensor, of=tensor) is joined(tensor, of=tensor) is tensor
    assert holders({"weight": tensor}) is ALONE
    shards.reshard_(torch.nn.Linear(2, 1))


@pytest.mark.parametrize("name", ["drive", "imp"])
def test_accelerated__first_rank_chooses(ranks: Callable[[str], list[Result]], name: str) -> None:
    """Both ranks take the forms that the first one found faster; weights are those of the dense run, but for rounding.

    The report names the forms on both.
    """
    first, second = (result[f"{name}-True"] for result in ranks("accelerated"))
    check_same(first, second)
    plain = ranks("accelerated")[0][f"{name}-False"]
    assert first["digest"] == plain["digest"]
    torch.testing.assert_close(first["state"], plain["state"], rtol=1e-9, atol=1e-12)
    for result in (first, second):
        layers = result["report"]["acceleration"]["layers"]
        assert [layer["form"] for layer in layers] == ["tokens"] * 3
    assert "acceleration" not in plain["report"]


def test_accelerated__resume(ranks: Callable[[str], list[Result]]) -> None:
    result = ranks("accelerated")[0]
    torch.testing.assert_close(result["resumed"]["state"], result["whole"]["state"], rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not distributed.SHARDS_ON_CPU, reason="FSDP2 needs a GPU with this torch")
def test_accelerated__sharded_stays_dense(ranks: Callable[[str], list[Result]]) -> None:
    layers = ranks("accelerated")[0]["sharded"]["report"]["acceleration"]["layers"]
    assert {(layer["form"], layer["reason"]) for layer in layers} == {("dense", "it is sharded over ranks")}
