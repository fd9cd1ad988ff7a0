"""The notebooks, executed from top to bottom: two that make their models, for few steps, and one on drawn problems."""

import html
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny_geometry import build_geometry
from transformers import AutoModelForImageTextToText

from gndpo_trl.data import prepare_questions


EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "notebooks" / "gndpo_geometry.ipynb"
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


# Notebooks that are committed with what they printed and drew.
SHOWN = ["gndpo_sorting", "gndpo_digits"]


def shown_page(cell) -> str:
    """The page of the token view that a cell shows, which an attribute of its output holds."""
    return html.unescape(re.search(r'srcdoc="([^"]*)"', cell.outputs[0].data["text/html"])[1])


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("name", SHOWN)
def test_committed_outputs_show_a_run_that_helped(name):
    path = EXAMPLES / "notebooks" / f"{name}.ipynb"
    assert path.stat().st_size < 600_000
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1)), "run it as a whole"
    assert all(output.get("name") != "stderr" for cell in cells.values() for output in cell.outputs)
    assert has_figure(cells["plot"])
    before, after = (float(share) for share in re.findall(r"([\d.]+)% (?:before|after)", printed(cells["train"])))
    assert after > before + 20
    pages = [shown_page(cells[cell]) for cell in ("tokens", "after")]
    steps = [int(re.search(r"<title>Tokens of step (\d+), train</title>", page)[1]) for page in pages]
    assert steps[0] == 1 and steps[1] >= 80


@pytest.mark.processes
@pytest.mark.parametrize("name", SHOWN)
def test_notebooks_that_make_their_models_run(name, tmp_path, monkeypatch):
    notebook = nbformat.read(EXAMPLES / "notebooks" / f"{name}.ipynb", as_version=4)
    folder = tmp_path / "examples" / "notebooks"
    folder.mkdir(parents=True)
    variables = {
        "GNDPO_NOTEBOOK_SFT_STEPS": "2",
        "GNDPO_NOTEBOOK_STEPS": str(STEPS),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
        "MPLBACKEND": "inline",
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")]),
    }
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    for cell in code_cells(notebook).values():
        cell.outputs = []
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(folder)}}).execute()
    cells = code_cells(notebook)
    assert has_figure(cells["plot"])
    assert "% before" in printed(cells["train"])
    assert f"<title>Tokens of step {STEPS}, train</title>" in shown_page(cells["after"])
