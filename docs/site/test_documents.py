"""Every block of code in the README and the documentation runs, in the order of its page, in a folder of its page.

- A block of Python runs in this process. It finds what a reader has: a LightningModule, its data, a checkpoint.
- A block with a `title` becomes the file of that name, in the page's folder.
- A block of bash runs in that folder. What it installs is not installed again: its extras must exist.
- A block of text is what the block before it prints, up to what a comment above it names (see `outputs.py`), or the
  tree of a folder, whose names must be there.
"""

import fnmatch
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import mymodel
import outputs
import processes
import pytest
from packaging.requirements import Requirement
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "bash", "console", "yaml", "text"}  # "console": what a test of its own compares
BIN = Path(sys.executable).parent

INSTEAD = {
    "python examples/digits.py": "python examples/digits.py --help",  # `.ci/run` runs it, from a wheel
    "python examples/compact.py": "python examples/compact.py --help",  # half an hour
    "python -m pytest": "python -m pytest --version",  # `.ci/run` runs it, and so this test
    "python -m pytest tests/benchmarks": "python -m pytest tests/benchmarks -n 0 --collect-only",  # twenty minutes
}
"""What runs here in place of commands that take long, by how these begin; the longest beginning counts."""

VIRTUAL_ENVIRONMENT = "python3 -m venv .venv"

