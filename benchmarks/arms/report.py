"""
The tables of `docs/evidence_tables.md` and the figures of `docs/evidence.md`, from the rows of the arms' runs, `gradient_noise.py`, `moments.py` and
`pretrained.py`. Those of `timed_runs.parquet` are of runs of the arms too, which had the machine for themselves.

    python -m benchmarks.arms.report            # rewrites them in the document
    python -m benchmarks.arms.report --print    # prints the tables

Intervals are percentile bootstraps of the mean over seeds. Differences are paired: the same seed means the same data, the
same two models and the same prompts, so that what a seed makes easy for all arms does not enter them. With five seeds an
interval is an impression: it resamples five numbers.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gndpo_trl.report.figures import look

from .cells import ARMS, REGIMES, TASKS
from .results import FOLDER, ROOT


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


TIMES = FOLDER / "timed_runs.parquet"
RESAMPLES = 10_000
REFERENCE = "global"
PEER = "distillation"

NO_ROWS = "No runs yet."

STALE = [name for name, regime in REGIMES.items() if regime.staleness]

# An arm holds a learning rate if its mean accuracy there is this close to that at its best one.
WITHIN = 0.05


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of `values` `(N,)`, always from the same resamples."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, size=(RESAMPLES, len(values))).mean(-1)
    low, high = np.percentile(means, [2.5, 97.5])
    return low, high


def show(values: pd.Series, format: Callable[[float], str]) -> str:
    """Mean, interval, and the number of seeds where it is not five."""
    values = values.dropna().to_numpy()
    if len(values) == 0:
        return "–"
    text = format(values.mean())
    if len(values) > 1:
        low, high = interval(values)
        text += f" [{format(low)}, {format(high)}]"
    return text if len(values) == 5 else f"{text} (n={len(values)})"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def nats(value: float) -> str:
    return f"{value:.3f}"


def tokens(value: float) -> str:
    return f"{value:.1f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def in_order(names) -> list[str]:
    """Arms as `cells.py` lists them."""
    return [arm for arm in ARMS if arm in set(names)]


def trained(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[~rows["arm"].isin(["student", "teacher"])]


def by_rate(rows: pd.DataFrame, column: str, format: Callable[[float], str]) -> str:
    """Arms by learning rates: mean and interval of a column."""
    rates = sorted(rows["learning_rate"].unique())
    table = []
    for arm in in_order(rows["arm"]):
        cells = [rows[(rows["arm"] == arm) & (rows["learning_rate"] == rate)][column] for rate in rates]
        table.append([arm, *(show(cell, format) for cell in cells)])
    return markdown(["arm", *(f"{rate:g}" for rate in rates)], table)


def paired_by_rate(rows: pd.DataFrame, column: str, format: Callable[[float], str]) -> str:
    """Arms by learning rates: mean and interval of the difference to the reference arm on the same seeds."""
    rates = sorted(rows["learning_rate"].unique())
    wide = rows.pivot(index=["learning_rate", "seed"], columns="arm", values=column)
    table = []
    for arm in in_order(wide.columns):
        if arm == REFERENCE:
            continue
        difference = (wide[arm] - wide[REFERENCE]).dropna()
        cells = [difference[difference.index.get_level_values("learning_rate") == rate] for rate in rates]
        table.append([arm, *(show(cell, format) for cell in cells)])
    return markdown([f"arm − {REFERENCE}", *(f"{rate:g}" for rate in rates)], table)


def best_rates(rows: pd.DataFrame) -> str:
    """For each arm: its best learning rate, the accuracy there, and between which rates it stays within reach of that."""
    table = []
    for arm in in_order(rows["arm"]):
        means = rows[rows["arm"] == arm].groupby("learning_rate")["accuracy"].mean()
        best = means.idxmax()
        held = means[means >= means.max() - WITHIN].index
        # An unbroken range around the best one.
        rates = list(means.index)
        low = high = rates.index(best)
        while low > 0 and rates[low - 1] in held:
            low -= 1
        while high < len(rates) - 1 and rates[high + 1] in held:
            high += 1
        accuracies = rows[(rows["arm"] == arm) & (rows["learning_rate"] == best)]["accuracy"]
        span = f"{rates[low]:g} to {rates[high]:g}"
        table.append([arm, f"{best:g}", show(accuracies, percent), span, f"{rates[high] / rates[low]:.0f}×"])
    return markdown(["arm", "best rate", "accuracy there, %", "within 5 points", "range"], table)


def gradient_norms(rows: pd.DataFrame) -> str:
    """Arms by learning rates: median, 99th percentile and maximum of the norm, each averaged over seeds."""
    rates = sorted(rows["learning_rate"].unique())
    table = []
    for arm in in_order(rows["arm"]):
        cells = []
        for rate in rates:
            traces = rows[(rows["arm"] == arm) & (rows["learning_rate"] == rate)]["grad_norm"]
            numbers = [
                np.mean([statistic(trace) for trace in traces]) if len(traces) else np.nan
                for statistic in (np.median, lambda trace: np.percentile(trace, 99), np.max)
            ]
            cells.append(" / ".join(f"{number:.2g}" for number in numbers) if len(traces) else "–")
        table.append([arm, *cells])
    return markdown(["arm", *(f"{rate:g}" for rate in rates)], table)


def per_seed(rows: pd.DataFrame) -> str:
    """Every run's accuracy, seeds side by side."""
    seeds = sorted(rows["seed"].unique())
    table = []
    for arm in in_order(rows["arm"]):
        for rate, runs in rows[rows["arm"] == arm].groupby("learning_rate"):
            known = runs.set_index("seed")["accuracy"]
            cells = [percent(known[seed]) if seed in known.index else "–" for seed in seeds]
            table.append([arm, f"{rate:g}", *cells, percent(known.mean())])
    return markdown(["arm", "rate", *(str(seed) for seed in seeds), "mean"], table)


