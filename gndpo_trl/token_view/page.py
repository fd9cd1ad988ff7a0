"""The token view as one page that a browser shows without fetching anything."""

import html
import json
from importlib.resources import files

import numpy as np

from .colours import HIGH, LOW, MIDDLE
from .images import for_page, once_each
from .rows import TokenRow, extreme_tokens, sample_rows, score_scale
from .table import TOKEN_COLUMNS, number, short


# Extreme tokens at either end of the batch.
NUM_EXTREMES = 10
NUM_BINS = 61


def write_page(
    rows: list[TokenRow], path: str, step: int, mode: str, score_clip: float | None, count: int | None = None
) -> None:
    """
    Write the page of a batch.

    Args:
        rows (`list[TokenRow]`): All rows of the batch.
        path (`str`): File to write.
        step (`int`): Optimizer step.
        mode (`str`): `"train"` or the name of an evaluation.
        score_clip (`float` or `None`): Bound of the clamp, in nats.
        count (`int` or `None`): Most completions in the page; `None`: all of them.
    """
    title = f"Tokens of step {step}, {mode}"
    data = {"title": title, **page_data(rows, score_clip, rows_in_page(rows, count, step))}
    # No text can close the script that holds the data: JSON needs no "<" outside of strings, which may escape it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    before, _, after = template.replace("{{title}}", html.escape(title)).partition("{{data}}")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines([before, text, after])


def rows_in_page(rows: list[TokenRow], count: int | None, step: int) -> list[int]:
    """Numbers of the rows that the page has: first those of the most extreme tokens, then others at random; in order."""
    if count is None or count >= len(rows):
        return list(range(len(rows)))
    ends = zip(*extreme_tokens(rows, NUM_EXTREMES), strict=True)  # from either end by turns, the most extreme first
    order = [row for pair in ends for row, _ in pair] + sample_rows(rows, count, step)
    return sorted(list(dict.fromkeys(order))[:count])


def page_data(rows: list[TokenRow], score_clip: float | None, shown: list[int] | None = None) -> dict:
    """
    What the page's script reads, with prompts and images that several completions share once.

    Scale, histogram and number of completions are of all rows; the others are of those `shown`, by default all.
    """
    shown = list(range(len(rows))) if shown is None else shown
    scale, in_page = score_scale(rows, score_clip), [rows[number] for number in shown]
    prompts, images, row_data, as_source = {}, {}, [], once_each(for_page)
    for number_in_batch, row in zip(shown, in_page, strict=True):
        sources = [as_source(image) for image in row.images]
        row_data.append(
            {
                "number": number_in_batch + 1,
                "prompt": prompts.setdefault(row.prompt, len(prompts)),
                "images": [images.setdefault(tuple(source.items()), len(images)) for source in sources],
                "rank": row.rank,
                "reward": number(row.reward),
                "rewards": {name: number(value) for name, value in row.rewards.items()},
                "mean": number(row.mean_score),
                "tokens": row.tokens,
                "ids": row.completion_ids.tolist(),
                "clamped": np.flatnonzero(row.clamped).tolist(),
                **{name: short(getattr(row, name)) for name in TOKEN_COLUMNS},
            }
        )
    lowest, highest = extreme_tokens(in_page, NUM_EXTREMES)
    return {
        "clip": score_clip,
        "scale": scale,
        "colours": [LOW, MIDDLE, HIGH],
        "histogram": histogram(rows, scale),
        "num_completions": len(rows),
        "num_tokens": sum(len(row.tokens) for row in rows),
        "prompts": list(prompts),
        "images": [dict(source) for source in images],
        "extremes": {"lowest": lowest, "highest": highest},
        "rows": row_data,
    }


def histogram(rows: list[TokenRow], scale: float) -> dict[str, list]:
    """Counts of the scores in bins up to a fifth beyond the scale; the outermost bins hold all that is further out."""
    scores = np.concatenate([row.scores for row in rows])
    edges = np.linspace(-1.2 * scale, 1.2 * scale, NUM_BINS + 1)
    counts, _ = np.histogram(scores[~np.isnan(scores)].clip(edges[0], edges[-1]), edges)
    return {"edges": edges.round(4).tolist(), "counts": counts.tolist()}
