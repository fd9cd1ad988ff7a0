"""The page of the run report, which holds its figures and fetches nothing."""

import base64
import html
import os
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import numpy as np

from .figures import Picture, rewards
from .runs import THROUGHPUT, Run, TokenPage


# Share of a run, from its end, over which the table averages.
END = 0.1

# Metrics of the table of runs: what is shown of them, and with how many digits.
AT_THE_END = (("reverse_kl", "reverse KL", 3), ("completions/mean_length", "length", 1), (THROUGHPUT, "tokens/s", 0))

# Where one may want to look at tokens: what is said of the step at which a metric was largest.
PEAKS = {
    "grad_norm": "largest gradient norm",
    "reverse_kl": "largest reverse KL",
    "advantages/share_top_1_percent": "largest share of 1 % of the tokens in the advantages",
    "score/clamped_low": "most tokens clamped",
    "completions/mean_length": "longest completions",
}


def write_page(runs: list[Run], pictures: list[Picture], path: Path) -> None:
    """
    Write the page.

    Args:
        runs (`list[Run]`): What it is about.
        pictures (`list[Picture]`): Their figures, which become part of the page.
        path (`Path`): File to write. Links to token pages are relative to it.
    """
    title = f"Run report: {', '.join(run.name for run in runs)}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        summary(runs),
        f'<p class="note">Averages over the last {END:.0%} of each run. Thick lines are moving averages over 5 % of a run, '
        "thin ones what was logged; points are evaluations.</p>",
        '<div class="pictures">',
        *(figure(picture) for picture in pictures),
        "</div>",
        "<h2>Steps worth a look</h2>",
        peaks(runs, path.parent),
        "<h2>Tokens</h2>",
        *(all_pages(run, path.parent) for run in runs),
    ]
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    before, _, after = template.replace("{{title}}", html.escape(title)).partition("{{body}}")
    path.write_text(before + "\n".join(body) + after, encoding="utf-8")


def figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return f'<figure><img alt="{html.escape(picture.text)}" src="data:image/png;base64,{data}"></figure>'


def summary(runs: list[Run]) -> str:
    """One line for each run: how far it is, and its averages at the end."""
    metrics = [(f"rewards/{name}/mean", name, 3) for name in rewards(runs)] + list(AT_THE_END)
    metrics = [metric for metric in metrics if any(len(run.curve(metric[0])[0]) for run in runs)]
    header = ["run", "steps", *(label for _, label, _ in metrics), "largest gradient norm"]
    lines = []
    for run in runs:
        norms = run.curve("grad_norm")[1]
        cells = [html.escape(run.name), f"{run.step:,} of {run.max_steps:,}"]
        cells += [decimal(at_the_end(run, metric), digits) for metric, _, digits in metrics]
        lines.append([*cells, decimal(norms.max(), 2) if len(norms) else "–"])
    return table([html.escape(cell) for cell in header], lines)


def at_the_end(run: Run, metric: str) -> float:
    steps, values = run.curve(metric)
    values = values[steps > (1 - END) * run.step]
    return values.mean() if len(values) else np.nan


def decimal(value: float, digits: int) -> str:
    return "–" if np.isnan(value) else f"{value:,.{digits}f}"


def peaks(runs: list[Run], folder: Path) -> str:
    """Where metrics were largest, with the tokens of that step or the nearest before it."""
    lines = []
    for run in runs:
        for metric, label in PEAKS.items():
            steps, values = run.curve(metric)
            if len(steps):
                step, value = int(steps[values.argmax()]), values.max()
                page = run.page_at(step)
                found = "none at or before it" if page is None else link(page, folder)
                lines.append([html.escape(run.name), label, decimal(value, 3), f"{step:,}", found])
    return table(["run", "what", "value", "step", "tokens"], lines)


def all_pages(run: Run, folder: Path) -> str:
    """Links to all token pages of a run, by mode."""
    if not run.token_pages:
        return (
            f'<p>{html.escape(run.name)}: <span class="note">none, set <code>log_completions: true</code></span></p>'
        )
    lines = []
    for mode in dict.fromkeys(page.mode for page in run.token_pages):
        links = " ".join(link(page, folder) for page in run.token_pages if page.mode == mode)
        lines.append(f'<p class="pages">{html.escape(run.name)}, {html.escape(mode)}: {links}</p>')
    return "\n".join(lines)


def link(page: TokenPage, folder: Path) -> str:
    return f'<a href="{quote(os.fsencode(os.path.relpath(page.path, folder)))}">{page.step:,}</a>'


def table(header: list[str], lines: list[list[str]]) -> str:
    """Of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
