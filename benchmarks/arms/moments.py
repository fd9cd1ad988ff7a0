"""
How well a batch knows the mean and the standard deviation of the scores, which global normalization divides by.

    python -m benchmarks.arms.moments --tasks digits chain --seeds 30 31 32

The student that runs begin with is held still and answers many training prompts four times. Batches are then drawn from
these prompts with replacement, a prompt with all of its completions, since these are alike. Written for each number of
prompts, of the scores clamped as in training:

    mean_error, std_error   root mean square of the error of a batch's mean and standard deviation, in units of the standard
                            deviation over all scores
    tokens                  mean number of tokens of a batch
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

import pandas as pd
import torch
from datasets import load_from_disk

from gndpo_trl.objective.advantages import merge_moments, row_moments, shift_and_scale

from .cells import SMOKE_TASKS, TASKS
from .gradient_noise import NUM_GENERATIONS, SCORE_CLIP, draw, take
from .models import build_once, load_model, load_processor
from .results import FOLDER, ROOT, write_whole


RESULTS = FOLDER / "moments.parquet"
BATCHES = 10_000
SIZES = (1, 4, 16, 64)


def moment_errors(moments: torch.Tensor, prompts: int) -> dict[str, float]:
    """
    How far the moments of batches lie from those of all scores.

    Args:
        moments (`torch.Tensor` of shape `(P, 3)`): Of the clamped scores of each prompt, as `row_moments` gives them.
        prompts (`int`): Of a batch.
    """
    mean, scale = shift_and_scale(merge_moments(moments))
    generator = torch.Generator().manual_seed(0)
    drawn = merge_moments(moments[torch.randint(len(moments), (BATCHES, prompts), generator=generator)], dim=1)
    means, scales = shift_and_scale(drawn)
    return {
        "mean_error": ((means - mean).square().mean().sqrt() * scale).item(),
        "std_error": ((1 / scales - 1 / scale).square().mean().sqrt() * scale).item(),
        "tokens": drawn[:, 0].mean().item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "chain"], choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[30, 31, 32])
    parser.add_argument("--prompts", type=int, default=1024, help="that the student answers, a multiple of 16")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "arms", help="where the arms keep models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows of other tasks and seeds stay")
    parser.add_argument("--smoke", action="store_true", help="models that know nothing")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = pd.read_parquet(args.results).to_dict("records") if args.results.exists() else []
    rows = [row for row in rows if row["task"] not in args.tasks or row["seed"] not in args.seeds]
    for name in args.tasks:
        task = (SMOKE_TASKS if args.smoke else TASKS)[name]
        for seed in args.seeds:
            paths = {
                which: build_once(name, task, seed, which, args.output_dir) for which in ("data", "teacher", "student")
            }
            processor = load_processor(paths["student"])
            student, teacher = load_model(paths["student"]), load_model(paths["teacher"])
            train_split = load_from_disk(paths["data"])["train"].shuffle(seed=seed)
            torch.manual_seed(seed)
            moments = []
            for questions in take(train_split, processor, 16, args.prompts // 16, 0):
                with torch.no_grad():
                    batch = draw(student, teacher, questions, processor.tokenizer.eos_token_id, task.max_new_tokens)
                of_rows = row_moments(batch.scores.clamp(-SCORE_CLIP, SCORE_CLIP), batch.mask)
                moments.append(merge_moments(of_rows.view(-1, NUM_GENERATIONS, 3), dim=1))
            for size in SIZES:
                known = {"task": name, "seed": seed, "prompts": size}
                rows.append({**known, **moment_errors(torch.cat(moments), size)})
            print(f"{name}, seed {seed}", flush=True)
    table = pd.DataFrame(rows).sort_values(["task", "seed", "prompts"], ignore_index=True)
    write_whole(args.results, lambda partial: table.to_parquet(partial))
    return 0


if __name__ == "__main__":
    sys.exit(main())
