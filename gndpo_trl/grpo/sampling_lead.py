"""
Sampling ahead: while the student learns from one generation batch, a thread waits for the next ones.

The thread does nothing but ask a server, or call a `rollout_func`. Whatever ranks do together stays on the main thread, in the
same order on all of them, and weights are sent when nothing is being sampled.
"""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from trl import GRPOTrainer

from .checkpoints import RunCannotGoOn
from .config_checks import steps_behind
from .ranks import raised_on_all_ranks


# Seconds between two looks at whether the run is to end, while it waits for samples.
LOOK = 1.0


@dataclass
class Request:
    """
    A generation batch that is sampled before it is due.

    Attributes:
        prompts (`list`): This rank's, as TRL makes them of rows.
        tokenized (`tuple`): What `_tokenize_prompts` makes of them; empty with a `rollout_func`.
        lead (`int`): Batches that are learned from between the request and its turn.
        due (`int`): Optimizer steps made when it is its turn.
        sample (`Callable`): Samples, in the thread, and returns what was sampled.
        step (`int`): Optimizer steps of the weights that sample; -1 before it has begun.
        began, ended (`float`): Seconds of the monotonic clock; 0 before.
        answer, error: What came of it.
    """

    prompts: list
    tokenized: tuple
    lead: int
    due: int
    sample: Callable[[], Any] | None = None
    step: int = -1
    began: float = 0.0
    ended: float = 0.0
    answer: Any = None
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.ended > 0


class SamplingThread:
    """
    Samples one request after the other, none with weights that would be older than `most_steps` when it is learned from.

    Args:
        most_steps (`int`): Optimizer steps that a batch may be behind.
    """

    def __init__(self, most_steps: int):
        self.most_steps, self.step = most_steps, 0
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None
        self._is_over = False
        self._changed = threading.Condition()
        # A daemon, which Python does not wait for at its end: a request may hang.
        threading.Thread(target=self._run, name="sampling-ahead", daemon=True).start()

    def post(self, request: Request) -> None:
        with self._changed:
            self._waiting.append(request)
            self._changed.notify_all()

    def have_weights_of(self, step: int) -> None:
        """What begins from now on is sampled with the weights of this optimizer step."""
        with self._changed:
            self.step = step
            self._changed.notify_all()

    def is_idle(self) -> bool:
        """Whether nothing is being sampled, or would be without new weights."""
        return self._running is None and not self._may_begin()

    def wait(self, is_over: Callable[[], bool], seconds: float) -> bool:
        """Whether something is the case, at the latest after some seconds."""
        with self._changed:
            return self._changed.wait_for(is_over, seconds)

    def end(self) -> None:
        with self._changed:
            self._is_over = True
            self._waiting.clear()
            self._changed.notify_all()

    def _may_begin(self) -> bool:
        return bool(self._waiting) and self._waiting[0].due - self.step <= self.most_steps

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or self._may_begin())
                if self._is_over:
                    return
                request = self._running = self._waiting.popleft()
                request.step, request.began = self.step, time.monotonic()
            try:
                request.answer = request.sample()
            except Exception as error:  # raised on the main thread
                request.error = error
            with self._changed:
                request.ended, self._running = time.monotonic(), None
                self._changed.notify_all()


class LookAhead:
    """
    The micro-batches of an epoch, in their order, of which later ones can be looked at.

    Args:
        batches (`Iterator`): Those of the data loader.
    """

    def __init__(self, batches: Iterator[Any]):
        self.batches = batches
        self._unused: deque[Any] = deque()  # the first of them is in use
        self._num_given = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = self.after(self._num_given)
        if batch is None:
            raise StopIteration
        self._num_given += 1
        return batch

    def after(self, number: int) -> Any:
        """The micro-batch that many after the one in use; `None` if the epoch ends before."""
        while len(self._unused) <= number:
            try:
                self._unused.append(next(self.batches))
            except StopIteration:
                return None
        return self._unused[number]

    def used(self) -> None:
        """The next one is in use."""
        self._unused.popleft()
        self._num_given -= 1

    @property
    def num_given(self) -> int:
        """Micro-batches of the step in progress that are left, with the one in use."""
        return self._num_given


class _Prompts(Exception):
    """Carries the prompts of a batch out of TRL's method, which makes them of rows and then samples."""


