"""
The clock of a step. Phases exclude each other; what is called within a phase and is none of its own counts for it.
"""

import functools
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel
from trl import DistillationTrainer, GRPOTrainer

from gndpo_trl import GNDPOTrainer
from gndpo_trl.clock import Clock
from gndpo_trl.gspo import GSPOTrainer


PHASES = (
    *("teacher scoring", "student scoring", "distributions", "loss + backward", "optimizer"),
    *("TRL's bookkeeping", "GNDPO's own"),
)


class Stopwatch:
    def __init__(self, device: torch.device, teacher: PreTrainedModel | None):
        self.device = device
        self.teacher = teacher
        self.reset()

    def reset(self) -> None:
        self.seconds = defaultdict(float)
        self.tokens = defaultdict(int)
        self.stack = []
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str):
        self.switch()
        self.stack.append(name)
        yield
        self.switch()
        self.stack.pop()

    def switch(self) -> None:
        now = self.now()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    def follow(self, clock: Clock) -> None:
        """Take over a phase of the product's clock that no method of a trainer is."""
        phase = clock.phase

        @contextmanager
        def followed(name):
            with phase(name), self.phase(name) if name in PHASES else nullcontext():
                yield

        clock.phase = followed

    def count_tokens(self, module, args, kwargs) -> None:
        self.tokens["padded"] += kwargs["input_ids"].numel()
        if "shared_prompts" in kwargs:  # a packed row holds no padding
            self.tokens["real"] += kwargs["input_ids"].numel()
        else:
            self.tokens["real"] += kwargs["attention_mask"].sum().item()


def time_method(cls: type, name: str, get_phase) -> None:
    """Have `cls.name` report to the stopwatch of the trainer it is called on."""
    method = getattr(cls, name)

    @functools.wraps(method)
    def timed(self, *args, **kwargs):
        model = args[0] if args else kwargs.get("model")
        with self.stopwatch.phase(get_phase(self, model)):
            return method(self, *args, **kwargs)

    setattr(cls, name, timed)


def forward_phase(trainer, model) -> str:
    if not isinstance(model, torch.nn.Module):  # what GNDPO hands to TRL in place of the model, in a phase of its own
        return trainer.stopwatch.stack[-1]
    if model is trainer.stopwatch.teacher:
        return "teacher scoring"
    return "loss + backward" if torch.is_grad_enabled() else "student scoring"


def time_trainers() -> None:
    for trainer in (GRPOTrainer, DistillationTrainer):
        for name in ("_prepare_inputs", "_generate_and_score_completions"):
            time_method(trainer, name, lambda *_: "TRL's bookkeeping")
        time_method(trainer, "_compute_loss", lambda *_: "loss + backward")
    time_method(GRPOTrainer, "_get_per_token_logps_and_entropies", forward_phase)
    time_method(DistillationTrainer, "_get_last_hidden_state", forward_phase)
    for trainer in (GNDPOTrainer, GSPOTrainer):
        for name in ("_prepare_inputs", "_generate_and_score_completions", "_compute_loss"):
            time_method(trainer, name, lambda *_: "GNDPO's own")
        time_method(trainer, "_get_per_token_logps_and_entropies", lambda *_: "GNDPO's own")
        time_method(trainer, "_forward", forward_phase)
