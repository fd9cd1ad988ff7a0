"""What a run has left in its folder: the log in its trainer state, and the pages of its token view."""

import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..token_view import FOLDER


# Prompt and completion tokens of all ranks since the last log, for each second; made of two metrics.
THROUGHPUT = "tokens per second"

# As transformers calls them, whose import would take longer than the report.
TRAINER_STATE_NAME = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-\d+")

_TOKEN_PAGE = re.compile(r"(?P<mode>.+)_(?P<step>\d+)\.html")


@dataclass(frozen=True, order=True)
class TokenPage:
    """A page of the token view: the optimizer step and the mode (`"train"`, `"eval"`, …) whose tokens it shows."""

    step: int
    mode: str
    path: Path


@dataclass
class Run:
    """
    A run as it can be read from its folder.

    Attributes:
        name: What tells it from the other runs of the report, in characters that can be printed.
        folder: Its `output_dir`.
        step: Optimizer steps done when the trainer state was written.
        max_steps: Optimizer steps that were to be done.
        history: Entries of the log, in their order: metrics, and the `step` at which each was logged.
        token_pages: In the order of their steps.
    """

    name: str
    folder: Path
    step: int
    max_steps: int
    history: list[dict]
    token_pages: list[TokenPage]

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values `(N,)` of a metric wherever it was logged with a number, or of `THROUGHPUT`."""
        if metric == THROUGHPUT:
            return self._throughput()
        entries = [entry for entry in self.history if is_number(entry.get(metric)) and "step" in entry]
        # A run that went on from a checkpoint may have logged a step twice; the later entry is what it went on with.
        values = {entry["step"]: entry[metric] for entry in entries}
        steps = sorted(values)
        return np.array(steps), np.array([values[step] for step in steps], dtype=float)

    def metrics(self) -> list[str]:
        """Names of everything that was ever logged, in the order in which it first was."""
        return list(dict.fromkeys(name for entry in self.history for name in entry))

    def _throughput(self) -> tuple[np.ndarray, np.ndarray]:
        steps, tokens = self.curve("num_tokens")
        seconds = dict(zip(*self.curve("step_time"), strict=True))
        found = {}
        for last, step, before, now in zip(steps, steps[1:], tokens, tokens[1:], strict=False):
            if seconds.get(step, 0) > 0 and now >= before:
                found[step] = (now - before) / (seconds[step] * (step - last))
        return np.array(list(found)), np.array(list(found.values()))

    def page_at(self, step: int) -> TokenPage | None:
        """The newest page of training tokens at or before a step."""
        pages = [page for page in self.token_pages if page.mode == "train" and page.step <= step]
        return pages[-1] if pages else None


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def read_runs(folders: list[Path]) -> list[Run]:
    """
    Read runs.

    Args:
        folders (`list[Path]`): The `output_dir` of each, or one of its checkpoints.

    Returns:
        `list[Run]`: in the same order, under the shortest ends of their paths that differ.

    Raises:
        `ValueError`: if a folder is given twice.
        `FileNotFoundError`: if a folder does not exist or holds no trainer state.
        `ValueError`: if a trainer state cannot be read, or nothing was logged.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise ValueError(f"{folder} is given twice.")
    names = map(printable, short_names(resolved))
    return [read_run(folder, name) for folder, name in zip(resolved, names, strict=True)]


def printable(name: str) -> str:
    """A name with a sign in the place of what no page and no terminal shows, such as bytes of a path that are no text."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)


def read_run(folder: Path, name: str) -> Run:
    path = newest_state(folder)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        history, step, max_steps = state["log_history"], state["global_step"], state["max_steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a trainer state, or not a whole one: {error!r}.") from error
    if not any(is_number(value) for entry in history for key, value in entry.items() if key not in ("step", "epoch")):
        raise ValueError(f"{path} has no logs. Was the run longer than `logging_steps`?")
    output_dir = folder.parent if _CHECKPOINT.fullmatch(folder.name) else folder
    return Run(name, output_dir, step, max_steps, history, token_pages(output_dir / FOLDER))


def newest_state(folder: Path) -> Path:
    """The trainer state of a folder: its own, or that of a checkpoint that has got further."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Give the `output_dir` of a run.")
    checkpoints = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    states = [path / TRAINER_STATE_NAME for path in [folder, *checkpoints]]
    states = [path for path in states if path.is_file()]
    if not states:
        raise FileNotFoundError(
            f"{folder} has no {TRAINER_STATE_NAME}, nor has a checkpoint in it. Trainers write it with each checkpoint, "
            "and where `trainer.save_state()` is called."
        )
    return max(states, key=lambda path: path.stat().st_mtime_ns)


def token_pages(folder: Path) -> list[TokenPage]:
    if not folder.is_dir():
        return []
    found = [(path, _TOKEN_PAGE.fullmatch(path.name)) for path in folder.iterdir()]
    return sorted(TokenPage(int(match["step"]), match["mode"], path) for path, match in found if match)


def short_names(folders: list[Path]) -> list[str]:
    """As much of the end of each of several paths as tells all of them apart; no two are the same."""
    names_by_length = ([os.path.join(*folder.parts[-length:]) for folder in folders] for length in itertools.count(1))
    return next(names for names in names_by_length if len(set(names)) == len(names))