def regimes(rows: pd.DataFrame) -> str:
    """All regimes but the demo's: a line for each task, regime, arm and learning rate."""
    header = ["task", "regime", "arm", "rate", "accuracy, %", f"arm − {REFERENCE}, points", "reverse KL"]
    header += ["norm, median / max", "length", "clamped, %"]
    table = []
    for (task, regime), part in rows.groupby(["task", "regime"], sort=False):
        for arm in in_order(part["arm"]):
            for rate, runs in part[part["arm"] == arm].groupby("learning_rate"):
                others = part[(part["arm"] == REFERENCE) & (part["learning_rate"] == rate)].set_index("seed")[
                    "accuracy"
                ]
                difference = runs.set_index("seed")["accuracy"] - others
                norms = [
                    np.mean([statistic(trace) for trace in runs["grad_norm"]]) for statistic in (np.median, np.max)
                ]
                table.append(
                    [
                        *(task, regime, arm, f"{rate:g}"),
                        show(runs["accuracy"], percent),
                        "" if arm == REFERENCE else show(difference, points),
                        show(runs["reverse_kl"], nats),
                        " / ".join(f"{norm:.2g}" for norm in norms),
                        show(runs["length"], tokens),
                        show(clamped_share(runs), percent),
                    ]
                )
    return markdown(header, table)


