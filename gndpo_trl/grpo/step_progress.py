"""
What a step is doing, on a line under the bar that counts steps: sampling, scoring and learning can take minutes.

The line says how far the present phase is, in tokens of the main process, how many of them it goes through in a second,
and how long the step will take from here on, by what the phases took last time. A *step* is what is done with one
generation batch. It is drawn by a thread, because vLLM, say, returns only when everything is sampled.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm


# Seconds that a step takes before its line appears; quick ones have none.
PATIENCE = 5.0
# Seconds between two looks at it, at a terminal and where every look writes a line: in a log, or in a notebook.
INTERVAL, LOG_INTERVAL = 1.0, 60.0

GENERATING, LEARNING, STUDENT_SCORING = "generating", "learning", "student scoring"


@dataclass
class Phase:
    name: str
    start: float  # seconds of the clock
    total: int = 0  # tokens that it goes through; 0: not known
    done: int = 0


class StepLine:
    """
    The line, and what it knows about the step.

    Args:
        clock (`Callable`, *optional*): Gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._phase: Phase | None = None
        self._step_start = 0.0
        # Seconds of the phases, in the order in which they ended, of this step and of the one before.
        self._spent: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._rates: dict[str, float] = {}  # tokens per second of each phase when it was last over
        self._paused_at: float | None = None
        self.beside: Callable[[], str] = str  # what goes on beside the phase, in words

    @property
    def phase(self) -> str | None:
        return None if self._phase is None else self._phase.name

    def begin(self, name: str, total: int = 0) -> None:
        """End the present phase and begin another, of `total` tokens. To generate is to begin a step."""
        if self._paused_at is not None:
            return
        now, phase = self._clock(), self._phase
        if phase is not None:
            seconds = now - phase.start
            self._spent[phase.name] = self._spent.pop(phase.name, 0.0) + seconds
            if phase.done and seconds > 0:
                self._rates[phase.name] = phase.done / seconds
        if name == GENERATING:
            self._last, self._spent, self._step_start = self._spent, {}, now
        self._phase = Phase(name, now, total)

    def expect(self, tokens: int) -> None:
        """The present phase goes through more tokens."""
        if self._phase is not None and self._paused_at is None:
            self._phase.total += tokens

    def advance(self, tokens: int) -> None:
        """The present phase has gone through more tokens."""
        phase = self._phase
        if phase is not None and self._paused_at is None:
            # Once in a run, a few tokens are tried out first, to see whether prompts can be shared.
            phase.done = min(phase.done + tokens, phase.total or math.inf)

    def pause(self, is_paused: bool) -> None:
        """Show nothing and learn nothing for a while, because something else than the step is done: an evaluation."""
        now = self._clock()
        if is_paused and self._paused_at is None:
            self._paused_at = now
        elif not is_paused and self._paused_at is not None:
            away, self._paused_at = now - self._paused_at, None
            self._step_start += away
            if self._phase is not None:
                self._phase.start += away

    def text(self) -> str:
        """The line as it is now; empty where there is nothing to say."""
        phase, now = self._phase, self._clock()
        if phase is None or self._paused_at is not None or now - self._step_start < PATIENCE:
            return ""
        seconds = now - phase.start
        parts = [f"{phase.name} {tqdm.format_interval(seconds)}"]
        if phase.total:
            parts.append(f"{phase.done:,} of {phase.total:,} tokens")
        if phase.done and seconds > 0:
            parts.append(f"{phase.done / seconds:,.0f} tokens/s")
        elif phase.name in self._rates:
            parts.append(f"{self._rates[phase.name]:,.0f} tokens/s last time")
        left = self._seconds_left(phase, seconds)
        if left is not None:
            parts.append(f"{tqdm.format_interval(left)} left in this step")
        if beside := self.beside():
            parts.append(beside)
        return ", ".join(parts)

    def _seconds_left(self, phase: Phase, seconds: float) -> float | None:
        """Of the step; `None` in the first one, until its last phase."""
        names = list(self._last)
        if phase.name not in names and phase.name != LEARNING:
            return None
        if phase.done and phase.total:
            of_phase = seconds * max(phase.total - phase.done, 0) / phase.done
        elif phase.name in names:
            of_phase = max(self._last[phase.name] - self._spent.get(phase.name, 0.0) - seconds, 0.0)
        else:
            return None
        following = names[names.index(phase.name) + 1 :] if phase.name in names else []
        return of_phase + sum(self._last[name] for name in following)

    @contextmanager
    def shown(self) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._draw, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _draw(self, over: threading.Event) -> None:
        bar, is_terminal = None, sys.stderr.isatty()
        while not over.wait(INTERVAL if is_terminal else LOG_INTERVAL):
            text = self.text()
            if not is_terminal and text:
                tqdm.write(text, file=sys.stderr)
            elif bar is None and text:
                bar = tqdm(desc=text, bar_format="{desc}", position=1, leave=False)  # the bar of the steps is above
            elif bar is not None:
                bar.set_description_str(text)
        if bar is not None:
            bar.close()


class StepProgressMixin:
    """
    Gives a [`~trl.GRPOTrainer`] that makes forward passes over real tokens the line of a [`StepLine`], on the main process
    and unless `disable_tqdm` is set.
    """

    _line: StepLine | None = None
    _num_tokens = 0  # of the generation batch; a run may begin with an evaluation, or in the middle of a batch

    def train(self, *args, **kwargs):
        if self.args.disable_tqdm or not self.is_world_process_zero():
            return super().train(*args, **kwargs)
        self._line = StepLine()
        try:
            with self._line.shown():
                return super().train(*args, **kwargs)
        finally:
            self._line = None

    def _begin_run(self):
        super()._begin_run()
        self._num_tokens = 0

    def _begin_phase(self, name: str) -> None:
        if self._line is not None:
            self._line.begin(name)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._line is not None:
            self._line.pause(not self.model.training)
            self._line.begin(GENERATING)
        rollout = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self._num_tokens = count_tokens(rollout) if self._line is not None else 0
        return rollout

    def _generate_single_turn(self, *args, **kwargs):
        result = super()._generate_single_turn(*args, **kwargs)
        if self._line is not None:
            self._line.advance(sum(map(len, result[0])))
        return result

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **options
    ):
        if self._line is not None and batch_size is not None:
            if self._line.phase == GENERATING:  # TRL scores what it has sampled
                self._line.begin(STUDENT_SCORING)
            self._line.expect(attention_mask.sum().item())
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **options
        )

    def _forward(self, model, batch, *args, **kwargs):
        tokens = 0 if self._line is None or self._line.phase == LEARNING else batch["attention_mask"].sum().item()
        results = super()._forward(model, batch, *args, **kwargs)
        if tokens:
            self._line.advance(tokens)
        return results

    def _compute_loss(self, model, inputs):
        if self._line is None:
            return super()._compute_loss(model, inputs)
        self._line.pause(not self.model.training)
        if self._line.phase != LEARNING:
            self._line.begin(LEARNING, self._num_tokens * self.num_iterations)
        loss = super()._compute_loss(model, inputs)
        self._line.advance(count_tokens(inputs))
        return loss


def count_tokens(rollout: dict[str, Any]) -> int:
    """Tokens of the prompts and completions of a rollout, or of rows of it."""
    return (rollout["prompt_mask"].sum() + rollout["completion_mask"].sum()).item()
