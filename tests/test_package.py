"""The package as it is uploaded: its metadata, its files and where its links lead; and how it is released."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.metadata import RawMetadata, parse_email
from readme_renderer import markdown

import lightning_drive

ROOT = Path(__file__).parents[1]
VERSION = lightning_drive.__version__
FOLDERS = (".ci", ".github", "docs", "examples", "lightning_drive", "tests")
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / ".github").glob("*.md"))]
WORKFLOWS = ROOT / ".github" / "workflows"
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def files_of(folder: str) -> set[str]:
    """Name the files in a folder of the repository, without what Python leaves there."""
    paths = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


class Links(HTMLParser):
    """The addresses of links and images in HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.images: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        is_mark = (given.get("href") or "").startswith("#user-content-")  # PyPI's own, at every heading
        self.links += [given["href"] or ""] if "href" in given and not is_mark else []
        self.images += [given["src"] or ""] if "src" in given else []


def shown(text: str) -> Links:
    """Read the links of a document as PyPI shows it."""
    html = markdown.render(text)
    assert html
    return Links(html)


def anchors(document: Path) -> set[str]:
    """Return the names that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_place(path: Path, anchor: str) -> None:
    """Assert that a path is a file of the repository, with a heading of that name if one is given."""
    assert path.is_file()
    assert path.resolve().is_relative_to(ROOT.resolve())
    assert not anchor or anchor in anchors(path)


def code(text: str) -> list[str]:
    """Return all code in a document."""
    return re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built / f"lightning_drive-{VERSION}-py3-none-any.whl")


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> RawMetadata:
    return parse_email(wheel.read(f"lightning_drive-{VERSION}.dist-info/METADATA"))[0]


@pytest.fixture(scope="module")
def repository(metadata: RawMetadata) -> str:
    return metadata["project_urls"]["Repository"]


# Files


def test_wheel__files(wheel: zipfile.ZipFile) -> None:
    """The wheel has the package whole, and nothing else."""
    names = set(wheel.namelist())
    package = {name for name in names if name.startswith("lightning_drive/")}
    assert package == files_of("lightning_drive")
    assert "lightning_drive/py.typed" in package
    assert {name.split("/")[0] for name in names - package} == {f"lightning_drive-{VERSION}.dist-info"}


def test_sdist__files(built: Path) -> None:
    """The source distribution has what its tests, examples and documents need, and nothing that lies about."""
    with tarfile.open(built / f"lightning_drive-{VERSION}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    top = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}
    assert {name.split("/")[0] for name in names} == top | set(FOLDERS)
    for folder in ("lightning_drive", ".ci", ".github"):
        assert {name for name in names if name.startswith(f"{folder}/")} == files_of(folder)
    sources = {name for folder in FOLDERS for name in files_of(folder) if Path(name).suffix in {".py", ".md", ".yml"}}
    assert names >= sources
    assert not [name for name in names if name.endswith((".pyc", ".ckpt")) or "site-packages" in name]


# Metadata


def test_urls(metadata: RawMetadata) -> None:
    """All addresses are those of one repository and its site."""
    urls = metadata["project_urls"]
    owner, name = urls["Repository"].removeprefix("https://github.com/").split("/")
    assert urls == {
        "Repository": f"https://github.com/{owner}/{name}",
        "Documentation": f"https://{owner}.github.io/{name}/",
        "Changelog": f"https://github.com/{owner}/{name}/blob/main/CHANGELOG.md",
        "Issues": f"https://github.com/{owner}/{name}/issues",
    }


def test_urls__stand_for_all(metadata: RawMetadata) -> None:
    """Whatever else in the repository names an address of ours has that of the package."""
    urls = metadata["project_urls"]
    ours = re.compile(r"https://(?:github\.com/[\w.-]+|[\w-]+\.github\.io)/lightning[-_]drive\b")
    texts = [path for folder in FOLDERS for path in map(ROOT.joinpath, sorted(files_of(folder)))]
    kinds = {".cff", ".html", ".ipynb", ".md", ".py", ".toml", ".yml"}
    for path in [path for path in (*sorted(ROOT.glob("*.*")), *texts) if path.suffix in kinds]:
        found = set(ours.findall(path.read_text(encoding="utf-8")))
        assert found <= {urls["Repository"], urls["Documentation"].rstrip("/")}, path
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["repository-code"] == urls["Repository"]


def test_urls__are_filled_in_by_one_command(tmp_path: Path) -> None:
    """The command in CONTRIBUTING.md leaves no placeholder behind."""
    contributing = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [command] = [block for block in re.findall(r"```bash\n(.*?)```", contributing, flags=re.DOTALL) if "OWNER" in block]
    for path in (Path("pyproject.toml"), Path("CITATION.cff"), *map(Path, files_of("docs/site"))):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    written = command.replace("OWNER", "somebody").replace("REPOSITORY", "elsewhere")
    for step in ("git init --quiet", "git add .", written):
        subprocess.run(["bash", "-euo", "pipefail", "-c", step], cwd=tmp_path, check=True)
    texts = [path.read_text() for path in tmp_path.rglob("*.*") if path.suffix in {".cff", ".toml", ".yml"}]
    assert not [text for text in texts if re.search(r"lightning-drive(\.github\.io)?/lightning-drive", text)]
    assert 'Documentation = "https://somebody.github.io/elsewhere/"' in (tmp_path / "pyproject.toml").read_text()
    assert "https://github.com/somebody/elsewhere/blob/v$HFPR_VERSION/" in (tmp_path / "pyproject.toml").read_text()


def test_python_versions(metadata: RawMetadata) -> None:
    """The classifiers name exactly the versions of Python that CI runs; the lowest is the lowest that is allowed."""
    jobs = yaml.safe_load((WORKFLOWS / "ci.yml").read_text())["jobs"]
    tested = {job["python"] for job in jobs["test"]["strategy"]["matrix"]["include"]}
    named = {found[1] for name in metadata["classifiers"] if (found := re.fullmatch(r".*Python :: (\d\.\d+)", name))}
    assert named == tested
    assert metadata["requires_python"] == f">={min(tested, key=lambda version: int(version.partition('.')[2]))}"


def test_version_is_one(metadata: RawMetadata) -> None:
    """Package, metadata, citation and changelog agree on version and day."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    version, _, day = headings[1].partition(" - ")
    assert {version, cited["version"], metadata["version"]} == {VERSION}
    assert date.fromisoformat(day) == cited["date-released"]


