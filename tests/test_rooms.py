"""The package is a house of rooms: imports go down, Lightning is in two of them, and nothing heavy is imported."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_drive
from lightning_drive.callbacks import drive

BELOW: dict[str, set[str]] = {
    "core": set(),
    "network": {"core"},
    "export": {"core"},
    "search": {"network"},
    "compaction": {"network"},
    "report": {"export", "network"},
    "acceleration": {"report"},
    "trainer": {"acceleration", "search"},
    "callbacks": {"trainer"},
    "": {"callbacks", "compaction"},
}
"""Each room and those right below it; the files beside the rooms are on top. A room also sees what is further down."""
WITH_LIGHTNING = {"trainer", "callbacks", "cli"}
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities", "torchmetrics"}
PACKAGE = Path(lightning_drive.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}

# Optional, and not imported by `lightning.pytorch` itself (torchmetrics alone brings matplotlib, torchvision, rich).
OF_LIGHTNING = LIGHTNING | {"matplotlib", "rich", "torchvision"}
HEAVY = {"pytorch_lightning", "sklearn", "jsonargparse", "pandas", "tensorboard", "safetensors", "torch_pruning"}


def room_of(module: str) -> str:
    return module.rpartition(".")[0]


def seen_from(room: str) -> set[str]:
    """Name the rooms that a room may import from, itself included."""
    return {room}.union(*map(seen_from, BELOW[room]))


def imported_modules(source: str) -> set[str]:
    """Name what is imported anywhere, in functions too: `a.b` for `import a.b` and for `from a import b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def own_modules(source: str) -> set[str]:
    """Name the modules of this package that are imported: `room.module` or the file beside the rooms."""
    modules = set()
    for name in imported_modules(source):
        top, *rest = name.split(".")
        if top in {"lightning_drive", ""} and name != "lightning_drive.__version__":
            modules.add(next((".".join(rest[:n]) for n in (2, 1) if ".".join(rest[:n]) in MODULES), ".".join(rest)))
    return modules


def complaints(module: str, source: str) -> list[str]:
    """List the imports of a module that go up, and those of Lightning where it does not belong."""
    room = room_of(module)
    known = MODULES.keys() | ({""} if not room else set())  # the public face, for the files beside the rooms
    wrong = [name for name in own_modules(source) if name not in known or room_of(name) not in seen_from(room)]
    if not {room, module} & WITH_LIGHTNING:
        wrong += [name for name in imported_modules(source) if name.split(".")[0] in LIGHTNING]
    return sorted(wrong)


def loaded_by(statement: str, packages: set[str]) -> set[str]:
    """Import in a fresh process, and return which of the packages came with it."""
    script = f"{statement}; import sys; print(*{packages!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_rooms__are_those_on_disk() -> None:
    assert {room_of(module) for module in MODULES} == set(BELOW)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    assert complaints(module, MODULES[module].read_text()) == []


def test_imports_make_no_circle() -> None:
    graph = {module: own_modules(path.read_text()) - {""} for module, path in MODULES.items()}
    assert [*TopologicalSorter(graph).static_order()]  # which raises if there is one


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("core.selection", "from lightning_drive.callbacks import drive", id="up"),
        pytest.param("core.selection", "from lightning_drive.callbacks.drive import DRIVEPruningCallback", id="name"),
        pytest.param("core.selection", "import lightning_drive.search.methods", id="up_plainly"),
        pytest.param("network.paths", "from lightning_drive.export import checkpoints", id="sideways"),
        pytest.param("network.paths", "from ..export import checkpoints", id="sideways_relatively"),
        pytest.param("callbacks.drive", "from lightning_drive import DRIVE", id="the_public_face"),
        pytest.param("callbacks.drive", "import lightning_drive", id="the_public_face_plainly"),
        pytest.param("search.methods", "import lightning.pytorch as pl", id="lightning"),
        pytest.param("report.plan", "def f():\n    from lightning.pytorch import Trainer", id="in_a_function"),
        pytest.param("command", "from torchmetrics import Metric", id="torchmetrics"),
    ],
)
def test_imports_go_down__can_fail(module: str, source: str) -> None:
    assert len(complaints(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("network.prunable", "from lightning_drive.core import scores, shards", id="down"),
        pytest.param("report.plan", "from lightning_drive.network.masks import Masks", id="down_for_a_name"),
        pytest.param("callbacks.drive", "from lightning_drive.core.arguments import Mode", id="down_many_floors"),
        pytest.param("network.paths", "from lightning_drive.network import prunable", id="in_the_room"),
        pytest.param("command", "from lightning_drive import __version__", id="version"),
        pytest.param("trainer.sandbox", "import lightning.pytorch\nfrom torchmetrics import Metric", id="lightning"),
    ],
)
def test_imports_go_down__can_pass(module: str, source: str) -> None:
    assert complaints(module, source) == []


@pytest.mark.parametrize(
    ("statement", "more"),
    [
        ("import lightning_drive", OF_LIGHTNING | {"torch", "numpy", "lightning_drive.core"}),
        ("from lightning_drive import find_masks, DRIVE, Masks, PruningReport", OF_LIGHTNING | {"torch._dynamo"}),
        ("from lightning_drive import DRIVEPruningCallback, IMPPruningCallback", set()),
    ],
)
def test_import__nothing_heavy(statement: str, more: set[str]) -> None:
    """Optional packages are never imported, torch for a name that needs it, and Lightning only for the callbacks."""
    assert loaded_by(statement, HEAVY | more) == set()


@pytest.mark.parametrize(
    ("statement", "loads"),
    [("import lightning_drive", False), ("import lightning.pytorch, lightning_drive", True)],
)
def test_import__short_names(statement: str, loads: bool) -> None:
    """Where Lightning is imported first, LightningCLI knows the callbacks without their module's name."""
    modules = {f"lightning_drive.callbacks.{name}" for name in ("drive", "snip", "synflow", "imp", "gradual")}
    assert loaded_by(statement, modules) == (modules if loads else set())


def test_import__nothing_heavy_can_fail() -> None:
    assert loaded_by("import sys, types; sys.modules['sklearn'] = types.ModuleType('sklearn')", HEAVY) == {"sklearn"}


def test_public_names() -> None:
    """What is promised is there, listed, and the same object wherever it is imported from; nothing else is made up."""
    assert set(lightning_drive.__all__) <= set(dir(lightning_drive))
    assert lightning_drive.DRIVEPruningCallback is drive.DRIVEPruningCallback
    assert {name for name in lightning_drive.__all__ if getattr(lightning_drive, name).__name__ != name} == set()
    assert {name for name in lightning_drive.__all__ if vars(lightning_drive)[name].__name__ != name} == set()  # kept
    with pytest.raises(AttributeError, match=r"module 'lightning_drive' has no attribute 'prune'"):
        lightning_drive.prune  # noqa: B018


def test_public_names__for_type_checkers() -> None:
    """Type checkers and editors see the public names, and no others."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = imported_modules(ast.unparse(block))
    homes = {f"{getattr(lightning_drive, name).__module__}.{name}" for name in lightning_drive.__all__}
    assert seen == homes
    assert set(lightning_drive._HOME_OF) == set(lightning_drive.__all__)


def test_public_names__star() -> None:
    names: dict[str, object] = {}
    exec("from lightning_drive import *", names)
    assert names.keys() - {"__builtins__"} == set(lightning_drive.__all__)
