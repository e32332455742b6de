"""Executes the notebooks beside it, as `make check` does; with --write their outputs are kept in the files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 900


def main(arguments: list[str]) -> None:
    """Run each notebook from its own folder; an error in a cell ends with that cell and its traceback."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=TIMEOUT_SECONDS, resources={"metadata": {"path": str(HERE)}}).execute()
        if "--write" in arguments:
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)  # times, which differ from run to run
                if cell.cell_type == "code":  # warnings of libraries name folders of this machine
                    cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            nbformat.write(notebook, path)
        print(f"{path.name}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells ran")


if __name__ == "__main__":
    main(sys.argv[1:])
