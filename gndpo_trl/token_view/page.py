"""The token view as one page that a browser shows without fetching anything."""

import html
import json
from importlib.resources import files

import numpy as np

from .colours import HIGH, LOW, MIDDLE
from .images import data_url, encode
from .rows import TokenRow, extreme_tokens, score_scale
from .table import TOKEN_COLUMNS, number, short


# Extreme tokens at either end of the batch.
NUM_EXTREMES = 10
NUM_BINS = 61


def write_page(rows: list[TokenRow], path: str, step: int, mode: str, score_clip: float | None) -> None:
    """
    Write the page of a batch.

    Args:
        rows (`list[TokenRow]`): All rows of the batch.
        path (`str`): File to write.
        step (`int`): Optimizer step.
        mode (`str`): `"train"` or the name of an evaluation.
        score_clip (`float` or `None`): Bound of the clamp, in nats.
    """
    title = f"Tokens of step {step}, {mode}"
    data = {"title": title, **page_data(rows, score_clip)}
    # No text can close the script that holds the data: JSON needs no "<" outside of strings, which may escape it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    before, _, after = template.replace("{{title}}", html.escape(title)).partition("{{data}}")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines([before, text, after])


def page_data(rows: list[TokenRow], score_clip: float | None) -> dict:
    """What the page's script reads, with prompts and images that several completions share once."""
    scale = score_scale(rows, score_clip)
    prompts, urls, row_data = {}, {}, []
    for row in rows:
        images = []
        for image in row.images:
            encoded = encode(image)
            url = data_url(encoded)
            source = {"path": str(encoded["path"])} if url is None else {"url": url}
            images.append(urls.setdefault(json.dumps(source), len(urls)))
        row_data.append(
            {
                "prompt": prompts.setdefault(row.prompt, len(prompts)),
                "images": images,
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
    lowest, highest = extreme_tokens(rows, NUM_EXTREMES)
    return {
        "clip": score_clip,
        "scale": scale,
        "colours": [LOW, MIDDLE, HIGH],
        "histogram": histogram(rows, scale),
        "prompts": list(prompts),
        "images": [json.loads(source) for source in urls],
        "extremes": {"lowest": lowest, "highest": highest},
        "rows": row_data,
    }


def histogram(rows: list[TokenRow], scale: float) -> dict[str, list]:
    """Counts of the scores in bins up to a fifth beyond the scale; the outermost bins hold all that is further out."""
    scores = np.concatenate([row.scores for row in rows])
    edges = np.linspace(-1.2 * scale, 1.2 * scale, NUM_BINS + 1)
    counts, _ = np.histogram(scores[~np.isnan(scores)].clip(edges[0], edges[-1]), edges)
    return {"edges": edges.round(4).tolist(), "counts": counts.tolist()}
