"""The token view of a trainer: gathers the rows of a generation batch, and writes them where TRL logs completions."""

import os
import re
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.utils import is_rich_available

from . import FOLDER
from .page import write_page
from .rows import TokenRow, rows_of
from .table import report_table, write_parquet
from .token_text import TokenTexts


class TokenViewMixin:
    """
    With `log_completions`, writes `token_scores/{mode}_{step}.parquet` and `.html` in `output_dir` whenever TRL logs
    completions, prints the rows in place of TRL's samples, and adds a table of them to wandb and trackio.

    They are those of the last generation batch, and after an evaluation those of its last `generation_batch_size`
    completions, as in TRL's own table. Each batch is written once. A run that goes on from a checkpoint in the middle of a
    generation batch writes from the next batch on.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        size = self.args.generation_batch_size
        self._token_rows: dict[str, deque[TokenRow]] = {mode: deque(maxlen=size) for mode in ("train", "eval")}
        self._token_texts = TokenTexts(self._tokenizer) if self.log_completions else None

    def _begin_run(self):
        super()._begin_run()
        for rows in self._token_rows.values():
            rows.clear()

    def _keep_token_rows(
        self,
        mode: str,
        rollout: dict[str, Any],
        scores: torch.Tensor,
        logps: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
    ) -> None:
        """
        Gather the rows of the generation batch that TRL has just logged, on all ranks together; the main one keeps them.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            rollout (`dict`): The batch, with its `advantages` `(B, T)`.
            scores (`torch.Tensor` of shape `(B, T)`): Raw scores in nats.
            logps (`tuple[torch.Tensor, torch.Tensor]`): Log-probs `(B, T)` of teacher and student, in nats.
            mask (`torch.Tensor` of shape `(B, T)`): True on the tokens that take part in the loss.
        """
        if not self.log_completions:
            return
        own = rows_of(
            rollout,
            scores,
            logps,
            mask,
            score_clip=self.args.score_clip,
            rank=self.accelerator.process_index,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        rows = gather_object(own)
        if not self.accelerator.is_main_process:
            return
        # TRL's logs end with the same completions, in the same order; they are no longer than a generation batch.
        rows = rows[-self.args.generation_batch_size :]
        for name, column in self._logs["rewards"].items():
            for row, value in zip(rows, list(column)[-len(rows) :], strict=True):
                row.rewards[name] = value
        weights = dict(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        for row in rows:
            found = {name: value for name, value in row.rewards.items() if name in weights and value == value}
            if found:
                row.reward = sum(weights[name] * value for name, value in found.items())
        if "num_images" in rollout and self.log_multimodal:
            for row, images in zip(rows, list(self._logs["images"])[-len(rows) :], strict=True):
                row.images = list(images or ())
        self._token_rows[mode].extend(rows)

    def evaluate(self, *args, **kwargs):
        self._token_rows["eval"].clear()  # those of a prediction, which logs nothing
        return super().evaluate(*args, **kwargs)

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        name = mode if mode == "train" else evaluation_name(logs)
        count = self.num_completions_to_print
        if self.log_completions and not self._logs["extra"]:  # columns of the user's that TRL's table alone shows
            self.num_completions_to_print = 0
        try:
            super().log(logs, start_time)
        finally:
            self.num_completions_to_print = count
        if self._token_rows[mode]:
            self._write_token_rows(list(self._token_rows[mode]), name)
            self._token_rows[mode].clear()

    def _write_token_rows(self, rows: list[TokenRow], mode: str) -> None:
        step, clip = self.state.global_step, self.args.score_clip
        for row in rows:
            row.prompt = self._token_texts.prompt(row.prompt_ids)
            row.tokens = self._token_texts.tokens(row.completion_ids)
        name = re.sub(r"[^-.+ =\w]", "_", mode)  # of an evaluation set, which may have any
        path = os.path.join(self.args.output_dir, FOLDER, f"{name}_{step:05d}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_whole(f"{path}.parquet", lambda part: write_parquet(rows, part, step, mode))
        write_whole(f"{path}.html", lambda part: write_page(rows, part, step, mode, clip))
        if is_rich_available():
            from rich.console import Console

            from .terminal import print_rows

            print_rows(rows, step, mode, clip, self.num_completions_to_print, Console())
        for backend in report_backends(self.args.report_to):
            table = report_table(rows, step, mode, backend, self.log_unique_prompts)
            label = "token_scores" if mode == "train" else f"{mode}_token_scores"
            backend.log({label: backend.Table(dataframe=table)})


def evaluation_name(logs: dict[str, Any]) -> str:
    """`"eval"`, or `"eval_{name}"` for one of several evaluation sets: what transformers puts before each metric."""
    names = [key.removesuffix("_runtime") for key in logs if key.startswith("eval") and key.endswith("_runtime")]
    return names[0] if names else "eval"


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
    """Have a file appear under its name with all of its content."""
    write(f"{path}.part")
    os.replace(f"{path}.part", path)