[REPOSITORY] = re.findall(
    r"^repo_url: (.+)$", (ROOT / "docs/site/mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
)
CLONE = f"git clone {REPOSITORY} && cd {REPOSITORY.rpartition('/')[2]}"
"""The line that a reader begins with; whoever runs this has a clone."""

WHOLE = {"docs/quickstart.md"}
"""Pages that bring all that they use: their readers have nothing before the first block."""

PROMISED = re.compile(r"^print\(.*\)  # ([A-Z0-9\[({].*)$", flags=re.MULTILINE)
"""Comments behind `print` that say what is printed; those that begin with a small letter or a quotation mark do not."""

PRINTED = "__printed__"
"""In the namespace of a page, what its last block printed."""


def reader() -> dict[str, Any]:
    """Return what a reader has before the first block of other pages."""
    pl.seed_everything(0, verbose=False)
    data = mymodel.MyData()
    return {
        "MyModel": mymodel.MyModel,
        "model": mymodel.MyModel(),
        "train_loader": data.train_dataloader(),
        "val_loader": data.val_dataloader(),
    }


def titled(document: Document) -> Iterable[Region]:
    """Find the blocks that are files."""
    pattern = re.compile(r'(?P<language>\w+) title="(?P<title>[^"]+)"\n')
    for region in RawFencedCodeBlockLexer(info_pattern=pattern)(document):
        yield Region(region.start, region.end, parsed=region.lexemes, evaluator=write)


def write(example: Example) -> None:
    """Write a block to the file that its title names."""
    path = Path(example.parsed["title"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(example.parsed["source"], encoding="utf-8")


def run(example: Example) -> None:
    """Run a block of bash, step by step, on the package of this checkout and in this environment."""
    lines = [line for line in example.parsed.replace("\\\n", " ").splitlines() if line != CLONE]
    for step in [step for line in lines for step in line.split(" && ")]:
        command = step.partition("  #")[0].strip().replace(".venv/bin/", "")
        if command == VIRTUAL_ENVIRONMENT or not command:
            continue
        if command.startswith("pip install "):
            check_installable(shlex.split(command)[2:])
            continue
        begin = max((begin for begin in INSTEAD if command.startswith(begin)), key=len, default=None)
        call(INSTEAD[begin] if begin else command)


def call(command: str) -> None:
    """Run one command in the current folder, where a reader of the repository has its parts, and a model."""
    for name in ("examples", "tests", "pyproject.toml", "tests/helpers/mymodel.py"):
        if not Path(Path(name).name).exists():
            Path(Path(name).name).symlink_to(ROOT / name)
    first, *arguments = shlex.split(command)
    if first == "python" and arguments[0].endswith(".py"):
        done = processes.Script(*arguments, folder=Path.cwd()).finish(timeout=900)  # it may train for a while
    elif first == "lightning-drive":
        done = processes.script(BIN / first, *arguments, folder=Path.cwd())
    else:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = {**inherited, "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]])}
        words = ["bash", "-euo", "pipefail", "-c", command]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    print(done.stdout, done.stderr, sep="\n")


def check_installable(arguments: list[str]) -> None:
    """Check that the package has the extras that are asked for."""
    [what] = [argument for argument in arguments if not argument.startswith("-")]
    requirement = Requirement(re.sub(r"^\.", "lightning-drive", what))
    assert requirement.name == "lightning-drive"
    assert requirement.extras <= set(metadata("lightning-drive").get_all("Provides-Extra") or [])


def compare(example: Example) -> None:
    """Compare a block of text with what the block before it printed, or a tree with the folder that it shows."""
    if "├──" in example.parsed:
        check_tree(example.parsed)
        return
    assert example.namespace.get(PRINTED), "The block before this one prints nothing."
    comment = re.search(r"<!-- output: (.*) -->\s*$", example.document.text[: example.region.start])
    marks = re.split(r";\s+", comment[1]) if comment else []
    outputs.check(example.parsed, example.namespace[PRINTED], marks)


def check_tree(tree: str) -> None:
    """Check that what a tree shows is there, and that no folder of code is missing in it."""
    first, *rest = tree.splitlines()
    shown = {line.split()[1] for line in rest}
    files = {path.name: path for path in (ROOT / first).iterdir() if not path.name.startswith((".", "__pycache__"))}
    folders = {f"{name}/" for name, path in files.items() if path.is_dir()}
    missing = [entry for entry in shown - folders if not fnmatch.filter(files, entry)]
    assert not missing, f"Not in {first}: {missing}"
    assert folders <= shown, f"Not shown: {folders - shown}"


BLOCKS = [PythonCodeBlockParser(), CodeBlockParser("bash", run), CodeBlockParser("text", compare), titled]
SYBIL = Sybil(BLOCKS)  # type: ignore[arg-type]
DOCUMENTS = {str(page.relative_to(ROOT)): SYBIL.parse(page) for page in PAGES}
EXAMPLES = [(page, example) for page, document in DOCUMENTS.items() for example in document.examples()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder for every page, whose namespace has what a reader has."""
    for page, document in DOCUMENTS.items():
        document.namespace.update({} if page in WHOLE else reader())
    return {page: tmp_path_factory.mktemp(Path(page).stem) for page in DOCUMENTS}


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*tensorboardX.* has been removed:UserWarning",
    "ignore:The number of training batches .* is smaller than the logging interval",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Checkpoint directory .* exists and is not empty",
)
@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=[f"{page}:{block.line}" for page, block in EXAMPLES])
def test_block(
    page: str,
    example: Example,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folders[page])
    evaluate(example, capsys)


def evaluate(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a block and remember what it prints, which its comments and a block of text behind it may promise."""
    example.evaluate()
    if not example.document.text.startswith("```text", example.region.start):
        printed = example.namespace[PRINTED] = capsys.readouterr().out
        for promised in PROMISED.findall(str(example.parsed)):
            outputs.check(promised, printed, [])


@pytest.mark.parametrize(
    ("page", "fails"),
    [
        ("```python\nprint(10)\n```\n\nIt prints\n\n```text\n10\n```\n", False),
        ("```python\nprint(10)\n```\n\n<!-- output: varies: \\d+ -->\n\n```text\n12\n```\n", False),
        ("```python\nprint(10)  # 10\nprint(9)  # as before\n```\n", False),
        ("```text\ntests/helpers/\n├── models.py  networks\n└── own*.py\n```\n", False),
        ("```python\nprint(10)\n```\n\n```text\n12\n```\n", True),
        ("```python\nprint(10)\n```\n\n```python\na = 1\n```\n\n```text\n10\n```\n", True),
        ("```python\nprint(10)  # 12\n```\n", True),
        ("```bash\nfalse\n```\n", True),
        ("```text\ntests/helpers/\n├── nothing.py\n└── own*.py\n```\n", True),
        ("```text\nlightning_drive/\n├── core/\n└── cli.py\n```\n", True),
    ],
    ids=["same", "varies", "comment", "tree", "other", "too_late", "wrong_comment", "bash", "no_file", "not_whole"],
)
def test_evaluate(
    page: str, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a page promises is compared with what its code does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    *before, last = SYBIL.parse(tmp_path / "page.md").examples()
    for example in before:
        evaluate(example, capsys)
    with pytest.raises(AssertionError) if fails else nullcontext():
        evaluate(last, capsys)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_no_block_is_missed(page: Path) -> None:
    """Every fenced block has a language that runs, is a file, or is compared with what stands above it."""
    text = page.read_text(encoding="utf-8")
    infos = re.findall(r"^```(.*)$", text, flags=re.MULTILINE)
    assert len(infos) % 2 == 0
    opening = infos[::2]
    assert {info.partition(" ")[0] for info in opening} <= LANGUAGES
    assert not any(info == "yaml" for info in opening), "give it a title, so that it is a file that a command uses"
    hidden = text.count("<!-- invisible-code-block")
    of_other_tests = opening.count("console")
    assert len(opening) - of_other_tests + hidden == sum(of == str(page.relative_to(ROOT)) for of, _ in EXAMPLES)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_no_page_is_a_stub(page: Path) -> None:
    """A page says something, and the site leads to it."""
    assert len(page.read_text(encoding="utf-8").splitlines()) > 5
    navigation = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    assert page.name == "README.md" or f": {page.relative_to(ROOT / 'docs')}\n" in navigation


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_named_tests_exist(page: Path) -> None:
    """Whoever looks for the test that a page names finds its file."""
    files = {
        path.stem for folder in ("tests", "examples/tests", "docs/site") for path in (ROOT / folder).rglob("test_*.py")
    }
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
    assert named <= files
    assert len(named) > 20 or page.name != "compatibility.md"