class SamplingLeadMixin:
    """
    Has a [`~trl.GRPOTrainer`] with a vLLM server, or with a `rollout_func` that has the attribute `samples_ahead`, sample
    `args.sampling_lead` generation batches ahead. With 0 it does nothing.

    - Prompts come in the same order as without it. The first batch of an epoch, and of a run that goes on from a checkpoint,
      is sampled when it is due.
    - A request that runs when a run is saved goes on; it is not part of the checkpoint. One that runs when the student is
      evaluated ends first. When a run ends, however it ends, what was asked for is left.
    - `sampling/lead`, `sampling/staleness`, and the seconds of the request and of who waited for whom are logged.

    Raises:
        `ValueError`: at construction, with tools or environments, or where nothing samples elsewhere.
        [`RunCannotGoOn`]: on all ranks, if the server has no answer, or if the run is told to end while it waits for one.
    """

    _ahead: SamplingThread | None = None  # of the run in progress
    _requests: deque[Request]
    _look_ahead: LookAhead | None = None
    _due: Request | None = None  # the one whose turn it is, while TRL samples
    _awaited: Request | None = None  # the same, and later the one after it
    _next: list[Request]
    _leads = _looks = False
    _tokenized: tuple | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._requests, self._next = deque(), []
        if not self._lead:
            return
        if self.tools or self.environment_factories is not None:
            raise ValueError(
                f"`sampling_lead` is {self._lead}, which does not go with tools or environments: what they do between two "
                "requests would be done beside the learning. Set it to 0."
            )
        is_server = self.use_vllm and self.vllm_generation.mode == "server"
        if self.rollout_func is not None and not getattr(self.rollout_func, "samples_ahead", False):
            raise ValueError(
                f"`sampling_lead` is {self._lead}, but `rollout_func` does not say that it may be called in a thread while the "
                "student learns. If it asks a server, set its attribute `samples_ahead = True`; or set `sampling_lead` to 0."
            )
        if self.rollout_func is None and not is_server:
            raise ValueError(
                f"`sampling_lead` is {self._lead}, but what samples is in this process, which learns meanwhile. Set "
                '`vllm_mode="server"`, or `sampling_lead` to 0.'
            )
        if is_server:
            self.vllm_generation.between_requests = self._between_requests

    @property
    def _lead(self) -> int:
        return getattr(self.args, "sampling_lead", 0)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self._leave_requests()

    def _begin_run(self):
        super()._begin_run()
        self._leave_requests()
        self._staleness = 0
        if self._lead:
            self._ahead = SamplingThread(steps_behind(self.args))
            if self._line is not None:
                self._line.beside = self._what_is_ahead

    def _what_is_ahead(self) -> str:
        """For the line of the step, which another thread draws."""
        request = self._awaited
        if request is None:
            return ""
        if request is self._due:
            return "" if request.is_done else "waits for samples"
        return "the next batch is sampled" if request.is_done else "the next batch is being sampled"

    def _leave_requests(self) -> None:
        if self._ahead is not None:
            self._ahead.end()
            if self.use_vllm:
                self.vllm_generation.leave_requests()
        self._ahead, self._look_ahead, self._awaited = None, None, None
        self._requests.clear()
        self._next.clear()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._ahead is not None:
            if self._look_ahead is None or self._look_ahead.batches is not epoch_iterator:
                self._look_ahead = LookAhead(epoch_iterator)
            epoch_iterator = self._look_ahead
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self._look_ahead is not None and self.model.training:
            self._look_ahead.used()
        return inputs

    def _generate_and_score_completions(self, inputs):
        is_of_loop = self._look_ahead is not None and self.model.training and self._look_ahead.after(0) is inputs
        self._leads = is_of_loop  # and not of somebody who asks for a batch beside it
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._leads, self._due, self._tokenized = False, None, None

    def _look(self) -> None:
        """Find out what comes next, as far as can be known before the weights are."""
        args, look_ahead = self.args, self._look_ahead
        # Micro-batches that this run will still learn from, and those of its step that it has.
        left = (
            look_ahead.num_given
            + (self.state.max_steps - self.state.global_step - 1) * args.gradient_accumulation_steps
        )
        of_step = args.gradient_accumulation_steps - look_ahead.num_given
        first = max(len(self._requests), 1)  # the first request is for the batch in use
        for lead in range(first, self._lead + 1):
            # After a checkpoint whose completions were left, the batch in use begins in the middle.
            place = lead * args.steps_per_generation - self._step % args.steps_per_generation
            rows = look_ahead.after(place) if place < left else None
            if rows is None:
                return
            rows[:] = self._with_open_pictures(rows)
            prompts = self._prompts_of(rows)
            due = self.state.global_step + (of_step + place) // args.gradient_accumulation_steps
            tokenized = ()
            if self.rollout_func is None:
                prompt_ids, images, _ = self._tokenize_prompts(prompts)
                tokenized = prompt_ids, images, {}  # what else there is of images, vLLM makes itself
            self._next.append(Request(prompts, tokenized, lead, due))

    def _prompts_of(self, rows: list[dict[str, Any]]) -> list:
        """The prompts that TRL makes of rows."""
        self._looks = True
        try:
            GRPOTrainer._generate_and_score_completions(self, rows)
        except _Prompts as found:
            return found.args[0]
        finally:
            self._looks = False
        raise AssertionError("TRL sampled without `_generate`")

    def _take(self, request: Request) -> dict[str, float]:
        """Wait for the request whose turn it is, and say how it was sampled; all ranks together."""
        asked = time.monotonic()
        self._wait(lambda: request.is_done)
        waited = time.monotonic() - asked
        self._raise_together(request)
        sample = [request.step, request.ended - request.began, waited, max(asked - request.ended, 0.0)]
        steps, seconds, waits, idle = gather(torch.tensor([sample], device=self.accelerator.device)).unbind(1)
        self._staleness = self.state.global_step - int(steps.min())
        return {
            "sampling/lead": request.lead,
            "sampling/staleness": self._staleness,
            # The longest request is that of the rank that asks the server.
            "sampling/seconds": seconds.max().item(),
            "sampling/waited": waits.max().item(),
            "sampling/was_ready": idle.min().item(),
        }

    def _wait(self, is_over: Callable[[], bool]) -> None:
        """
        Wait until something is so on all ranks, which call this together.

        Raises:
            [`RunCannotGoOn`]: on all ranks, if one is told to end, or after `ddp_timeout` seconds.
        """
        begin, on_signal = time.monotonic(), self._on_signal
        while True:
            is_so = self._ahead.wait(is_over, LOOK)
            is_asked = on_signal is not None and on_signal.is_asked()
            is_late = time.monotonic() - begin > self.args.ddp_timeout
            looks = gather(torch.tensor([[is_so, is_asked, is_late]], device=self.accelerator.device))
            if looks[:, 0].all():
                return
            if looks[:, 1].any():
                raise RunCannotGoOn("The run was told to end while it waited for samples.")
            if looks[:, 2].any():
                raise RunCannotGoOn(
                    f"{self._who_samples()} has not answered for {self.args.ddp_timeout} seconds (`ddp_timeout`)."
                )

    def _raise_together(self, request: Request) -> None:
        """Raise what a request ended with, on all ranks."""
        error = request.error
        is_lost = error is not None and self.rollout_func is None and not isinstance(error, ValueError)
        self._end_if_lost(error if is_lost else None)
        with raised_on_all_ranks():
            if error is not None:
                raise error

    def _end_if_lost(self, error: Exception | None) -> None:
        """End the run on all ranks if the server is lost to one of them."""
        if gather(torch.tensor([int(error is not None)], device=self.accelerator.device)).any():
            texts = gather_object([None if error is None else f"{error!r}"[:1000]])
            text = next(text for text in texts if text is not None)
            raise RunCannotGoOn(f"{self._who_samples()} samples no more: {text}.") from error

    def _who_samples(self) -> str:
        if self.rollout_func is not None:
            return "`rollout_func`"
        client = getattr(self.vllm_generation, "vllm_client", None)
        return "The vLLM server" if client is None else f"The vLLM server at {client.base_url}"

    @contextmanager
    def _between_requests(self) -> Iterator[None]:
        """Nothing is being sampled in here, where weights are sent; on all ranks."""
        if self._ahead is None:
            yield
            return
        self._wait(self._ahead.is_idle)
        lost = None
        if self.use_vllm and self.accelerator.is_main_process:
            lost = self.vllm_generation.why_away()
        self._end_if_lost(lost)  # now: while weights are gathered, ranks wait for one another
        yield
        self._ahead.have_weights_of(self.state.global_step)

    def _generate(self, prompts):
        if self._looks:
            raise _Prompts(prompts)
        if not self._leads:
            return super()._generate(prompts)
        self._look()
        self._staleness, metrics = 0, {"sampling/lead": 0, "sampling/staleness": 0}
        if self._requests:
            self._due = self._requests.popleft()
            metrics = self._take(self._due)
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        if self.rollout_func is None:
            self._tokenized = None if self._due is None else self._due.tokenized
            return super()._generate(prompts)
        return self._generate_with_rollout_func(prompts)

    def _generate_with_rollout_func(self, prompts):
        rollout_func, due = self.rollout_func, self._due
        if not self.use_vllm:  # it sees to its weights itself, whenever it is called
            self._ahead.have_weights_of(self.state.global_step)
        if due is not None:
            self.rollout_func = lambda prompts, trainer: due.answer
        try:
            result = super()._generate(prompts)
        finally:
            self.rollout_func = rollout_func
        self._post()
        return result

    def _tokenize_prompts(self, prompts):
        if self._tokenized is None:
            return super()._tokenize_prompts(prompts)
        tokenized, self._tokenized = self._tokenized, None
        return tokenized

    def _generate_single_turn(self, *args, **kwargs):
        if not self._leads:
            return super()._generate_single_turn(*args, **kwargs)
        loaded, is_sampling = self._last_loaded_step, False
        if self._lead > 1:  # the next one may be running, with weights that are recent enough for it
            is_idle = torch.tensor([self._ahead.is_idle()], device=self.accelerator.device)
            is_sampling = not gather(is_idle).all()
        if is_sampling:
            self._last_loaded_step = self.state.global_step
        try:
            with nullcontext() if self._due is None else self.vllm_generation.answered(self._due.answer):
                result = super()._generate_single_turn(*args, **kwargs)
        finally:
            if is_sampling:
                self._last_loaded_step = loaded
        self._post()
        return result

    def _post(self) -> None:
        """Ask for what comes next."""
        rollout_func = self.rollout_func
        for request in self._next:
            if rollout_func is None:
                prompt_ids, images, _ = request.tokenized
                request.sample = self.vllm_generation.request(prompt_ids, images, self.num_generations)
            else:
                request.sample = partial(rollout_func, copy.deepcopy(request.prompts), self)
            self._requests.append(request)
            self._ahead.post(request)
        self._next.clear()
        self._awaited = self._requests[0] if self._requests else None
