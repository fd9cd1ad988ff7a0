"""TRL's table of completions in wandb, for prompts with images too."""

from collections import deque
from typing import Any


class CompletionTablesMixin:
    """
    Lets a [`~trl.GRPOTrainer`] log its completions to wandb where prompts have images.

    A table of wandb takes no lists of parts that have different keys, which is what such a message consists of: TRL's
    `log_completions` then ends the run at its first log. While TRL logs, the content of these messages is a text.
    """

    def log(self, logs, start_time=None):
        before = {name: self._logs[name] for name in ("prompt", "completion")}
        if "wandb" in self.args.report_to:
            self._logs.update({name: deque(map(as_text, column), column.maxlen) for name, column in before.items()})
        try:
            super().log(logs, start_time)
        finally:
            self._logs.update(before)


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
