"""TRL's samples of completions, in the terminal, in a file and in wandb: when, and in a form that all of them take."""

import math
import warnings
from collections import deque
from typing import Any

from transformers.utils import is_rich_available

from .terminal_text import harmless
from .trl_hooks import print_prompt_completions_sample, uploads_without


# Times that completions are logged in a run, unless `log_completions_steps` says otherwise.
NUM_LOGS = 100


class CompletionTablesMixin:
    """
    Lets `log_completions` look at a run without getting into its way.

    - Completions are logged every `log_completions_steps` optimizer steps, with the first log and at the last step.
    - Whatever cannot be shown (a full disk, a wandb that does not answer, a picture that nothing encodes) gives a warning,
      the first time, and the run goes on.
    - wandb's tables take no lists of parts that have different keys, which is what a message with images consists of. While
      TRL logs, the content of these messages is a text.
    - Control characters in prompts, completions and columns that rewards add do not reach the terminal.
    - What the files hold of the data is not uploaded with the model, by `push_to_hub` and `hub_strategy`.
    """

    _completion_folders = ("completions",)  # in `output_dir`

    def __init__(self, *args, **kwargs):
        self._completions_logged: dict[str, int] = {}  # at which step, of training and of each evaluation
        self._cannot_show: set[str] = set()
        super().__init__(*args, **kwargs)

    def _begin_run(self):
        super()._begin_run()
        self._completions_logged.clear()

    def push_to_hub(self, *args, **kwargs):
        with uploads_without([f"{folder}/*" for folder in self._completion_folders]):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        with uploads_without([f"{folder}/*" for folder in self._completion_folders]):
            super()._push_from_checkpoint(checkpoint_folder)

    def _completions_due(self, logs: dict[str, Any]) -> str | None:
        """The name of the log if completions are to be shown with it; the same on all ranks."""
        name, step = self._log_name(logs), self.state.global_step
        if not self.log_completions or name is None:
            return None
        every = getattr(self.args, "log_completions_steps", None) or math.ceil(self.state.max_steps / NUM_LOGS) or 1
        last = self._completions_logged.get(name)
        is_due = last is None or step == last or step // every > last // every or step == self.state.max_steps
        return name if is_due else None

    def log(self, logs, start_time=None):
        name = self._completions_due(logs)
        before = {column: self._logs[column] for column in ("prompt", "completion")}
        if "wandb" in self.args.report_to:
            self._logs.update({column: deque(map(as_text, rows), rows.maxlen) for column, rows in before.items()})
        asked, count, self._are_metrics_logged = self.log_completions, self.num_completions_to_print, False
        self.log_completions, self.num_completions_to_print = name is not None, 0
        try:
            super().log(logs, start_time)
        except Exception as error:
            if not self._are_metrics_logged:
                raise
            self._warn_once("TRL's table of completions", error)
        finally:
            self._logs.update(before)
            self.log_completions, self.num_completions_to_print = asked, count
        if name is not None:
            self._completions_logged[name] = self.state.global_step
            if self.accelerator.is_main_process:
                self._print_samples()

    def _print_samples(self) -> None:
        """Print TRL's samples, with what a terminal would obey made visible."""
        logs = self._logs
        if not is_rich_available():
            return
        try:
            print_prompt_completions_sample(
                *(list(map(shown, logs[column])) for column in ("prompt", "completion")),
                {name: list(values) for name, values in logs["rewards"].items()},
                list(logs["advantages"]),
                self.state.global_step,
                self.num_completions_to_print,
                extra={harmless(name): list(map(shown, values)) for name, values in logs["extra"].items()},
            )
        except Exception as error:
            self._warn_once("samples in the terminal", error)

    def _warn_once(self, what: str, error: Exception) -> None:
        if what not in self._cannot_show:
            self._cannot_show.add(what)
            warnings.warn(
                f"At step {self.state.global_step}, {what} could not be shown: {error!r}. The run goes on. This is said once; "
                "later ones are tried again."
            )


def as_text(messages: Any) -> Any:
    """The same messages, with what is no text in brackets; a plain text stays as it is."""
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "content": "".join(map(part_as_text, message["content"]))}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def part_as_text(part: dict[str, Any]) -> str:
    return part["text"] if part.get("type") == "text" else f"[{part.get('type')}]"


def shown(value: Any) -> Any:
    """The same text, messages or parts of them, with control characters that a terminal shows and does not obey."""
    if isinstance(value, str):
        return harmless(value)
    if isinstance(value, list):
        return list(map(shown, value))
    return {key: shown(part) for key, part in value.items()} if isinstance(value, dict) else value
