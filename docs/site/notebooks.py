"""Run the notebooks of the documentation from top to bottom, and write their outputs into them.

A minute or two; only `docs/notebooks/*.ipynb` change:

    python docs/site/notebooks.py
"""

import os
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def run(path: Path, folder: Path) -> NotebookNode:
    """Return a notebook with the outputs of a run in a folder, on the package of this checkout and on one thread."""
    notebook = nbformat.read(path, as_version=4)
    places = {name: str(folder / name) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    with tempfile.TemporaryDirectory() as sockets:  # files instead of ports, whose paths have to be short
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(Path(sockets) / "kernel"))
        client = NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(folder)}})
        return client.execute(env=environment, cleanup_kc=True)


def light(notebook: NotebookNode) -> NotebookNode:
    """Leave out what nobody reads: times of execution, the version of Python, and the plain form of what is a table."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):
                output.data.pop("text/plain", None)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main() -> None:
    """Run all of them."""
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(light(run(path, Path(folder))), path)


if __name__ == "__main__":
    main()
