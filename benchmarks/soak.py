"""
Whether a long run stays as it began: resident memory, open handles, seconds of a step, bytes in the run's folder.

    python -m benchmarks.soak                     # 2,000 steps without and with `log_completions`, then the figure
    python -m benchmarks.soak --figure            # the figure alone, from benchmarks/soak.parquet

A tiny text model on a CPU, logs at every step, a checkpoint every 200 steps of which two are kept. Each of the two runs has
a process of its own.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from datasets import Dataset
from transformers import TrainerCallback

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.report.figures import look

from .cost.memory import resident_bytes


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
import tiny_models  # noqa: E402


RESULTS = Path(__file__).parent / "soak.parquet"
EVERY = 10  # steps between two rows

PANELS = {
    "resident_bytes": ("resident memory, MiB", 2**20),
    "handles": ("open handles", 1),
    "seconds": ("seconds of a step, median of ten", 1),
    "folder_bytes": ("bytes in the run's folder, MiB", 2**20),
}


class Watch(TrainerCallback):
    """Looks at the process and its folder every ten steps."""

    def __init__(self):
        self.rows, self.seconds = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)
        if state.global_step % EVERY:
            return
        gc.collect()  # what is garbage is no leak
        files = [path for path in Path(args.output_dir).rglob("*") if path.is_file()]
        row = {
            "step": state.global_step,
            "resident_bytes": resident_bytes("VmRSS"),
            "handles": len(os.listdir("/proc/self/fd")),
            "seconds": pd.Series(self.seconds[-EVERY:]).median(),
            "folder_bytes": sum(path.stat().st_size for path in files),
            "files": len(files),
            "log_entries": len(state.log_history),
        }
        self.rows.append(row)


def soak(steps: int, log_completions: bool, folder: str) -> pd.DataFrame:
    """Rows of a run of so many steps, whose models and results are in `folder`."""
    torch.set_num_threads(1)
    paths = [
        tiny_models.save(*tiny_models.build_qwen3(seed, width), Path(folder, name))
        for name, seed, width in (("student", 0, 32), ("teacher", 1, 48))
    ]
    words = tiny_models.WORDS[11:19]
    questions = [f"what is {a} plus {b} ?" for a in words for b in words]
    watch = Watch()
    trainer = GNDPOTrainer(
        model=paths[0],
        teacher_model=paths[1],
        args=GNDPOConfig(
            output_dir=os.path.join(folder, "run"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            max_steps=steps,
            learning_rate=1e-4,
            logging_steps=1,
            save_steps=200,
            save_total_limit=2,
            log_completions=log_completions,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in questions]}),
        callbacks=[watch],
    )
    trainer.train()
    return pd.DataFrame(watch.rows).assign(log_completions=log_completions)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """What was watched, over the steps; a line for each run."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharex=True, layout="constrained")
    for axis, (column, (label, unit)) in zip(axes.flat, PANELS.items(), strict=True):
        for number, (log_completions, run) in enumerate(rows.groupby("log_completions")):
            name = "with `log_completions`" if log_completions else "without"
            axis.plot(run["step"], run[column] / unit, label=name, linewidth=1, **look(number))
        axis.set(ylabel=label)
        axis.set_ylim(0, 1.1 * (rows[column] / unit).max())
        axis.grid(alpha=0.25)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def summary(rows: pd.DataFrame) -> str:
    """
    Second and last fifth of each run as a table in Markdown: medians, and of the seconds the lowest tenth, which other work on
    the machine disturbs least.
    """
    lines = [
        "| run | steps | memory, MiB | handles | step, s | folder, MiB | files |",
        "|---|---|---|---|---|---|---|",
    ]
    for log_completions, run in rows.groupby("log_completions"):
        fifth = max(1, len(run) // 5)
        for part in (run.iloc[fifth : 2 * fifth], run.iloc[-fifth:]):
            middle = part.median(numeric_only=True)
            cells = [
                "with `log_completions`" if log_completions else "without",
                f"{part['step'].min()} to {part['step'].max()}",
                f"{middle['resident_bytes'] / 2**20:.1f}",
                f"{middle['handles']:.0f}",
                f"{part['seconds'].quantile(0.1):.3f}",
                f"{middle['folder_bytes'] / 2**20:.2f}",
                f"{middle['files']:.0f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--figure", type=Path, nargs="?", const=ROOT / "docs" / "soak.png", help="draw, and run nothing"
    )
    parser.add_argument("--run", choices=["without", "with"], help="one of the two runs, in this process")
    args = parser.parse_args()
    if args.run:
        with tempfile.TemporaryDirectory() as folder:
            soak(args.steps, args.run == "with", folder).to_parquet(args.results)
        return
    if args.figure is None:
        parts = []
        for run in ("without", "with"):
            part = args.results.with_suffix(f".{run}.parquet")
            command = [sys.executable, "-m", "benchmarks.soak", "--steps", str(args.steps), "--run", run]
            subprocess.run([*command, "--results", str(part)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            parts.append(pd.read_parquet(part))
            part.unlink()
        pd.concat(parts).to_parquet(args.results)
    rows = pd.read_parquet(args.results)
    draw(rows, args.figure or ROOT / "docs" / "soak.png")
    print(summary(rows))


if __name__ == "__main__":
    main()
