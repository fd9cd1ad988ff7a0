"""
How much of a gradient is signal: that of every arm, on the same samples, against its own mean over many batches.

    python -m benchmarks.arms.gradient_noise --seeds 30 31 32 33 34

Runs of 200 steps compare arms by what comes of them, at a minute for each number. Here one student is held still, batches
are drawn from it, and every arm makes its gradient of each: `-mean over completions of mean over tokens of A log p`, as in
the loss with `loss_type="grpo"` on the first step after sampling. Written for each arm:

    norm            mean of the gradient's norm over batches
    norm_max        the largest of them
    noise           E|g - E g|^2 / |E g|^2, the noise of one batch in units of the signal
    cosine          cosine of E g with the gradient of the reverse KL at the same positions: 1 is the same direction
    disliked        share of the tokens with a negative score that get a positive advantage
    std, std_spread standard deviation of the clamped scores, and how far it moves between batches, relatively

The student is `start`, the one that runs begin with; `later`, after some steps of the exact estimator; or `own-teacher`,
whose teacher is itself in bfloat16, so that scores are rounding errors. Both corrections for a finite number of batches are made: the
squared norm of the mean over N batches holds 1/N of the noise.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import load_from_disk
from transformers import PreTrainedModel

from gndpo_trl.objective.advantages import Population
from gndpo_trl.objective.scores import clamp_scores, power_scores

from .cells import SMOKE_TASKS, TASKS
from .models import build_once, load_model, load_processor, round_weights, sample, tokenize
from .results import FOLDER, ROOT, write_whole
from .runs import add_outliers
from .transforms import SCORE_CLIP, build_transform


RESULTS = FOLDER / "gradient_noise.parquet"
NUM_GENERATIONS = 4

STUDENTS = ("start", "later", "own-teacher")
LATER_STEPS = 60
LATER_RATE = 6e-4


@dataclass
class Batch:
    """Log-probs `(B, T, V)` of student (with gradient) and teacher, sampled ids `(B, T)` and their mask."""

    student: torch.Tensor
    teacher: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor

    def of_sampled(self, logps: torch.Tensor) -> torch.Tensor:
        return logps.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)

    @property
    def scores(self) -> torch.Tensor:
        return self.of_sampled(self.teacher - self.student.detach()).masked_fill(~self.mask, 0.0)


def whitened(
    normalization: str, score_clip: float | None = SCORE_CLIP, std_floor: float = 0.0
) -> Callable[[Batch], torch.Tensor]:
    population = Population(normalization, std_floor, NUM_GENERATIONS)

    def advantages(batch: Batch) -> torch.Tensor:
        scores = clamp_scores(batch.scores, batch.mask, score_clip)
        return population.whiten(scores, batch.mask, population.moments(scores, batch.mask))

    return advantages


def transform(name: str) -> Callable[[Batch], torch.Tensor]:
    function = build_transform(name)
    return lambda batch: function(batch.scores, batch.mask)


def power(exponent: float) -> Callable[[Batch], torch.Tensor]:
    return lambda batch: power_scores(
        batch.of_sampled(batch.teacher), batch.of_sampled(batch.student.detach()), batch.mask, exponent
    )


def expected(normalization: str) -> Callable[[Batch], torch.Tensor]:
    """Clamped scores minus the expected clamped score of their position under the student, then only scaled."""
    population = Population(normalization)

    def advantages(batch: Batch) -> torch.Tensor:
        student = batch.student.detach()
        baseline = (student.exp() * (batch.teacher - student).clamp(-SCORE_CLIP, SCORE_CLIP)).sum(-1)
        relative = (batch.scores.clamp(-SCORE_CLIP, SCORE_CLIP) - baseline).masked_fill(~batch.mask, 0.0)
        moments = population.moments(relative, batch.mask)
        return population.whiten(relative, batch.mask, moments, subtract_mean=False)

    return advantages


# Arms that look at sampled tokens: advantages `(B, T)` of a batch.
SAMPLED = {
    "none": whitened("none"),
    "raw": whitened("none", score_clip=None),
    "global": whitened("global"),
    "global, std_floor 0.1": whitened("global", std_floor=0.1),
    "group": whitened("group"),
    "sequence": whitened("sequence"),
    "expected": expected("global"),
    "expected-sequence": expected("sequence"),
    **{name: transform(name) for name in ("scale", "center", "scale-sequence", "center-sequence", "robust", "tanh")},
    "power-0.5": power(0.5),
    "power-1": power(1.0),
}

# Arms that look at the whole vocabulary: the bound of the clamp.
EXACT = {"exact": SCORE_CLIP, "exact, unclamped": float("inf")}
REVERSE_KL = "exact, unclamped"


def objective(name: str, batch: Batch) -> torch.Tensor:
    """What an arm's step descends, on the student that sampled."""
    if name in EXACT:
        student = batch.student.detach()
        scores = (batch.teacher - student).clamp(-EXACT[name], EXACT[name])
        values = (student.exp() * scores * batch.student).sum(-1)
    else:
        values = SAMPLED[name](batch) * batch.of_sampled(batch.student)
    return -((values * batch.mask).sum(-1) / batch.mask.sum(-1)).mean()


def draw(
    student: PreTrainedModel, teacher: PreTrainedModel, questions: dict, end_id: int, max_new_tokens: int
) -> Batch:
    ids, mask = sample(student, questions, end_id, max_new_tokens, repeats=NUM_GENERATIONS)
    inputs = {key: value.repeat_interleave(NUM_GENERATIONS, dim=0) for key, value in questions.items()}
    first = inputs["input_ids"].shape[1] - 1
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
    with torch.no_grad():
        teacher_logps = teacher(**inputs).logits[:, first:-1].log_softmax(-1)
    return Batch(student(**inputs).logits[:, first:-1].log_softmax(-1), teacher_logps, ids, mask)


