"""The package is a stack of floors: a module imports only from floors below its own, and nothing heavy is imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_drive
from lightning_drive import callbacks

FLOORS = (
    {"copying", "forms", "handover", "joining", "messages", "modes", "plain", "ranks", "signals", "sources"},
    {"arguments", "brackets", "checkpoints", "computed", "diagnosis", "recurrence", "scores", "sparsity", "shards"}
    | {"tables", "trees"},
    {"channels", "gradients", "growth", "masking", "paths", "prunable", "ranking", "replicas", "schedules"},
    {"files", "passage", "rewinding", "rounds", "undisturbed"},
    {"compaction", "costs", "flow", "pictures"},
    {"methods"},
    {"finding", "planning", "report"},
    {"averages", "batches", "cli", "companions", "compatibility", "copies", "display", "scoring", "phases", "trained"},
    {"ends", "enforcing", "outcomes"},
    {"pruning"},
    {"warmup"},
    {"callbacks", "lottery"},
    {"command"},
)
FIRST_LIGHTNING_FLOOR = 7
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities", "torchmetrics"}
PACKAGE = Path(__file__).parents[1] / "lightning_drive"
MODULES = sorted(PACKAGE.glob("[!_]*.py"))
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}

# Optional, and not imported by `lightning.pytorch` itself (torchmetrics alone brings matplotlib, torchvision, rich).
OF_LIGHTNING = LIGHTNING | {"matplotlib", "rich", "torchvision"}
WITH_LIGHTNING = "import lightning.pytorch, lightning_drive"
HEAVY = {"pytorch_lightning", "sklearn", "jsonargparse", "pandas", "tensorboard", "safetensors", "torch_pruning"}


def imported_modules(source: str) -> set[str]:
    """Name what is imported anywhere, in functions too: `a.b` for `import a.b` and for `from a import b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def complaints(module: str, source: str) -> list[str]:
    """Say which imports of a module go up or sideways."""
    floor, found = FLOOR_OF[module], []
    for name in sorted(imported_modules(source)):
        top, *rest = name.split(".")
        if top in LIGHTNING and floor < FIRST_LIGHTNING_FLOOR:
            found.append(f"{module} (floor {floor}) imports {name}")
        # A name that is no module, as in `import lightning_drive` or `from lightning_drive import DRIVE`, is the
        # public face above all floors.
        if name == "lightning_drive.__version__":  # which `__init__.py` has before it imports anything
            continue
        if top in {"lightning_drive", ""} and FLOOR_OF.get(rest[0] if rest else "", len(FLOORS)) >= floor:
            found.append(f"{module} (floor {floor}) imports {name}")
    return found


def loaded_by(statement: str, packages: set[str]) -> set[str]:
    """Import in a fresh process, and say which of the packages came with it."""
    script = f"{statement}; import sys; print(*{packages!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_floors__every_module_has_one() -> None:
    assert sorted(FLOOR_OF) == [path.stem for path in MODULES]
    assert sum(map(len, FLOORS)) == len(FLOOR_OF)


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem in FLOOR_OF], ids=lambda path: path.stem)
def test_imports_go_down(path: Path) -> None:
    assert complaints(path.stem, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("ranking", "from lightning_drive import callbacks", id="up"),
        pytest.param("ranking", "from lightning_drive.callbacks import DRIVEPruningCallback", id="up_for_a_name"),
        pytest.param("ranking", "import lightning_drive.methods", id="up_plainly"),
        pytest.param("ranking", "from lightning_drive import schedules", id="sideways"),
        pytest.param("ranking", "from . import schedules", id="sideways_relatively"),
        pytest.param("flow", "from lightning_drive.costs import Costs", id="sideways_for_a_name"),
        pytest.param("callbacks", "from lightning_drive import DRIVE", id="the_public_face"),
        pytest.param("callbacks", "import lightning_drive", id="the_public_face_plainly"),
        pytest.param("methods", "import lightning.pytorch as pl", id="lightning"),
        pytest.param("flow", "def f():\n    from lightning.pytorch import Trainer", id="lightning_in_a_function"),
        pytest.param("masking", "from torchmetrics import Metric", id="torchmetrics"),
    ],
)
def test_imports_go_down__can_fail(module: str, source: str) -> None:
    assert len(complaints(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("prunable", "from lightning_drive import scores, shards", id="down"),
        pytest.param("report", "from lightning_drive.masking import Masks", id="down_for_a_name"),
        pytest.param("callbacks", "from lightning_drive.schedules import Schedule", id="down_many_floors"),
        pytest.param("command", "from lightning_drive import __version__", id="version"),
        pytest.param("scoring", "import lightning.pytorch as pl\nfrom torchmetrics import Metric", id="lightning"),
    ],
)
def test_imports_go_down__can_pass(module: str, source: str) -> None:
    assert complaints(module, source) == []


@pytest.mark.parametrize(
    ("statement", "more"),
    [
        ("import lightning_drive", OF_LIGHTNING | {"torch", "numpy", "lightning_drive.messages"}),
        ("from lightning_drive import find_masks, DRIVE, Masks, PruningReport", OF_LIGHTNING | {"torch._dynamo"}),
        ("from lightning_drive import DRIVEPruningCallback, IMPPruningCallback", set()),
    ],
)
def test_import__nothing_heavy(statement: str, more: set[str]) -> None:
    """Optional packages are never imported, torch for a name that needs it, and Lightning only for the callbacks."""
    assert loaded_by(statement, HEAVY | more) == set()


@pytest.mark.parametrize(("statement", "loads"), [("import lightning_drive", False), (WITH_LIGHTNING, True)])
def test_import__short_names(statement: str, loads: bool) -> None:
    """Where Lightning is imported first, LightningCLI knows the callbacks without their module's name."""
    modules = {"lightning_drive.callbacks", "lightning_drive.lottery"}
    assert loaded_by(statement, modules) == (modules if loads else set())


def test_import__nothing_heavy_can_fail() -> None:
    assert loaded_by("import sys, types; sys.modules['sklearn'] = types.ModuleType('sklearn')", HEAVY) == {"sklearn"}


def test_public_names() -> None:
    """What is promised is there, listed, and the same object wherever it is imported from; nothing else is made up."""
    assert set(lightning_drive.__all__) <= set(dir(lightning_drive))
    assert lightning_drive.DRIVEPruningCallback is callbacks.DRIVEPruningCallback
    assert {name for name in lightning_drive.__all__ if getattr(lightning_drive, name).__name__ != name} == set()
    assert {name for name in lightning_drive.__all__ if vars(lightning_drive)[name].__name__ != name} == set()  # kept
    with pytest.raises(AttributeError, match=r"module 'lightning_drive' has no attribute 'prune'"):
        lightning_drive.prune  # noqa: B018


def test_public_names__for_type_checkers() -> None:
    """What a type checker and an editor see is what there is."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = imported_modules(ast.unparse(block))
    homes = {f"{getattr(lightning_drive, name).__module__}.{name}" for name in lightning_drive.__all__}
    assert seen == homes
    assert set(lightning_drive._HOME_OF) == set(lightning_drive.__all__)


def test_public_names__star() -> None:
    found: dict[str, object] = {}
    exec("from lightning_drive import *", found)
    assert found.keys() - {"__builtins__"} == set(lightning_drive.__all__)
