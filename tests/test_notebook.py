"""The notebook, executed from top to bottom on tiny models and drawn geometry problems."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny_geometry import build_geometry
from transformers import AutoModelForImageTextToText

from gndpo_trl.data import prepare_questions


NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebooks" / "gndpo_geometry.ipynb"
STEPS = 2


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def has_figure(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def test_the_committed_notebook_has_no_outputs(notebook):
    for name, cell in code_cells(notebook).items():
        assert cell.outputs == [] and cell.execution_count is None, name


@pytest.mark.processes
def test_every_cell_runs(notebook, checkpoints, tmp_path, monkeypatch):
    data, folder = tmp_path / "data", tmp_path / "examples" / "notebooks"
    data.mkdir()
    folder.mkdir(parents=True)
    for split, rows in build_geometry().items():
        prepare_questions(rows, split).to_parquet(data / f"{split}.parquet")
    variables = {  # the kernel inherits them
        "GNDPO_NOTEBOOK_STUDENT": checkpoints["internvl-student"],
        "GNDPO_NOTEBOOK_TEACHER": checkpoints["internvl-teacher"],
        "GNDPO_NOTEBOOK_DATA": str(data),
        "GNDPO_NOTEBOOK_STEPS": str(STEPS),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
        "MPLBACKEND": "inline",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    client = NotebookClient(
        notebook,
        timeout=200,
        resources={"metadata": {"path": str(folder)}},
        # registers the processor of the tiny checkpoints
        extra_arguments=["--IPKernelApp.exec_lines=import tiny_models"],
    )
    client.execute()  # raises the error of a cell that fails

    cells = code_cells(notebook)
    for name, cell in cells.items():
        assert cell.execution_count is not None, name
    assert has_figure(cells["problems"])
    assert has_figure(cells["plot"])
    output = tmp_path / "runs" / "notebook"
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "score/mean" in entry] == list(range(1, STEPS + 1))
    AutoModelForImageTextToText.from_pretrained(output)