def with_staleness(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the demo's task whose samples are some steps old, with those of the same arms, rates and seeds that are not."""
    rows = rows[(rows["task"] == "digits") & ((rows["regime"] == "demo") | rows["regime"].isin(STALE))]
    rows = rows.assign(staleness=rows["regime"].map(lambda name: REGIMES[name].staleness))
    same = ["arm", "learning_rate", "seed"]
    return rows.merge(rows[rows["staleness"] > 0][same].drop_duplicates(), on=same)


def staleness(rows: pd.DataFrame) -> str:
    """Rates and arms by the number of steps that samples are old: accuracy."""
    rows = with_staleness(rows)
    steps = sorted(rows["staleness"].unique())
    table = []
    for rate, part in rows.groupby("learning_rate"):
        for arm in in_order(part["arm"]):
            cells = [part[(part["arm"] == arm) & (part["staleness"] == number)]["accuracy"] for number in steps]
            table.append([f"{rate:g}", arm, *(show(cell, percent) for cell in cells)])
    return markdown(["rate", "arm", *map(str, steps)], table)


def tables(rows: pd.DataFrame) -> dict[str, str]:
    """Name -> table. Those of the demo's regime are named after task and regime; a task without rows has a note there."""
    names = ("accuracy", "paired", "best", "reverse-kl", "length", "gradient-norm", "seeds")
    result = {f"{task}-demo-{name}": NO_ROWS for task in TASKS for name in names}
    ends = rows[rows["arm"].isin(["student", "teacher"])]
    if len(ends):
        result["models"] = by_seed_of_models(ends)
    stale = rows["regime"].isin(STALE)
    result["staleness"] = staleness(rows) if stale.any() else NO_ROWS
    others = trained(rows[(rows["regime"] != "demo") & ~stale])
    result["regimes"] = regimes(others) if len(others) else NO_ROWS
    for task, part in trained(rows[rows["regime"] == "demo"]).groupby("task", sort=False):
        name = f"{task}-demo"
        result[f"{name}-accuracy"] = by_rate(part, "accuracy", percent)
        if REFERENCE in set(part["arm"]):
            result[f"{name}-paired"] = paired_by_rate(part, "accuracy", points)
        result[f"{name}-best"] = best_rates(part)
        result[f"{name}-reverse-kl"] = by_rate(part, "reverse_kl", nats)
        result[f"{name}-length"] = by_rate(part, "length", tokens)
        result[f"{name}-gradient-norm"] = gradient_norms(part)
        result[f"{name}-seeds"] = per_seed(part)
    return result


def by_seed_of_models(rows: pd.DataFrame) -> str:
    seeds = sorted(rows["seed"].unique())
    table = []
    for task, regime, arm in rows[["task", "regime", "arm"]].drop_duplicates().itertuples(index=False):
        if arm == "student" and regime != "demo":
            continue  # the same one
        part = rows[(rows["task"] == task) & (rows["regime"] == regime) & (rows["arm"] == arm)]
        known = part.drop_duplicates("seed").set_index("seed")["accuracy"]
        cells = [percent(known[seed]) if seed in known.index else "–" for seed in seeds]
        table.append([task, arm if regime == "demo" else f"{arm}, {regime}", *cells])
    return markdown(["task", "model", *(str(seed) for seed in seeds)], table)


def noise_tables(rows: pd.DataFrame) -> dict[str, str]:
    """One table for each student and teacher whose gradients `gradient_noise.py` has looked at."""
    return {
        f"noise-{student}-{teacher}": noise_table(part)
        for (student, teacher), part in rows.groupby(["student", "teacher"], sort=False)
    }


def noise_table(rows: pd.DataFrame) -> str:
    sizes = sorted(rows["prompts"].unique())
    header = ["arm", *(f"noise, {4 * size} completions" for size in sizes)]
    header += ["cosine", "norm", "largest / mean norm", "disliked rewarded, %"]
    table = []
    for arm in rows["arm"].unique():
        by_size = {size: rows[(rows["arm"] == arm) & (rows["prompts"] == size)] for size in sizes}
        largest = by_size[sizes[-1]]
        table.append(
            [
                arm,
                *(show(runs["noise"], "{:.3g}".format) for runs in by_size.values()),
                show(largest["cosine"], "{:.3f}".format),
                f"{largest['norm'].mean():.2g}",
                f"{(largest['norm_max'] / largest['norm']).mean():.2f}",
                show(largest["disliked"], percent),
            ]
        )
    return markdown(header, table)


def moments_table(rows: pd.DataFrame) -> str:
    """Tasks by batch sizes: errors of a batch's moments, from the rows of `moments.py`."""
    table = []
    for (task, prompts), runs in rows.groupby(["task", "prompts"], sort=False):
        errors = [show(runs[name], percent) for name in ("mean_error", "std_error")]
        table.append([task, str(prompts), f"{runs['tokens'].mean():.0f}", *errors])
    return markdown(["task", "prompts", "tokens", "error of μ, % of σ", "error of σ, % of σ"], table)


def of_demo(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that figures show: the demo's task as the demo runs it, and arms that were run at all rates but one at most."""
    rows = rows[(rows["task"] == "digits") & (rows["regime"] == "demo")]
    rates = rows.groupby("arm")["learning_rate"].nunique()
    return rows[rows["arm"].isin([*rates[rates >= rates.max() - 1].index, "student"])]


def clamped_share(runs: pd.DataFrame) -> pd.Series:
    """Mean over the steps of each run; NaN for an arm that clamps nothing by its nature."""
    return runs["clamped"].map(lambda values: np.mean(values) if len(values) else np.nan)


def time_table(rows: pd.DataFrame) -> str:
    """Tasks by arms: what a step takes, as it is and beside TRL's `DistillationTrainer` on the same seeds."""
    table = []
    for task, part in rows.groupby("task", sort=False):
        seconds = (part["train_seconds"] / part["steps"]).set_axis(pd.MultiIndex.from_frame(part[["arm", "seed"]]))
        for arm in in_order(part["arm"]):
            runs = part[part["arm"] == arm]
            share = seconds[arm] / seconds[PEER]
            cells = [show(runs["completion_length"].map(np.mean), tokens), show(seconds[arm], "{:.3f}".format)]
            cells += ["–" if arm == PEER else show(share, "{:.2f}".format), show(runs["accuracy"], percent)]
            table.append([task, arm, f"{runs['learning_rate'].iloc[0]:g}", *cells])
    header = ["task", "arm", "rate", "sampled tokens of a completion", "seconds of a step", f"to {PEER}"]
    return markdown([*header, "accuracy at the end, %"], table)


def pretrained_tables(rows: pd.DataFrame) -> dict[str, str]:
    """What the runs of `pretrained.py` came to, and what their steps cost; a line for each gap, rate and arm."""
    return {"pretrained-results": pretrained_results(rows), "pretrained-cost": pretrained_cost(rows)}


def pretrained_runs(rows: pd.DataFrame):
    """The rows of each number of left-out layers, rate and arm, arms in their order."""
    for left_out, gap in rows.groupby("left_out"):
        for rate, part in gap.groupby("learning_rate"):
            for arm in in_order(part["arm"]):
                yield left_out, rate, arm, part[part["arm"] == arm].set_index("seed").sort_index()


def pretrained_results(rows: pd.DataFrame) -> str:
    table = []
    for left_out, rate, arm, runs in pretrained_runs(rows):
        same = rows[(rows["left_out"] == left_out) & (rows["learning_rate"] == rate) & (rows["arm"] == REFERENCE)]
        difference = (runs["reverse_kl"] - same.set_index("seed")["reverse_kl"]).dropna()
        middle = runs["eval_reverse_kl"].map(lambda values: values[0])
        table.append(
            [
                str(left_out),
                "–" if arm == "student" else f"{rate:g}",
                arm,
                "–" if arm == "student" else show(middle, nats),
                show(runs["reverse_kl"], nats),
                "–" if arm == REFERENCE else show(difference, "{:+.3f}".format),
                show(runs["agreement"], percent),
                show(runs["length"], "{:.1f}".format),
            ]
        )
    header = ["layers left out", "rate", "arm", "reverse KL, middle", "end", f"end − {REFERENCE}"]
    return markdown([*header, "same likeliest token, %", "tokens"], table)


def pretrained_cost(rows: pd.DataFrame) -> str:
    """Medians over the steps of a run, without the first one, and means over seeds."""
    table = []
    for left_out, rate, arm, runs in pretrained_runs(rows[rows["arm"] != "student"]):
        sampling = runs["generation_seconds"].map(lambda values: np.median(values[1:]))
        step = pd.Series(
            [
                np.median(np.subtract(seconds, generation)[1:])
                for seconds, generation in zip(runs["step_seconds"], runs["generation_seconds"], strict=True)
            ]
        )
        table.append(
            [
                str(left_out),
                f"{rate:g}",
                arm,
                show(sampling, "{:.2f}".format),
                show(step, "{:.2f}".format),
                show(runs["peak_bytes"] / 2**30, "{:.2f}".format),
                show(runs["grad_norm"].map(np.median), "{:.1f}".format),
                show(clamped_share(runs), percent),
            ]
        )
    header = ["layers left out", "rate", "arm", "sampling, s", "rest of a step, s", "memory, GiB", "gradient norm"]
    return markdown([*header, "clamped, %"], table)


def plot_accuracy(rows: pd.DataFrame, path: Path) -> None:
    """Accuracy against the learning rate: a line for each arm, the band its interval."""
    part = trained(of_demo(rows))
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for arm in in_order(part["arm"]):
        groups = part[part["arm"] == arm].groupby("learning_rate")["accuracy"]
        means = groups.mean()
        (line,) = axis.plot(means.index, means, marker="o", label=arm, markersize=3, **style(arm))
        bands = [interval(values.to_numpy()) for _, values in groups]
        axis.fill_between(means.index, *zip(*bands, strict=True), color=line.get_color(), alpha=0.12)
    axis.set(title="digits, demo", xscale="log", xlabel="learning rate", ylabel="accuracy", ylim=(0, 1))
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_gradient_norms(rows: pd.DataFrame, path: Path) -> None:
    """Gradient norm over the steps, median over seeds, at each learning rate."""
    part = trained(of_demo(rows))
    rates = sorted(part["learning_rate"].unique())
    figure, axes = plt.subplots(1, len(rates), figsize=(5 * len(rates), 4), squeeze=False, layout="constrained")
    for axis, rate in zip(axes[0], rates, strict=True):
        for arm in in_order(part["arm"]):
            traces = part[(part["arm"] == arm) & (part["learning_rate"] == rate)]["grad_norm"]
            length = min((len(trace) for trace in traces), default=0)
            if length:
                median = np.median([trace[:length] for trace in traces], axis=0)
                axis.plot(range(1, length + 1), median, label=arm, linewidth=0.8, **style(arm))
        axis.axhline(1.0, color="gray", linestyle=":", linewidth=0.8)
        axis.set(title=f"learning rate {rate:g}", yscale="log", xlabel="step", ylabel="gradient norm before clipping")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_staleness(rows: pd.DataFrame, path: Path) -> None:
    """Accuracy against the number of steps that samples are old, mean over seeds, at each learning rate."""
    rows = with_staleness(rows)
    rates, steps = sorted(rows["learning_rate"].unique()), sorted(rows["staleness"].unique())
    if not rates:
        return
    figure, axes = plt.subplots(1, len(rates), figsize=(5 * len(rates), 4), squeeze=False, layout="constrained")
    for axis, rate in zip(axes[0], rates, strict=True):
        for arm in in_order(rows["arm"]):
            part = rows[(rows["arm"] == arm) & (rows["learning_rate"] == rate)]
            means = part.groupby("staleness")["accuracy"].mean()
            axis.plot([steps.index(number) for number in means.index], 100 * means, label=arm, **style(arm))
        axis.set_xticks(range(len(steps)), steps)
        axis.set(title=f"learning rate {rate:g}", xlabel="age of samples, steps", ylabel="accuracy, %", ylim=(0, 100))
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_cost(rows: pd.DataFrame, path: Path) -> None:
    """Accuracy against sampled tokens, mean over seeds, each arm that samples at its best rate."""
    rows = of_demo(rows)
    start = rows[rows["arm"] == "student"]["accuracy"].mean()
    completions = REGIMES["demo"].prompts * REGIMES["demo"].num_generations
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for arm in in_order(trained(rows)["arm"]):
        part = rows[rows["arm"] == arm]
        runs = part[part["learning_rate"] == part.groupby("learning_rate")["accuracy"].mean().idxmax()]
        # A run that has diverged is not evaluated to its end, and an arm may sample nothing.
        runs = runs[runs["eval_step"].map(len) == runs["eval_step"].map(len).max()]
        runs = runs[runs["completion_length"].map(len) > 0]
        if len(runs):
            sampled = [
                completions * np.cumsum(lengths)[np.array(steps) - 1]
                for lengths, steps in zip(runs["completion_length"], runs["eval_step"], strict=True)
            ]
            draw_accuracy(axis, np.mean(sampled, axis=0), start, runs, f"{arm}, {runs['learning_rate'].iloc[0]:g}")
    axis.set(xlabel="sampled tokens", ylabel="accuracy")
    axis.legend(fontsize=7, loc="lower right", title="arm, its best learning rate", title_fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_time(rows: pd.DataFrame, students: pd.DataFrame, path: Path) -> None:
    """
    Accuracy against seconds of training, mean over seeds, without those of the evaluations; a panel for each task. What the
    students begin with is in the rows of the arm "student".
    """
    figure, axes = plt.subplots(1, rows["task"].nunique(), figsize=(11, 4.5), squeeze=False, layout="constrained")
    for axis, (task, part) in zip(axes[0], rows.groupby("task", sort=False), strict=True):
        known = (students["arm"] == "student") & (students["task"] == task) & (students["regime"] == "demo")
        start = students[known & students["seed"].isin(part["seed"])]["accuracy"].mean()
        for arm in in_order(part["arm"]):
            runs = part[part["arm"] == arm]
            # The steps of a run are nearly equal; evaluations stand at the end of whole shares of them.
            seconds = runs["train_seconds"].mean() * np.array(runs["eval_step"].iloc[0]) / runs["steps"].iloc[0]
            draw_accuracy(axis, seconds, start, runs, arm)
        axis.set(title=task, xlabel="seconds of training", ylabel="accuracy")
        axis.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_accuracy(axis: Axes, cost: np.ndarray, start: float, runs: pd.DataFrame, label: str) -> None:
    """A line of the accuracy of the runs of an arm, mean over seeds, from `start` on; `cost` is that of each evaluation."""
    accuracy = [start, *np.mean(list(runs["eval_accuracy"]), axis=0)]
    axis.plot([0, *cost], accuracy, marker="o", label=label, markersize=3, **style(runs["arm"].iloc[0]))


def style(arm: str) -> dict:
    """Colour and dashes: the same for an arm in every figure, and no two alike."""
    return look(list(ARMS).index(arm))


def replace_tables(text: str, new: dict[str, str]) -> str:
    """`text` with each table between `<!-- NAME -->` and `<!-- end -->` replaced; `KeyError` for a name without rows."""
    parts = []
    while "<!-- end -->" in text:
        before, _, text = text.partition("<!-- end -->")
        head, _, rest = before.rpartition("<!-- ")
        name = rest.partition(" -->")[0]
        parts.append(f"{head}<!-- {name} -->\n{new[name]}\n<!-- end -->")
    return "".join(parts) + text


def read_results(path: Path) -> pd.DataFrame:
    """Rows in the order of tasks and regimes."""
    rows = pd.read_parquet(path)
    order = {"task": list(TASKS), "regime": list(REGIMES)}
    return rows.sort_values(list(order), kind="stable", key=lambda names: names.map(order[names.name].index))


def all_tables(results: Path, times: Path, noise: Path, moments: Path, pretrained: Path) -> dict[str, str]:
    return {
        **tables(read_results(results)),
        "time": time_table(read_results(times)),
        **noise_tables(pd.read_parquet(noise)),
        "moments": moments_table(pd.read_parquet(moments)),
        **pretrained_tables(pd.read_parquet(pretrained)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER / "runs.parquet")
    parser.add_argument("--times", type=Path, default=TIMES)
    parser.add_argument("--noise", type=Path, default=FOLDER / "gradient_noise.parquet")
    parser.add_argument("--moments", type=Path, default=FOLDER / "moments.parquet")
    parser.add_argument("--pretrained", type=Path, default=FOLDER / "pretrained.parquet")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "evidence_tables.md")
    parser.add_argument("--print", action="store_true", help="print the tables and write nothing")
    args = parser.parse_args()
    new = all_tables(args.results, args.times, args.noise, args.moments, args.pretrained)
    if args.print:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in new.items()))
        return
    args.document.write_text(replace_tables(args.document.read_text(), new))
    rows = read_results(args.results)
    plot_accuracy(rows, args.document.parent / "evidence_accuracy.png")
    plot_gradient_norms(rows, args.document.parent / "evidence_gradient_norm.png")
    plot_staleness(rows, args.document.parent / "evidence_staleness.png")
    plot_cost(rows, args.document.parent / "evidence_cost.png")
    plot_time(read_results(args.times), rows, args.document.parent / "evidence_time.png")
    print(f"Rewritten: {args.document} and its figures, from {len(rows)} rows")


if __name__ == "__main__":
    main()
