"""What several test files share: rollouts, plain log-probs, gradients, canned completions, rows of the token view."""

import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from trl import GRPOTrainer

from gndpo_trl import GNDPOTrainer
from gndpo_trl.estimators import Reading, Sampled
from gndpo_trl.grpo.trl_hooks import MULTIMODAL_KEYS
from gndpo_trl.objective.advantages import Population, undefined_rows
from gndpo_trl.objective.scores import Score
from gndpo_trl.teachers import LocalTeacher, Teacher
from gndpo_trl.token_view.rows import TokenRow


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

NUM_TOKENS = 60  # and more than the tiny tokenizers have

# Lengths of canned completions: with a heavy tail, and such that several processes have about as many tokens.
LENGTHS = [24, 3, 2, 1, 2, 9, 1, 5]
SPREAD_LENGTHS = [2, 9, 3, 12, 1, 4, 20, 6]


def completions_of(lengths: list[int]) -> list[list[int]]:
    return [[11 + (7 * row + 3 * token) % 20 for token in range(length)] for row, length in enumerate(lengths)]


COMPLETIONS, SPREAD_COMPLETIONS = completions_of(LENGTHS), completions_of(SPREAD_LENGTHS)

# Of runs in several processes.
CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "num_generations": 1,
    "max_completion_length": 24,
    "max_steps": 1,
    # The step of plain gradient descent with rate 1 is the gradient, whatever holds it in pieces.
    "optim": "sgd",
    "learning_rate": 1.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "shuffle_dataset": False,
}


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, for DeepSpeed's compilation
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def make_rollout(trainer: GNDPOTrainer, count: int = 8) -> dict:
    """One training generation batch, as `train` would make it, with its advantages."""
    trainer.model.train()
    trainer.in_one_pass = False  # where they come after the loss
    rows = [trainer.train_dataset[index // 2] for index in range(count)]
    return trainer._generate_and_score_completions(rows)


def plain_logps(model, rollout: dict) -> torch.Tensor:
    """Log-probs of the completion tokens from an ordinary forward pass with full logits."""
    names = [key for key in MULTIMODAL_KEYS if key in rollout and key not in ("num_images", "num_tiles")]
    input_ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
    attention_mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, **{name: rollout[name] for name in names}
        ).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return logps[:, -rollout["completion_ids"].size(1) :]


def plain_log_probs(model, rollout: dict) -> torch.Tensor:
    """Log-probs `(B, T, V)` of all tokens at the completions of text, from a forward pass in the dtype of the model."""
    input_ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
    attention_mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    return logits[:, -rollout["completion_ids"].size(1) :].log_softmax(-1)


def gradients(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step, caught before the optimizer uses them."""
    caught = {}

    def catch(optimizer, args, kwargs):
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                caught.setdefault(name, parameter.grad.clone())

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(catch)
    trainer.train()
    return caught


def assert_same_gradients(found: dict, expected: dict) -> None:
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# Two steps share a generation batch, and each of them is saved.
IN_THE_MIDDLE = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2}


def assert_resumes_in_the_middle(make_trainer, folder, ended: int = 1, max_steps: int = 4, **options) -> None:
    """A run that `ended` in the middle of a generation batch, in `parts`, goes on to the weights of a whole one."""
    options = {**IN_THE_MIDDLE, **options}
    whole = make_trainer(output_dir=str(folder / "whole"), max_steps=max_steps, **options)
    whole.train()
    make_trainer(output_dir=str(folder / "parts"), max_steps=ended, **options).train()
    resumed = make_trainer(output_dir=str(folder / "parts"), max_steps=max_steps, **options)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name


def reward(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


def canned(prompts, trainer):
    prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
    return {"prompt_ids": prompt_ids, "completion_ids": COMPLETIONS, "logprobs": [[0.0] * n for n in LENGTHS]}


class Forgetful(LocalTeacher):
    """A model that may say that it does not know."""

    def may_not_know(self, rows):
        return [True] * len(rows)


class Table(Teacher):
    """Finds a token as likely as a table says, wherever it stands."""

    def __init__(self, seconds: float = 0.0, **logps: float):
        self.logps = -math.log(NUM_TOKENS) - 1e-3 * torch.arange(NUM_TOKENS)  # all the same would say nothing
        for token, logp in logps.items():
            self.logps[int(token.removeprefix("token_"))] = logp
        self.seconds = seconds

    def per_token_logps(self, rollout):
        time.sleep(self.seconds)
        return self.logps[rollout["completion_ids"]]


def make_row(tokens: list[str], scores: list[float], clip: float = 5.0, **options) -> TokenRow:
    scores = np.array(scores, dtype=np.float32)
    return TokenRow(
        rank=0,
        prompt_ids=np.zeros(0, dtype=np.int64),
        completion_ids=np.arange(len(tokens)),
        scores=scores,
        clamped=np.abs(scores) > clip,
        teacher_logps=np.where(np.isnan(scores), np.nan, scores - 1).astype(np.float32),
        student_logps=np.where(np.isnan(scores), np.nan, -1).astype(np.float32),
        advantages=np.nan_to_num(scores / 2),
        **{"tokens": tokens, "prompt": "what ?", **options},
    )


def advantages_of(scores, mask, *, score_clip=5.0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """What the default step makes of raw scores `(B, T)`: advantages, and which completions have no statistics."""
    mask = mask.bool()
    found = Score(clip=score_clip)(scores, torch.zeros_like(scores), mask)
    reading = Reading(teacher_logps=scores, student_logps=torch.zeros_like(scores))
    advantages, moments = Sampled().advantages(found, reading, mask, Population(**options))
    return advantages, undefined_rows(moments, advantages)
