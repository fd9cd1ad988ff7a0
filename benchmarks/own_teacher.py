"""
How far a student drifts whose teacher is the student itself, and what holds it: a table of `docs/reliability.md`.

    python -m benchmarks.own_teacher              # 100 steps of each arm, two seeds

A tiny text model on a CPU. The teacher has the same weights, but computes in bfloat16 and the student in float32, so that
scores are rounding errors at first, and later what noise has made of the student. Drift is measured on fixed texts, as the KL
divergence of the student at the end from the student at the beginning, summed over the vocabulary.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset

from gndpo_trl import GNDPOConfig, GNDPOTrainer


sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny_models  # noqa: E402


ARMS = {
    "as it is": {},
    '`estimator="exact"`': {"estimator": "exact"},
    **{f"`std_floor={floor:g}`": {"std_floor": floor} for floor in (0.1, 1.0, 10.0, 1e3)},
    '`advantage_normalization="none"`': {"advantage_normalization": "none"},
    '`score_baseline="expected"`': {"score_baseline": "expected"},
    "SGD": {"optim": "sgd"},
    "SGD, `std_floor=0.1`": {"optim": "sgd", "std_floor": 0.1},
}


def log_probs(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids).logits.double().log_softmax(-1)


def run(options: dict, steps: int, learning_rate: float, seed: int, folder: str) -> dict[str, float]:
    """σ of the scores and norm of the gradient, means over the steps, and the drift at the end."""
    student, tokenizer = tiny_models.build_qwen3(seed=0)
    teacher, _ = tiny_models.build_qwen3(seed=0)
    teacher.bfloat16()
    words = tiny_models.WORDS[11:19]
    questions = [f"what is {a} plus {b} ?" for a in words for b in words]
    trainer = GNDPOTrainer(
        model=student,
        teacher_model=teacher,
        args=GNDPOConfig(
            **options,
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            max_completion_length=8,
            max_steps=steps,
            learning_rate=learning_rate,
            weight_decay=0.0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in questions]}),
        processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )
    ids = torch.randint(11, len(tokenizer), (64, 16), generator=torch.Generator().manual_seed(0))
    before = log_probs(trainer.model, ids)
    weights = [weight.detach().clone() for weight in trainer.model.parameters()]
    trainer.train()
    after = log_probs(trainer.model, ids)
    moved = sum(
        (new.detach() - old).square().sum() for new, old in zip(trainer.model.parameters(), weights, strict=True)
    )
    logs = [entry for entry in trainer.state.log_history if "score/std" in entry]
    return {
        "std": sum(entry["score/std"] for entry in logs) / len(logs),
        "norm": sum(entry["grad_norm"] for entry in logs) / len(logs),
        "drift": (after.exp() * (after - before)).sum(-1).mean().item(),
        "moved": (moved / sum(weight.square().sum() for weight in weights)).sqrt().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| arm | σ of the scores, nats | gradient norm | drift, nats | weights moved by |\n|---|---|---|---|---|")
    for arm in args.arms:
        with tempfile.TemporaryDirectory() as folder:
            runs = [run(ARMS[arm], args.steps, args.learning_rate, seed, folder) for seed in range(args.seeds)]
        means = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
        cells = [
            f"{means['std']:.2g}",
            f"{means['norm']:.2g}",
            f"{means['drift']:.2g}",
            f"{100 * means['moved']:.2g} %",
        ]
        print(f"| {arm} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
