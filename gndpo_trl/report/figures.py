"""The figures of the run report: curves of several runs in one, smoothed with what was logged behind."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .runs import THROUGHPUT, Run


# Wong's palette (Nature Methods 8, 441), whose colours the colour-blind can tell apart; dashes tell lines apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8F7700")
DASHES = ("solid", "dashed", "dashdot", "dotted")

# Of the name of a run in a figure.
MOST_CHARACTERS = 60

# Share of a curve that its moving average spans.
SPAN = 0.05

# Largest over smallest value from which a logarithmic axis reads better.
DECADES = 20

STAND_IN = "teacher_score"
PHASES = {
    "step_time": "a whole step",
    "time/generation": "generation",
    "time/teacher_scoring": "teacher scoring",
    "time/student_scoring": "student scoring",
    "time/reference_scoring": "reference scoring",
    "time/distributions": "distributions",
}
BANDS = (("score/p01", "score/p99", 0.15), ("score/p10", "score/p90", 0.35))


@dataclass(frozen=True)
class Picture:
    """A figure that was written, and what it shows in words, for those who cannot see it."""

    path: Path
    text: str


def draw(runs: list[Run], folder: Path) -> list[Picture]:
    """
    Draw the figures that these runs have metrics for.

    Args:
        runs (`list[Run]`): What to overlay.
        folder (`Path`): Where the PNGs go.

    Returns:
        `list[Picture]`: in the order of the page.
    """
    pictures = []

    def overlay(name: str, title: str, metric: str, log_scale: bool = False) -> None:
        keep(name, title, overlaid(runs, title, metric, log_scale))

    def side_by_side(name: str, title: str, metrics: Iterable[str], draw_run: Callable[[Axes, Run], None]) -> None:
        shown = [run for run in runs if any(len(run.curve(metric)[0]) for metric in metrics)]
        if shown:
            keep(name, title, beside(shown, title, len(runs) > 1, draw_run))

    def keep(name: str, title: str, figure: Figure | None) -> None:
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150)
            pictures.append(Picture(path, f"{title}: {', '.join(run.name for run in runs)}"))

    for number, reward in enumerate(rewards(runs)):
        overlay(f"reward_{number}", f"Reward: {reward}", f"rewards/{reward}/mean")
    overlay("reverse_kl", "Reverse KL to the teacher, nats per token", "reverse_kl")
    overlay("grad_norm", "Gradient norm before clipping", "grad_norm", log_scale=True)
    side_by_side("scores", "Scores before the clamp, nats", ["score/p50"], draw_scores)
    overlay("length", "Completion length, tokens", "completions/mean_length")
    overlay("clipped", "Share of completions cut off at the limit", "completions/clipped_ratio")
    overlay("entropy", "Entropy of the student, nats per token", "entropy")
    side_by_side("seconds", "Seconds of a step, and of what is done for a generation batch", PHASES, draw_seconds)
    overlay("throughput", "Tokens per second, prompts included", THROUGHPUT)
    return pictures


def rewards(runs: list[Run]) -> list[str]:
    """Names of the reward functions; the stand-in of runs without any is the reverse KL once more."""
    names = [name.split("/", 1)[1].removesuffix("/mean") for run in runs for name in run.metrics() if is_reward(name)]
    return [name for name in dict.fromkeys(names) if name != STAND_IN]


def is_reward(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average `(N,)` over `SPAN` of the curve, over fewer values at its ends."""
    half = int(len(values) * SPAN / 2)
    window = np.ones(2 * half + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def look(number: int) -> dict:
    """Colour and dashes of a run: no two are alike among the first 32."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[(number + number // len(COLOURS)) % len(DASHES)],
    }


def new_figure(columns: int = 1, rows: int = 1) -> tuple[Figure, np.ndarray]:
    # Not through pyplot, which would choose a window system and keep every figure.
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4 * columns, 3.6 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.set_xlabel("step")
    return figure, axes


def overlaid(runs: list[Run], title: str, metric: str, log_scale: bool) -> Figure | None:
    """A metric of all runs, with that of their evaluations as points, or None where no run has it."""
    figure, ((axis,),) = new_figure()
    lowest, highest = np.inf, -np.inf
    for number, run in enumerate(runs):
        style = look(number)
        steps, values = run.curve(metric)
        if len(steps):
            lowest, highest = min(lowest, values.min()), max(highest, values.max())
            draw_curve(axis, steps, values, run.name, style)
        for name in evaluations(run, metric):
            at, points = run.curve(name)
            lowest, highest = min(lowest, points.min()), max(highest, points.max())
            label = f" {run.name}, {name.removesuffix(metric).rstrip('_')}"
            axis.plot(at, points, "o:", markersize=4, linewidth=1, color=style["color"], label=label)
    if np.isinf(lowest):
        return None
    if log_scale and 0 < DECADES * lowest < highest:
        axis.set_yscale("log")
    axis.set_title(title, parse_math=False)
    add_legend(axis)
    return figure


def add_legend(axis: Axes) -> None:
    for text in axis.legend(fontsize="small").get_texts():
        text.set_parse_math(False)
        text.set_text(trimmed(text.get_text()))


def trimmed(name: str) -> str:
    """A name that leaves room for curves: of a long one, the beginning and the end."""
    return name if len(name) <= MOST_CHARACTERS else f"{name[: MOST_CHARACTERS // 2]}…{name[-MOST_CHARACTERS // 2 :]}"


def draw_curve(axis: Axes, steps: np.ndarray, values: np.ndarray, label: str, style: dict) -> None:
    label = f" {label}"  # matplotlib leaves labels that begin with "_" out of legends
    if len(steps) == 1:
        axis.plot(steps, values, "s", color=style["color"], label=label)
        return
    axis.plot(steps, values, color=style["color"], alpha=0.3, linewidth=0.8)
    axis.plot(steps, smooth(values), linewidth=1.8, label=label, **style)


def evaluations(run: Run, metric: str) -> list[str]:
    """Names of a metric in evaluations: `eval_{metric}`, or `eval_{set}_{metric}` for each of several sets."""
    return [name for name in run.metrics() if name.startswith("eval_") and name.endswith(f"_{metric}")]


def beside(runs: list[Run], title: str, is_named: bool, draw_run: Callable[[Axes, Run], None]) -> Figure:
    """Axes for each run, with one scale; `is_named` says whether a run's name stands above its own."""
    columns = min(len(runs), 2)
    figure, axes = new_figure(columns, -(-len(runs) // columns))
    for axis, run in zip(axes.flat, runs, strict=False):
        draw_run(axis, run)
        axis.set_title(trimmed(run.name) if is_named else title, parse_math=False)
        add_legend(axis)
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    if is_named:
        figure.suptitle(title, parse_math=False)
    return figure


def draw_scores(axis: Axes, run: Run) -> None:
    """Bands between quantiles of the scores, and their median."""
    steps, median = run.curve("score/p50")
    for low, high, alpha in BANDS:
        at, bottom = run.curve(low)
        _, top = run.curve(high)
        if len(at) == 1:
            axis.errorbar(at, median, [median - bottom, top - median], color=COLOURS[0], alpha=2 * alpha)
        else:
            label = f"{int(low[-2:])} to {int(high[-2:])} %"
            axis.fill_between(at, smooth(bottom), smooth(top), color=COLOURS[0], alpha=alpha, label=label, linewidth=0)
    draw_curve(axis, steps, median, "median", {"color": COLOURS[6], "linestyle": "solid"})
    mean_at, mean = run.curve("score/mean")
    draw_curve(axis, mean_at, mean, "mean", {"color": COLOURS[1], "linestyle": "dashed"})


def draw_seconds(axis: Axes, run: Run) -> None:
    """Time of a step, and of the phases that a generation batch goes through."""
    curves = [(label, *run.curve(metric)) for metric, label in PHASES.items()]
    for number, (label, steps, seconds) in enumerate(curve for curve in curves if len(curve[1])):
        draw_curve(axis, steps, seconds, label, look(number))
    axis.set_ylim(bottom=0)
