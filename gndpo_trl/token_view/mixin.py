"""The token view of a trainer: keeps the rows of generation batches, and writes them where TRL logs completions."""

import math
import os
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.utils import is_rich_available

from . import FOLDER
from .page import write_page
from .rows import TokenRow, rows_of, sample_rows
from .table import report_table, write_parquet
from .token_text import TokenTexts


@dataclass
class KeptBatch:
    """
    A generation batch until it is logged.

    Attributes:
        rows: Completions of this process; `None` if they could not be had.
        rewards: What TRL's logs had of rewards by then, with the completions of all ranks at the end.
        images: The same of images.
    """

    rows: list[TokenRow] | None
    rewards: dict[str, list[float]]
    images: list[list[Any] | None]


class TokenViewMixin:
    """
    With `log_completions`, writes `token_scores/{mode}_{step}.parquet` and `.html` in `output_dir` whenever completions are
    logged, prints the rows in place of TRL's samples, and adds a table of them to wandb and trackio.

    They are those of the last generation batch, and after an evaluation those of its last `generation_batch_size`
    completions, as in TRL's own table. Each batch is written once. A run that goes on from a checkpoint in the middle of a
    generation batch writes from the next batch on.

    Ranks keep their own rows, and exchange them when they are to be written. Nothing that fails while they are collected or
    written ends a run.
    """

    _completion_folders = ("completions", FOLDER)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        of_all_ranks = self.args.eval_batch_size * self.accelerator.num_processes
        enough = math.ceil(self.args.generation_batch_size / of_all_ranks) + 1  # the last one may be short
        self._kept_batches = {"train": deque(maxlen=1), "eval": deque(maxlen=enough)}
        self._token_texts = TokenTexts(self._tokenizer) if self.log_completions else None

    def _begin_run(self):
        super()._begin_run()
        for batches in self._kept_batches.values():
            batches.clear()

    def _keep_token_rows(
        self,
        mode: str,
        rollout: dict[str, Any],
        scores: torch.Tensor,
        logps: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
    ) -> None:
        """
        Keep the rows of the generation batch that TRL has just logged, on all ranks.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            rollout (`dict`): The batch, with its `advantages` `(B, T)`.
            scores (`torch.Tensor` of shape `(B, T)`): Raw scores in nats.
            logps (`tuple[torch.Tensor, torch.Tensor]`): Log-probs `(B, T)` of teacher and student, in nats.
            mask (`torch.Tensor` of shape `(B, T)`): True on the tokens that take part in the loss.
        """
        if not self.log_completions:
            return
        try:
            rows = rows_of(
                rollout,
                scores,
                logps,
                mask,
                score_clip=self.args.score_clip,
                rank=self.accelerator.process_index,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        except Exception as error:
            self._warn_once("the token view", error)
            rows = None
        # TRL's logs end with the completions of this batch, until the next one.
        rewards = {name: list(column) for name, column in self._logs["rewards"].items()}
        images = list(self._logs["images"]) if self.log_multimodal else []
        self._kept_batches[mode].append(KeptBatch(rows, rewards, images))

    def evaluate(self, *args, **kwargs):
        self._kept_batches["eval"].clear()  # those of a prediction, which logs nothing
        return super().evaluate(*args, **kwargs)

    def log(self, logs, start_time=None):
        name = self._completions_due(logs)
        kept = self._kept_batches["train" if name == "train" else "eval"] if name is not None else ()
        # On all ranks, before anything that may fail on one of them.
        ranks = gather_object([[batch.rows for batch in kept]]) if kept else []
        count = self.num_completions_to_print
        if self.log_completions and not self._logs["extra"]:  # columns of the user's that TRL's table alone shows
            self.num_completions_to_print = 0
        try:
            super().log(logs, start_time)
        finally:
            self.num_completions_to_print = count
        if kept:
            if self.accelerator.is_main_process:
                self._show_token_rows(list(kept), ranks, name)
            kept.clear()

    def _show_token_rows(self, batches: list[KeptBatch], ranks: list[list], mode: str) -> None:
        """Write and print the rows that `ranks` had of each batch. Each form by itself: what cannot be done is said once."""
        step, clip, count = self.state.global_step, self.args.score_clip, self.num_completions_to_print
        name = re.sub(r"[^-.+ =\w]", "_", mode)  # of an evaluation set, which may have any
        path = os.path.join(self.args.output_dir, FOLDER, f"{name}_{step:05d}")
        rows = []

        def completions() -> None:
            for batch, of_ranks in zip(batches, zip(*ranks, strict=True), strict=True):
                if None not in of_ranks:
                    rows.extend(self._with_rewards([row for of_rank in of_ranks for row in of_rank], batch))
            del rows[: -self.args.generation_batch_size]
            for row in rows:
                row.prompt = self._token_texts.prompt(row.prompt_ids)
                row.tokens = self._token_texts.tokens(row.completion_ids)

        def file() -> None:
            write_whole(f"{path}.parquet", lambda part: write_parquet(rows, part, step, mode))

        def page() -> None:
            in_page = self.args.num_completions_in_page
            write_whole(f"{path}.html", lambda part: write_page(rows, part, step, mode, clip, in_page))

        def samples() -> None:
            if is_rich_available():
                from rich.console import Console

                from .terminal import print_rows

                print_rows(rows, step, mode, clip, count, Console())

        def tables() -> None:
            shown = [rows[number] for number in sample_rows(rows, count, step)]
            for backend in report_backends(self.args.report_to) if shown else ():
                table = report_table(shown, step, mode, backend, self.log_unique_prompts)
                label = "token_scores" if mode == "train" else f"{mode}_token_scores"
                backend.log({label: backend.Table(dataframe=table)})

        for show in (completions, file, page, samples, tables):
            try:
                if rows or show is completions:
                    show()
            except Exception as error:
                self._warn_once(f"the token view's {show.__name__}", error)

    def _with_rewards(self, rows: list[TokenRow], batch: KeptBatch) -> list[TokenRow]:
        """The rows of a batch, no more than TRL's logs hold, with what those say of them."""
        rows = rows[-self.args.generation_batch_size :]
        for name, column in batch.rewards.items():
            for row, value in zip(rows, column[-len(rows) :], strict=True):
                row.rewards[name] = value
        weights = dict(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        for row in rows:
            found = {name: value for name, value in row.rewards.items() if name in weights and value == value}
            if found:
                row.reward = sum(weights[name] * value for name, value in found.items())
        if batch.images:
            for row, images in zip(rows, batch.images[-len(rows) :], strict=True):
                row.images = list(images or ())
        return rows


def report_backends(report_to: list[str]) -> list[Any]:
    """The modules that show tables, among those that a run reports to, as TRL chooses them."""
    backends = []
    if "wandb" in report_to:
        import wandb

        backends += [wandb] if wandb.run is not None else []
    if "trackio" in report_to:
        import trackio

        backends.append(trackio)
    return backends


def write_whole(path: str, write: Callable[[str], None]) -> None:
    """Have a file appear under its name with all of its content, or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        write(f"{path}.part")
        os.replace(f"{path}.part", path)
    except BaseException:
        Path(f"{path}.part").unlink(missing_ok=True)
        raise
