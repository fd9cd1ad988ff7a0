"""Token rows as a parquet file, and as a table for wandb and trackio."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value

from .images import encode, once_each
from .rows import TokenRow


TOKEN_COLUMNS = ("scores", "teacher_logps", "student_logps", "advantages")


def write_parquet(rows: list[TokenRow], path: str, step: int, mode: str) -> None:
    """
    Write one row for each completion, with lists as long as it has tokens. Where there is no value, there is null.

    The file is one that `datasets` reads, images included.
    """
    names = sorted({name for row in rows for name in row.rewards})
    features = Features(
        {
            "step": Value("int64"),
            "mode": Value("string"),
            "rank": Value("int64"),
            "prompt": Value("string"),
            "images": List(Image()),
            "completion": Value("string"),
            "reward": Value("float64"),
            **{f"rewards/{name}": Value("float64") for name in names},
            "token_ids": List(Value("int64")),
            "tokens": List(Value("string")),
            "scores": List(Value("float32")),
            "clamped": List(Value("bool")),
            "teacher_logps": List(Value("float32")),
            "student_logps": List(Value("float32")),
            "advantages": List(Value("float32")),
        }
    )
    values, encode_once = {name: [] for name in features}, once_each(encode)
    for row in rows:
        row_values = {
            "step": step,
            "mode": mode,
            "rank": row.rank,
            "prompt": row.prompt,
            "images": [encode_once(image) for image in row.images],
            "completion": row.completion,
            "reward": number(row.reward),
            **{f"rewards/{name}": number(row.rewards.get(name)) for name in names},
            "token_ids": row.completion_ids,
            "tokens": row.tokens,
            "clamped": row.clamped,
        }
        for name in TOKEN_COLUMNS:
            row_values[name] = pa.array(getattr(row, name), from_pandas=True)  # NaN becomes null
        for name, value in row_values.items():
            values[name].append(value)
    schema = features.arrow_schema
    arrays = [pa.array(values[name], type=schema.field(name).type) for name in features]
    table = pa.Table.from_arrays(arrays, schema=schema)
    # An image that several completions have is in the file once, however large.
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**31 - 1)


def number(value: float | None) -> float | None:
    """A float as JSON and parquet know it: without NaN and infinities."""
    return float(value) if value is not None and np.isfinite(value) else None


def report_table(rows: list[TokenRow], step: int, mode: str, backend: Any, unique_prompts: bool) -> pd.DataFrame:
    """
    What wandb and trackio show of the rows: one line for each completion, its tokens as JSON in the last column:
    `[[text, score, teacher log-prob, student log-prob, advantage, clamped], ...]`.

    Args:
        rows (`list[TokenRow]`): The rows.
        step (`int`): Optimizer step.
        mode (`str`): `"train"` or the name of an evaluation.
        backend: The module `wandb` or `trackio`, whose `Image` wraps images.
        unique_prompts (`bool`): Whether to keep the first completion of each prompt alone (`log_unique_prompts`).
    """
    lines, has_images, as_image = [], any(row.images for row in rows), once_each(lambda image: backend.Image(image))
    for row in rows:
        columns = (short(getattr(row, name)) for name in TOKEN_COLUMNS)
        tokens = list(zip(row.tokens, *columns, row.clamped.tolist(), strict=True))
        line = {"step": step, "mode": mode, "rank": row.rank, "prompt": row.prompt, "completion": row.completion}
        line |= {"num_tokens": len(row.tokens), "score": number(row.mean_score), "num_clamped": int(row.clamped.sum())}
        line |= {"reward": number(row.reward), **{f"rewards/{name}": number(v) for name, v in row.rewards.items()}}
        line |= {"advantage": number(row.mean_advantage)}
        if has_images:
            line["images"] = [as_image(image) for image in row.images]
        lines.append({**line, "tokens": json.dumps(tokens, ensure_ascii=False)})
    table = pd.DataFrame(lines)
    return table.drop_duplicates("prompt") if unique_prompts else table


def short(values: np.ndarray) -> list[float | None]:
    """Numbers for people to read, with four decimal places; `None` for what JSON has no number for."""
    rounded = values.astype(np.float64).round(4)
    return np.where(np.isfinite(rounded), rounded.astype(object), None).tolist()
