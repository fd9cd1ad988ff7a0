"""
The demo from end to end: build a teacher and a student that adds badly, distill one into the other, measure, report.

    python examples/digits_demo.py --seed 0

Everything goes to `--output_dir`: the data and models of each seed (built once), the trained student with the tokens of
each step and the report of its run, and `summary.json`. Reported accuracies are greedy, on pairs of test scans that no
model was trained on and that no setting was chosen with; the validation split was there for that.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import load_from_disk
from digits_data import build_splits
from digits_models import build_student, build_teacher, greedy_accuracy

from gndpo_trl.report.command import write_report


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "digits" / "gndpo.yaml"

# Steps at the end of the run over which the final reverse KL is averaged.
NUM_FINAL_STEPS = 10


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """`path`, built if it is not there; an interrupted build is never taken for a finished one."""
    if not path.exists():
        print(f"Building {path}", flush=True)
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        build(partial)
        partial.rename(path)
    return path


def train_gndpo(student: Path, teacher: Path, data: Path, output_dir: Path, seed: int, options: list[str]) -> None:
    """Run the training script as anybody would; its log goes to a file and its progress bar to the screen."""
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    # Models this small do not fill a core, and more threads only wait for each other.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    arguments = ["--config", RECIPE, "--seed", seed, "--data_seed", seed, "--output_dir", output_dir]
    arguments += ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--dataset_name", data]
    arguments += ["--log_completions", "true", "--num_completions_to_print", "2"]
    with open(output_dir / "train.log", "w") as log:
        command = [*launch, ROOT / "examples" / "train_gndpo.py", *arguments, *options]
        subprocess.run([str(part) for part in command], cwd=ROOT, stdout=log, check=True)


def print_table(summary: dict) -> None:
    teacher, before, after = (
        f"{summary[name]:.1%}" for name in ("teacher_accuracy", "student_accuracy_before", "student_accuracy_after")
    )
    print(f"\n{'':30} {'teacher':>10} {'student before':>16} {'student after':>16}")
    print(f"{'accuracy, greedy, test scans':30} {teacher:>10} {before:>16} {after:>16}")
    before, after = (f"{summary[name]:.3f}" for name in ("reverse_kl_before", "reverse_kl_after"))
    print(f"{'reverse KL, nats per token':30} {'':>10} {before:>16} {after:>16}")
    print(
        f"\nseed {summary['seed']}, {summary['steps']} steps, {summary['seconds']:.0f} s in all, "
        f"peak gradient norm {summary['peak_grad_norm']:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the data, both models and the training")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/digits"))
    args, options = parser.parse_known_args()  # the rest goes to the training script, e.g. --max_steps 20

    start = time.perf_counter()
    torch.set_num_threads(1)
    output_dir, seed = args.output_dir.resolve(), args.seed
    data = build_once(output_dir / f"data-seed{seed}", lambda path: build_splits(seed).save_to_disk(path))
    splits = load_from_disk(data)
    teacher = build_once(output_dir / f"teacher-seed{seed}", lambda path: build_teacher(splits, path, seed))
    student = build_once(output_dir / f"student-seed{seed}", lambda path: build_student(splits, path, seed))
    trained = output_dir / f"gndpo-seed{seed}"

    print("Greedy accuracy of teacher and student before training", flush=True)
    teacher_accuracy, accuracy_before = (greedy_accuracy(model, splits["test"]) for model in (teacher, student))
    print(f"Training {trained} with {RECIPE.relative_to(ROOT)}", flush=True)
    train_gndpo(student, teacher, data, trained, seed, options)
    print("Greedy accuracy of the student after training", flush=True)
    accuracy_after = greedy_accuracy(trained, splits["test"])

    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "grad_norm" in entry]
    reverse_kls = [step["reverse_kl"] for step in steps]
    summary = {
        "seed": seed,
        "steps": steps[-1]["step"],
        "seconds": time.perf_counter() - start,
        "teacher_accuracy": teacher_accuracy,
        "student_accuracy_before": accuracy_before,
        "student_accuracy_after": accuracy_after,
        "reverse_kl_before": reverse_kls[0],  # measured on samples taken before the first update
        "reverse_kl_after": sum(reverse_kls[-NUM_FINAL_STEPS:]) / len(reverse_kls[-NUM_FINAL_STEPS:]),
        "peak_grad_norm": max(step["grad_norm"] for step in steps),
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report = write_report([trained], trained / "report")
    print_table(summary)
    print(f"Written: {args.output_dir / 'summary.json'}, {args.output_dir / report.relative_to(output_dir)}")


if __name__ == "__main__":
    main()