# Links


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links__in_the_repository(document: Path) -> None:
    """What is no address of the web is a file of the repository, and a heading in it."""
    found = shown(document.read_text(encoding="utf-8"))
    assert found.links or document.name == "SECURITY.md"
    for link in (*found.links, *found.images):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        check_place(document.parent / path if path else document, anchor)


@pytest.mark.parametrize("document", sorted((ROOT / ".github").glob("*.md")), ids=lambda path: path.name)
def test_paths__are_there(document: Path) -> None:
    """Whoever looks for what a document names finds it, in the repository or in the package."""
    named = re.findall(r"`([\w.]+/[\w./]*|\w+\.(?:md|py|toml|yml|cff))`", document.read_text(encoding="utf-8"))
    places = (ROOT, ROOT / "lightning_drive", WORKFLOWS)
    assert [path for path in named if not any((place / path).exists() for place in places)] == []


def test_links__outside_the_repository(metadata: RawMetadata, repository: str) -> None:
    """On PyPI all links of the README are whole addresses; those of files lead to them at the tag of the version."""
    here, there = shown((ROOT / "README.md").read_text(encoding="utf-8")), shown(metadata["description"])
    assert [len(there.links), len(there.images)] == [len(here.links), len(here.images)]
    assert all(link.startswith("https://") for link in (*there.links, *there.images))
    for kind, found in (("blob", there.links), ("raw", there.images)):
        files = [link for link in found if link.startswith(f"{repository}/")]
        assert files
        for link in files:
            path, _, anchor = link.removeprefix(f"{repository}/{kind}/v{VERSION}/").partition("#")
            check_place(ROOT / path, anchor)


def test_description__is_the_readme(metadata: RawMetadata) -> None:
    """Only links differ: no line of code is taken for one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["description_content_type"] == "text/markdown"
    assert code(metadata["description"]) == code(readme)
    without_links = [re.sub(r"\]\([^)]*\)", "]()", text).strip() for text in (metadata["description"], readme)]
    assert without_links[0] == without_links[1]


# Releases, issues, security


def release() -> dict[str, Any]:
    """Return the jobs of a release."""
    jobs: dict[str, Any] = yaml.safe_load((WORKFLOWS / "release.yml").read_text())["jobs"]
    return jobs


def test_release__is_published_by_trust() -> None:
    """What is published was built and tested; only what publishes may ask for an identity, and there is no secret."""
    jobs = release()
    assert set(jobs["publish"]["needs"]) == {"test", "build"}
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in yaml.safe_load((WORKFLOWS / "ci.yml").read_text())[True]  # `on`, in YAML 1.1
    assert {name for name, job in jobs.items() if "id-token" in job.get("permissions", {})} == {"publish", "site"}
    assert not re.search(r"secrets|password|token:(?! write)", (WORKFLOWS / "release.yml").read_text())


@pytest.mark.parametrize(
    ("version", "elsewhere", "accepted"),
    [
        pytest.param(VERSION, "", True, id="right"),
        pytest.param("9.9.9", "", False, id="another_version"),
        pytest.param(VERSION, "-copy", False, id="another_repository"),
    ],
)
def test_release__compares(version: str, elsewhere: str, accepted: bool, repository: str) -> None:
    """A release stops where the tag is not the version, or the addresses are not those of the repository."""
    [step] = [step for step in release()["build"]["steps"] if step.get("name", "").startswith("Compare")]
    server, _, path = repository.removeprefix("https://").partition("/")
    environment = {
        "GITHUB_REF_NAME": f"v{version}",
        "GITHUB_SERVER_URL": f"https://{server}",
        "GITHUB_REPOSITORY": path + elsewhere,
    }
    done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=ROOT, env={**os.environ, **environment})
    assert (done.returncode == 0) is accepted


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms(form: Path) -> None:
    """Every question has a name of its own, and what a form sends people to is there."""
    text = form.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert {"name", "description", "body"} <= content.keys()
    questions = [part for part in content["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in questions}) == len(questions)
    assert all(part["attributes"]["label"] for part in questions)
    for path in re.findall(r"[\w./]+\.md", text):
        check_place(ROOT / path, "")


def calls(source: str) -> Iterable[tuple[str, dict[str, ast.expr]]]:
    """Return the name of every function that is called, and its arguments by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords if word.arg}


def test_security__one_door_to_pickles() -> None:
    """No file is unpickled but by `--trust-pickle`, as SECURITY.md says."""
    doors, trusting = [], []
    for name in sorted(files_of("lightning_drive")):
        for function, words in calls((ROOT / name).read_text(encoding="utf-8")) if name.endswith(".py") else ():
            if function in {"torch.load", "checkpoints.load", "pickle.load", "pickle.loads"}:
                doors.append(function)
            assert function != "torch.load" or "weights_only" in words, name
            if isinstance(given := words.get("weights_only"), ast.Constant) and given.value is False:
                trusting.append(name)
    assert {"torch.load", "checkpoints.load"} == set(doors)
    assert trusting == ["lightning_drive/command_files.py"]
