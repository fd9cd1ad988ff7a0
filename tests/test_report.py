"""The run report: what is read of a run, what is drawn of it, and the page in a browser."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from helpers import CHROMIUM
from PIL import Image
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import gndpo_trl
from gndpo_trl.report.command import main, write_report
from gndpo_trl.report.figures import COLOURS, look, overlaid, smooth
from gndpo_trl.report.runs import THROUGHPUT, TokenPage, newest_state, printable, read_run, read_runs, short_names


NAN = float("nan")


def write_state(folder: Path, history: list[dict], **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = TrainerState(log_history=history, **{"global_step": 4, "max_steps": 10, **options})
    state.save_to_json(str(folder / "trainer_state.json"))
    return folder


def write_tokens(folder: Path, *names: str) -> None:
    (folder / "token_scores").mkdir()
    for name in names:
        (folder / "token_scores" / name).write_text("tokens")


def history(scale: float = 1.0) -> list[dict]:
    return [
        {
            "step": step,
            "reverse_kl": scale / step,
            "grad_norm": scale * (9.0 if step == 3 else 1.0),
            "rewards/accuracy/mean": step / 10,
            "rewards/teacher_score/mean": -1.0,
            "completions/mean_length": 20.0 + step,
            **{f"score/p{quantile}": (int(quantile) - 60) / 50 * scale for quantile in ("01", "10", "50", "90", "99")},
            "score/mean": -0.3,
            "num_tokens": 1000.0 * step,
            "step_time": 2.0,
            "time/teacher_scoring": 0.5,
        }
        for step in range(1, 5)
    ]


# ---- what is read


def test_curves_hold_what_was_logged(tmp_path):
    entries = [
        {"step": 1, "reverse_kl": 0.5},
        {"step": 2, "reverse_kl": NAN},
        {"step": 3, "reverse_kl": None, "grad_norm": 2},
        {"step": 4, "reverse_kl": 0.4},
        {"step": 4, "eval_reverse_kl": 0.6},
        # A run that went on from step 2.
        {"step": 4, "reverse_kl": 0.3},
        {"step": 3, "reverse_kl": 0.35},
        {"train_runtime": 5.0, "step": 4},
    ]
    run = read_run(write_state(tmp_path / "run", entries), "run")
    for metric, expected in {
        "reverse_kl": ([1, 3, 4], [0.5, 0.35, 0.3]),
        "eval_reverse_kl": ([4], [0.6]),
        "grad_norm": ([3], [2.0]),
        "unknown": ([], []),
    }.items():
        steps, values = run.curve(metric)
        assert (steps.tolist(), values.tolist()) == expected
    assert (run.step, run.max_steps) == (4, 10)


def test_throughput_counts_the_tokens_between_two_logs(tmp_path):
    entries = [
        {"step": 5, "num_tokens": 1000.0, "step_time": 1.0},
        {"step": 10, "num_tokens": 3000.0, "step_time": 2.0},
        {"step": 20, "num_tokens": 4000.0, "step_time": 0.0},
        {"step": 25, "num_tokens": 5000.0, "step_time": 4.0},
        {"step": 30, "num_tokens": 100.0, "step_time": 4.0},  # counted anew
    ]
    steps, values = read_run(write_state(tmp_path / "run", entries), "run").curve(THROUGHPUT)
    # 2,000 tokens in 5 steps of 2 s; 1,000 in 5 steps of 4 s.
    assert (steps.tolist(), values.tolist()) == ([10, 25], [200.0, 50.0])


def test_token_pages_are_found_by_step_and_mode(tmp_path):
    folder = write_state(tmp_path / "run", history())
    write_tokens(
        folder, "train_00002.html", "train_00010.html", "eval_00002.html", "eval_my_set_123456.html", "x.html"
    )
    (folder / "token_scores" / "train_00002.parquet").touch()
    run = read_run(folder, "run")
    assert [(page.step, page.mode) for page in run.token_pages] == [
        *((2, "eval"), (2, "train"), (10, "train")),
        (123456, "eval_my_set"),
    ]
    assert [run.page_at(step) and run.page_at(step).step for step in (1, 2, 9, 10, 200_000)] == [None, 2, 2, 10, 10]
    assert isinstance(run.page_at(2), TokenPage) and run.page_at(2).path.is_file()


def test_a_run_in_progress_is_read_from_its_newest_checkpoint(tmp_path):
    write_state(tmp_path / "checkpoint-2", history()[:2], global_step=2)
    write_state(tmp_path / "checkpoint-10", history(), global_step=10)
    write_tokens(tmp_path, "train_00002.html")
    assert read_run(tmp_path, "run").step == 10
    checkpoint = read_run(tmp_path / "checkpoint-2", "run")
    assert checkpoint.step == 2 and len(checkpoint.token_pages) == 1
    write_state(tmp_path, history(), global_step=3)  # a shorter run that has overwritten the one before
    assert read_run(tmp_path, "run").step == 3


def test_runs_are_named_by_as_much_of_their_paths_as_differs():
    paths = [Path("/a/x/run"), Path("/a/y/run"), Path("/a/y/other")]
    assert short_names(paths[1:]) == ["run", "other"]
    assert short_names(paths) == ["x/run", "y/run", "y/other"]


def spoil(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "trainer_state.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path / "run", "is not a folder. Give the `output_dir`"),
        (lambda path: path, "has no trainer_state.json.*`trainer.save_state()`"),
        (lambda path: spoil(path / "run", '{"log_history": ['), "is not a trainer state, or not a whole one"),
        (lambda path: spoil(path / "run", "[]"), "is not a trainer state, or not a whole one"),
        (lambda path: write_state(path / "run", []), "has no logs"),
        (lambda path: write_state(path / "run", [{"step": 0, "epoch": 0.0}]), "has no logs"),
    ],
)
def test_a_folder_that_holds_no_run_is_refused(tmp_path, capsys, make, message):
    with pytest.raises(SystemExit) as stopped:
        main([str(make(tmp_path))])
    assert stopped.value.code == 2
    assert re.search(message.replace("()", r"\(\)"), capsys.readouterr().err)


def test_a_run_given_twice_is_refused(tmp_path):
    folder = write_state(tmp_path / "run", history())
    with pytest.raises(ValueError, match="given twice"):
        read_runs([folder, tmp_path / "run" / "." / "token_scores" / ".."])


def test_a_missing_matplotlib_is_said(tmp_path, monkeypatch):
    folder = write_state(tmp_path / "run", history())
    monkeypatch.delitem(sys.modules, "gndpo_trl.report.figures", raising=False)
    monkeypatch.delitem(sys.modules, "gndpo_trl.report.page", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install gndpo-trl\[report\]"):
        write_report([folder], tmp_path / "report")


# ---- what is drawn


def test_smoothing_is_a_moving_average_that_keeps_ends_and_short_curves():
    values = np.arange(10.0)
    np.testing.assert_array_equal(smooth(values), values)
    values = np.zeros(80)
    values[[0, 40]] = 5.0
    smoothed = smooth(values)  # over two values on either side
    np.testing.assert_allclose(smoothed[38:43], 1.0)
    np.testing.assert_allclose(smoothed[[0, 1, 2, 3]], [5 / 3, 5 / 4, 1.0, 0.0])
    assert len(smoothed) == 80


def test_no_two_runs_look_alike():
    assert len({tuple(look(number).items()) for number in range(32)}) == 32


def colours_in(path: Path) -> set[tuple[int, ...]]:
    return set(Image.open(path).convert("RGB").getdata())


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def test_runs_lie_over_each_other_and_what_they_lack_is_left_out(tmp_path):
    first = write_state(tmp_path / "first", [*history(), {"step": 2, "eval_reverse_kl": 0.4}])
    second = write_state(tmp_path / "second", [{"step": 1, "grad_norm": 0.0}, {"step": 2, "grad_norm": 3.0}])
    page = write_report([first, second], tmp_path / "report")
    names = {path.name for path in page.parent.glob("*.png")}
    assert names == {
        *("reward_0.png", "reverse_kl.png", "grad_norm.png", "scores.png", "length.png", "seconds.png"),
        "throughput.png",
    }
    of_first, of_second = rgb(COLOURS[0]), rgb(COLOURS[1])
    assert {of_first, of_second} <= colours_in(page.parent / "grad_norm.png")
    found = colours_in(page.parent / "reverse_kl.png")
    assert of_first in found and of_second not in found


def test_names_of_any_characters_stand_in_the_figures_as_they_are(tmp_path):
    """`$` would begin a formula, which `$\\frac$` is not even, and curves of names with `_` in front would have no label."""
    names = ["a $x^2$ b", "$\\frac$", "_run", "__", "100% & <b>", "ü\nx", "\udcff", "begin" + "x" * 200 + "end"]
    entries = [{"step": 1, "reverse_kl": 0.5}, {"step": 2, "eval_$\\frac$_reverse_kl": 0.4}]
    folder = write_state(tmp_path / "run", entries)
    runs = [read_run(folder, printable(name)) for name in names]
    figure = overlaid(runs, "Reward: $\\frac$", "reverse_kl", False)
    figure.savefig(tmp_path / "figure.png")
    *found, long, of_long = [text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()]
    assert long.startswith("beginx") and long.endswith("xend") and "…" in of_long and len(long) < 70
    shown = [*names[:5], "ü\ufffdx", "\ufffd"]
    assert found == [text for name in shown for text in (name, f"{name}, eval_$\\frac$")]

    # Names that no page can hold, and figures that stand side by side.
    folders = [write_state(tmp_path / name, history()[:1]) for name in ("$\\frac$", "_run \udcff\n$")]
    write_tokens(folders[1], "train_00002.html")
    text = write_report(folders, tmp_path / "report \udcff").read_text()
    assert "<td>_run \ufffd\ufffd$</td>" in text and "%FF%0A%24/token_scores/train_00002.html" in text


def test_a_single_point_is_drawn(tmp_path):
    page = write_report([write_state(tmp_path / "run", history()[:1])], tmp_path / "report")
    assert rgb(COLOURS[0]) in colours_in(page.parent / "reverse_kl.png")


# ---- the page


def test_a_run_is_reported_with_its_tokens(make_trainer, text_dataset, capsys):
    evaluation = {"eval_dataset": text_dataset.select(range(4))}
    options = {"log_completions": True, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(trainer_options=evaluation, **options)
    trainer.train()
    trainer.save_state()
    folder = Path(trainer.args.output_dir)
    assert main([str(folder)]) == 0
    page = folder / "report" / "report.html"
    assert str(page) in capsys.readouterr().out
    text = page.read_text()
    links = [page.parent / unquote(link) for link in re.findall(r'href="([^"]*)"', text)]
    pages = {"train_00001.html", "train_00002.html", "eval_00002.html"}
    assert {link.resolve() for link in links} == {folder.resolve() / "token_scores" / name for name in pages}
    last = [entry for entry in trainer.state.log_history if "reverse_kl" in entry][-1]
    for name in ("reverse_kl", "scores", "grad_norm", "length", "seconds", "throughput"):
        assert len(colours_in(page.parent / f"{name}.png")) > 50, "an empty picture"
    assert f"<td>{last['reverse_kl']:.3f}</td>" in text
    assert "2 of 2" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install Debian's package `chromium`")
def test_a_browser_shows_the_page_and_asks_for_nothing_else(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    nasty = "<img src=x onerror='window.hacked = 1'>"
    first = write_state(tmp_path / f"a {nasty} & ü?#", history())
    write_tokens(first, "train_00002.html", "eval_<b>_00002.html")
    second = write_state(tmp_path / "second", history(2.0))
    page = write_report([first, second], tmp_path / "report")
    asked, complaints = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1300, "height": 900})
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.goto(page.as_uri())
        assert [url for url in asked if not url.startswith("data:image/png;")] == [page.as_uri()]
        assert not complaints and not tab.evaluate("window.hacked")
        assert nasty in tab.locator("h1").text_content()
        sizes = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(sizes) == len(list(page.parent.glob("*.png"))) and min(sizes) > 500

        rows = [row.locator("td").all_text_contents() for row in tab.locator("table").nth(1).locator("tr").all()[1:]]
        norms = [row for row in rows if row[1] == "largest gradient norm"]
        assert norms[0][2:] == ["9.000", "3", "2"] and norms[1][2:] == ["18.000", "3", "none at or before it"]
        assert "set log_completions: true" in tab.locator("body").text_content()
        tab.locator("table").nth(1).get_by_role("link").first.click()
        assert tab.locator("body").text_content() == "tokens"
        browser.close()


def test_names_that_mean_something_in_html_stay_text(tmp_path):
    folder = write_state(tmp_path / "<b>&", history())
    text = write_report([folder], tmp_path / "report").read_text()
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text


def test_the_command_is_installed(tmp_path):
    folder = write_state(tmp_path / "run", history())
    command = Path(sys.executable).with_name("gndpo-report")
    process = subprocess.run([command, folder], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (folder / "report" / "report.html").is_file()


def test_a_report_is_made_without_loading_torch_or_trl(tmp_path):
    folder = write_state(tmp_path / "run", history())
    script = (
        "import sys, gndpo_trl, gndpo_trl.report.command as command; command.main(sys.argv[1:]); print(*sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    loaded = set(process.stdout.split())
    assert "gndpo_trl.report.page" in loaded and not loaded & {"datasets", "torch", "transformers", "trl"}


def test_files_have_the_names_that_transformers_gives_them(tmp_path):
    write_state(tmp_path / f"{PREFIX_CHECKPOINT_DIR}-2", history())
    assert newest_state(tmp_path).name == TRAINER_STATE_NAME


def test_the_package_exports_what_it_lists_and_nothing_else():
    assert {*gndpo_trl.__all__} <= {*dir(gndpo_trl)}
    assert gndpo_trl.GNDPOTrainer.__name__ == "GNDPOTrainer"
    with pytest.raises(AttributeError, match="has no attribute 'GNDPOTrain'"):
        _ = gndpo_trl.GNDPOTrain
