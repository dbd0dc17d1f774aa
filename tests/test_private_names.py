"""Only ``trainer/lightning_internals.py`` names what is private to Lightning."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import lightning
import lightning_utilities
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_drive

PACKAGE = Path(lightning_drive.__file__).parent
STORED = {"get_extra_results", "epoch_progress", "batch_progress", "epoch_loop.batch_progress"}
"""What has no underscore, but is of a private class or stands in checkpoints."""
ELSEWHERE = {("network/given_modules.py", name) for name in ("_trainer", "_fabric")}
"""`network` knows no Lightning, and leaves these out of copies; see the tests of `lightning_internals`."""


def private_names_of_lightning() -> set[str]:
    """Name what Lightning itself defines with an underscore, and torch does not."""
    defined = re.compile(
        r"^\s*(?:def|class) (_[a-zA-Z]\w*)|\bself\.(_[a-zA-Z]\w*)\b[^=\n]*=|^\s*(_[a-z]\w*) ?[:=]", re.M
    )
    folders = [Path(lightning.__file__).parent / part for part in ("pytorch", "fabric")]
    folders.append(Path(lightning_utilities.__file__).parent)
    names: set[str] = set()
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        names |= {name for match in defined.findall(file.read_text()) for name in match if name}
    layer = nn.Linear(1, 1)
    of_torch = (layer, layer.state_dict(), torch.optim.SGD(layer.parameters(), lr=0.1), DataLoader([]))
    return names.difference(*map(dir, of_torch))


LIGHTNING = private_names_of_lightning()


def own_names(tree: ast.AST) -> set[str]:
    """Name what a module of ours defines: functions, classes, variables and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.AST) -> bool:
    return ast.unparse(node) in {"self", "cls", "super()"}


TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
OURS = set().union(*map(own_names, TREES.values()))


def named_in(tree: ast.AST) -> Iterator[str]:
    """Name what may be private to Lightning: imports, attributes, texts and keywords, but for what is ours."""
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules = (node.module or "").split(".")
            if modules[0] in {"lightning", "lightning_fabric", "lightning_utilities"}:
                yield from (name for name in [*modules, *(alias.name for alias in node.names)] if name[0] == "_")
        elif isinstance(node, ast.Attribute) and node.attr not in (OURS if is_self(node.value) else own):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in own:
            yield node.value
        elif isinstance(node, ast.keyword) and node.arg not in own:
            yield node.arg or ""


def private_in(tree: ast.AST) -> set[str]:
    return {name for name in named_in(tree) if name in LIGHTNING | STORED}


def test_private_names__only_in_lightning_internals() -> None:
    there = {
        (file, name)
        for file, tree in TREES.items()
        for name in private_in(tree)
        if file != "trainer/lightning_internals.py"
    }
    assert there == ELSEWHERE


@pytest.mark.parametrize(
    "source",
    [
        "from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers",
        "from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher",
        "def f(trainer):\n    return trainer.fit_loop._combined_loader",
        "def f(module):\n    return getattr(module, '_trainer', None)",
        "def f(module, trainer):\n    vars(module).update(_trainer=trainer)",
        "class A:\n    def f(self):\n        return self._legacy_state_key",
        "def f(swa, epoch):\n    swa._latest_update_epoch = epoch",
        "for name in ('_should_skip_check',):\n    pass",
        "def f(checkpoint):\n    return checkpoint['loops']['fit_loop']['epoch_progress']",
        "def f(launcher):\n    return launcher.get_extra_results",
        "def f(trainer):\n    return trainer.fit_loop.epoch_loop.batch_progress",
    ],
)
def test_private_names__can_fail(source: str) -> None:
    assert len(private_in(ast.parse(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "from lightning.pytorch.callbacks import EarlyStopping",
        "def f(layer):\n    return layer._parameters, layer._buffers, layer._forward_hooks",
        "class A:\n    def f(self):\n        self._trainer = None\n        return self._trainer",
        "def f(trainer):\n    return trainer.fit_loop.epoch_loop.max_steps",
    ],
)
def test_private_names__can_pass(source: str) -> None:
    assert private_in(ast.parse(source)) == set()