def gradient(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def train_a_little(student: PreTrainedModel, teacher: PreTrainedModel, batches: list[dict], end_id: int) -> None:
    optimizer = torch.optim.AdamW(student.parameters(), lr=LATER_RATE, weight_decay=0.01)
    for questions in batches:
        objective("exact", draw(student, teacher, questions, end_id, TASKS["digits"].max_new_tokens)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def measure(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: list[dict], end_id: int
) -> dict[str, dict[str, float]]:
    """Arm -> its numbers, over batches of questions."""
    names = [*SAMPLED, *EXACT]
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    stds, disliked = [], {name: [] for name in SAMPLED}
    gradients = {name: torch.empty(len(batches), sum(p.numel() for p in parameters)) for name in names}
    for index, questions in enumerate(batches):
        batch = draw(student, teacher, questions, end_id, TASKS["digits"].max_new_tokens)
        for name in names:
            gradients[name][index] = gradient(objective(name, batch), parameters)
        is_disliked = (batch.scores < 0) & batch.mask
        for name in SAMPLED:
            disliked[name].append((SAMPLED[name](batch)[is_disliked] > 0).float().mean().item())
        stds.append(batch.scores[batch.mask].clamp(-SCORE_CLIP, SCORE_CLIP).std().item())
    return {
        name: {
            **compare_gradients(gradients[name], gradients[REVERSE_KL]),
            "disliked": np.nanmean(disliked[name]) if name in SAMPLED else np.nan,
            "std": np.mean(stds),
            "std_spread": np.std(stds) / np.mean(stds),
        }
        for name in names
    }


def compare_gradients(gradients: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """
    Norms, noise and direction of an arm's gradients.

    Args:
        gradients (`torch.Tensor` of shape `(N, P)`): Of N batches.
        reference (`torch.Tensor` of shape `(N, P)`): Another arm's, of the same batches.
    """
    count = len(gradients)
    mean, other = gradients.mean(0), reference.mean(0)
    noise, other_noise = gradients.var(0).sum(), reference.var(0).sum()
    # The same samples make both means, so that their errors have a covariance too.
    common = ((gradients - mean) * (reference - other)).sum() / (count - 1)
    signal, other_signal = mean.square().sum() - noise / count, other.square().sum() - other_noise / count
    is_there = signal > 0 and other_signal > 0
    norms = gradients.norm(dim=-1)
    return {
        "norm": norms.mean().item(),
        "norm_max": norms.max().item(),
        "noise": (noise / signal).item() if is_there else np.nan,
        "cosine": ((mean @ other - common / count) / (signal * other_signal).sqrt()).item() if is_there else np.nan,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[30, 31, 32, 33, 34])
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=STUDENTS)
    parser.add_argument("--teachers", nargs="+", default=["teacher", "outliers"], choices=["teacher", "outliers"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[1, 4, 16], help="of a batch, 4 completions each")
    parser.add_argument("--batches", type=int, default=24, help="of 16 prompts; more of smaller ones")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "arms", help="where the arms keep models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="models that know nothing, two batches")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    task = (SMOKE_TASKS if args.smoke else TASKS)["digits"]
    keys = ["seed", "student", "teacher", "prompts", "arm"]
    rows = pd.read_parquet(args.results).to_dict("records") if args.results.exists() else []
    finished = {tuple(row[key] for key in keys[:-1]) for row in rows}
    for seed in args.seeds:
        paths = {
            which: build_once("digits", task, seed, which, args.output_dir) for which in ("data", "teacher", "student")
        }
        processor = load_processor(paths["student"])
        end_id = processor.tokenizer.eos_token_id
        train_split = load_from_disk(paths["data"])["train"].shuffle(seed=seed)
        for which in args.students:
            for corruption in args.teachers if which != "own-teacher" else ["teacher"]:
                student = load_model(paths["student"])
                teacher = load_model(paths["student" if which == "own-teacher" else "teacher"])
                if which == "own-teacher":
                    round_weights(teacher)
                if corruption == "outliers":
                    add_outliers(teacher)
                torch.manual_seed(seed)
                if which == "later":
                    steps = 1 if args.smoke else LATER_STEPS
                    train_a_little(
                        student, teacher, take(train_split, processor, 16 if not args.smoke else 2, steps, 0), end_id
                    )
                for prompts in args.prompts:
                    if (seed, which, corruption, prompts) in finished:
                        continue
                    # The noise of a mean falls with the batch: smaller batches take more of them.
                    count = 2 if args.smoke else args.batches * max(1, 4 // prompts)
                    batches = take(train_split, processor, prompts, count, 0 if args.smoke else 16 * LATER_STEPS)
                    for arm, numbers in measure(student, teacher, batches, end_id).items():
                        known = dict(zip(keys, (seed, which, corruption, prompts, arm), strict=True))
                        rows.append({**known, "batches": count, **numbers})
                    table = pd.DataFrame(rows)
                    write_whole(args.results, lambda partial, table=table: table.to_parquet(partial))
                    print(f"seed {seed}, {which}, {corruption}, {prompts} prompts", flush=True)
    return 0


def take(split, processor, prompts: int, count: int, start: int) -> list[dict[str, torch.Tensor]]:
    """`count` batches of questions, from row `start` on."""
    rows = split.select(range(start, start + prompts * count))
    questions = tokenize(processor, rows)
    return [
        {key: value[index * prompts : (index + 1) * prompts] for key, value in questions.items()}
        for index in range(count)
    ]


if __name__ == "__main__":
    sys.exit(main())
