"""One run: the models and data of its cell, its trainer, and the row of what was measured."""

import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, TrainerCallback

from .cells import ARMS, REGIMES, SMOKE_REGIME, SMOKE_TASKS, TASKS
from .models import (
    Evaluation,
    Evaluator,
    build_once,
    load_model,
    load_processor,
    round_to_four_bits,
    round_weights,
    swap_ends,
)
from .stale import StaleSampler
from .trainers import build_trainer


# Share of positions at which the teacher with outliers is sure of a random token, and the length of its hidden state there.
OUTLIERS = 0.02
OUTLIER_NORM = 30.0

# Logged by some trainers and not by others: column of the trace -> names in their logs, which are added up.
TRACES = {
    "grad_norm": ("grad_norm",),
    "completion_length": ("completions/mean_length",),
    "clamped": ("score/clamped_low", "score/clamped_high"),
    "sampled_reverse_kl": ("reverse_kl",),
    "score_std": ("score/std",),
    "score_mean": ("score/mean",),
}


class Measurements(TrainerCallback):
    """Evaluates the student every `every` steps, and knows how long that took."""

    def __init__(self, evaluate: Evaluator, every: int):
        self.evaluate, self.every = evaluate, every
        self.points, self.seconds = [], 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            start = time.perf_counter()
            self.points.append({"step": state.global_step, **vars(self.evaluate(model))})
            self.seconds += time.perf_counter() - start


def run_cell(
    task: str, regime: str, arm: str, learning_rate: float, seed: int, output_dir: Path, smoke: bool = False
) -> dict[str, Any]:
    """
    Run a cell.

    Returns:
        `dict`: the cell; `accuracy`, `reverse_kl` and `length` at the end (see [`Evaluation`]) and in the lists `eval_...`
            over time; the lists of `TRACES`, one number per step; `diverged`, whether the student ended in NaN, which
            counts as an accuracy of 0; and `train_seconds`, without the evaluations.
    """
    row = {"task": task, "regime": regime, "arm": arm, "learning_rate": learning_rate, "seed": seed}
    size, conditions = TASKS[task], REGIMES[regime]
    if smoke:
        size, conditions = SMOKE_TASKS[task], replace(conditions, **SMOKE_REGIME)
    paths = {which: build_once(task, size, seed, which, output_dir) for which in ("data", "teacher", "student")}
    student = load_model(paths["student"])
    processor = load_processor(paths["student"])
    teacher = load_teacher(conditions.teacher, paths, processor)
    evaluate = Evaluator(paths["data"], processor, teacher, size.max_new_tokens)
    measurements = Measurements(evaluate, size.eval_steps)
    history, seconds, diverged = [], 0.0, False
    if arm in ("student", "teacher"):
        end = evaluate(teacher if arm == "teacher" else student)
    else:
        options = {"learning_rate": learning_rate, "max_steps": size.steps, "seed": seed, "data_seed": seed}
        with tempfile.TemporaryDirectory() as folder:
            options["output_dir"] = folder
            train_split = load_from_disk(paths["data"])["train"]
            trainer = build_trainer(ARMS[arm], size, conditions, student, teacher, processor, train_split, options)
            if conditions.staleness:  # first: the evaluation at the end of a step comes after it
                trainer.add_callback(StaleSampler(student, conditions.staleness))
            trainer.add_callback(measurements)
            trainer.remove_callback(PrinterCallback)
            start = time.perf_counter()
            try:
                trainer.train()
            except (RuntimeError, ValueError):  # of a sampler or a check that has met NaN, or a mistake
                if evaluate.can_answer(student):
                    raise
            seconds = time.perf_counter() - start - measurements.seconds
        history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        if diverged := not evaluate.can_answer(student):
            end = Evaluation(accuracy=0.0, reverse_kl=math.nan, length=math.nan)
        elif measurements.points and measurements.points[-1]["step"] == size.steps:
            end = Evaluation(**{key: value for key, value in measurements.points[-1].items() if key != "step"})
        else:
            end = evaluate(student)
    row.update(vars(end), diverged=diverged, steps=len(history), train_seconds=seconds)
    for name in ("step", *Evaluation.__dataclass_fields__):
        row[f"eval_{name}"] = [point[name] for point in measurements.points]
    for name, keys in TRACES.items():
        known = bool(history) and all(key in history[0] for key in keys)
        row[name] = [sum(entry.get(key, math.nan) for key in keys) for entry in history] if known else []
    return row


def load_teacher(kind: str, paths: dict[str, Path], processor: ProcessorMixin) -> PreTrainedModel:
    """The teacher of a regime, see [`Regime`]."""
    teacher = load_model(paths["student" if kind == "student" else "teacher"])
    if kind == "student":
        round_weights(teacher)
    elif kind == "outliers":
        add_outliers(teacher)
    elif kind == "four-bit":
        round_to_four_bits(teacher)
    elif kind == "other-end":
        tokenizer = processor.tokenizer
        swap_ends(teacher, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(tokenizer.turn_token))
    return teacher


def add_outliers(model: PreTrainedModel) -> None:
    """
    Make a model sure of a random token at `OUTLIERS` of its positions, always the same ones for the same context.

    Its last hidden state there becomes one that the LM head reads as that token, with nothing else near it.
    """
    head = model.get_output_embeddings().weight

    def confuse(module, inputs, hidden):
        # A pseudo-random number of the context: digits of the hidden state that rounding does not reach.
        number = (hidden.double().sum(-1) * 1e3).floor().long()
        wrong = (number * 2654435761 % 2**32) < OUTLIERS * 2**32
        token = (number * 40503 // 7) % len(head)
        direction = head[token] / head[token].norm(dim=-1, keepdim=True)
        return torch.where(wrong.unsqueeze(-1), OUTLIER_NORM * direction, hidden)

    model.get_decoder().norm.register_forward_hook(confuse)
