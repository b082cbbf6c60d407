"""Runs tutorial.ipynb from top to bottom, in a fresh kernel of this Python and keeps what it shows: `make tutorial`."""

import json
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager

from aib_tf import files

NOTEBOOK = Path(__file__).parent / "tutorial.ipynb"
_LIMIT = 600  # seconds for one cell, on a busy machine


def executed(path):
    """Runs a notebook, in a temporary folder.

    Args:
        path: the notebook, which stays as it is.

    Returns:
        The notebook with the outputs of this run. What was written to stderr is left out: TensorFlow tells there about
        the machine.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raised an exception.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # A kernel of this name that the user has installed may be another Python.
        specification = Path(folder, "kernels", "python3", "kernel.json")
        specification.parent.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        specification.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
        kernels = KernelSpecManager(kernel_dirs=[str(specification.parents[1])], ensure_native_kernel=False)
        nbclient.NotebookClient(
            notebook,
            km=AsyncKernelManager(
                kernel_name="python3",
                kernel_spec_manager=kernels,
                transport="ipc",  # needs no free port, and nobody else can connect
                connection_file=str(Path(folder, "connection.json")),
            ),
            timeout=_LIMIT,
            startup_timeout=_LIMIT,
            record_timing=False,
            coalesce_streams=True,  # how often the kernel sent what was printed depends on its pace
            resources={"metadata": {"path": folder}},
        ).execute(cleanup_kc=True)  # ends the kernel
    notebook.metadata["language_info"] = {"name": "python"}  # without the version, which another run changes
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    with files.replacing(NOTEBOOK) as temporary:
        nbformat.write(executed(NOTEBOOK), temporary)
