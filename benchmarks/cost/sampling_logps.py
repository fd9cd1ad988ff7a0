"""
How far `use_sampling_logps` moves the advantages when the sampler computes in bfloat16 and the trainer in float32.

    make demo SEED=20
    python -m benchmarks.cost.sampling_logps --seed 20

On batches of the digits demo, with its student before training: the advantages with statistics of the sampler's
log-probs, against those with statistics of the trainer's (the default), and against the sampler's log-probs throughout.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.objective.advantages import Population, whiten
from gndpo_trl.objective.scores import clamp_scores, token_scores


DIGITS = Path(__file__).parents[2] / "runs" / "digits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=20, help="of a demo that has been run")
    parser.add_argument("--completions", type=int, nargs="+", default=[16, 64, 256, 1024], help="per batch")
    args = parser.parse_args()
    student = str(DIGITS / f"student-seed{args.seed}")
    rows = load_from_disk(str(DIGITS / f"data-seed{args.seed}"))["train"]
    sampler = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.bfloat16).eval()
    add_fused_lm_head(sampler)

    print("Largest errors: of a log-prob (nats), of an advantage with the sampler's log-probs throughout, and of an")
    print("advantage with statistics from the sampler\n")
    print("| completions | tokens | log-prob | throughout | statistics |")
    print("|---|---|---|---|---|")
    for completions in args.completions:
        config = GNDPOConfig(
            output_dir=str(DIGITS / "sampling_logps"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            num_generations=4,
            per_device_train_batch_size=completions,
            max_completion_length=32,
            report_to="none",
        )
        trainer = GNDPOTrainer(
            model=student,
            teacher_model=str(DIGITS / f"teacher-seed{args.seed}"),
            args=config,
            train_dataset=rows,
        )
        trainer.model.train()
        rollout = trainer._generate_and_score_completions([rows[index // 4] for index in range(completions)])
        mask = valid_tokens(rollout)
        student_logps = trainer._per_token_logps(trainer.model, rollout)
        with torch.no_grad():
            teacher_logps = trainer.teacher.per_token_logps(rollout)
            sampling_logps = trainer._per_token_logps(sampler, rollout).float()
        scores = clamp_scores(token_scores(teacher_logps, student_logps, mask), mask, 5.0)
        from_sampler = clamp_scores(token_scores(teacher_logps, sampling_logps, mask), mask, 5.0)
        moments = Population().moments(from_sampler, mask)
        noise = (sampling_logps - student_logps)[mask].abs().max()
        throughout = (whiten(from_sampler, mask, moments) - rollout["advantages"]).abs().max()
        statistics = (whiten(scores, mask, moments) - rollout["advantages"]).abs().max()
        print(f"| {completions} | {mask.sum()} | {noise:.4f} | {throughout:.4f} | {statistics:.4f} |")


if __name__ == "__main__":
    main()
