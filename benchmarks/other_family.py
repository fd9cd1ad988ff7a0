"""
The digits demo with a teacher of another tokenizer: a table of `docs/teachers.md`.

    python -m benchmarks.other_family --seeds 30 31

Two tokenizers: the demo's words, and single characters. A model of each role is built for each, in the demo's way. Every arm
gets the same questions, in batches of the same size, for as many steps. Models and data are kept in `--output_dir`; each run
is one process of one thread, so that its memory is its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import load_from_disk
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PrinterCallback
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.estimators import Sampled
from gndpo_trl.objective.scores import clamp_scores
from gndpo_trl.teachers import LocalTeacher, OtherFamily

from .arms.models import digits_data, digits_models, load_model, load_processor
from .arms.trainers import SHARED_OPTIONS


CHARACTERS = sorted(
    {*"What is the sum of digits?", *digits_data.answer_text(0, 0, 0), *"systemuserassistant\n", *"0123456789"}
)

# Prompt and answer in characters fit into the 128 positions of the models.
MAX_NEW_TOKENS = {"words": 32, "characters": 60}


class EvenShares(Sampled):
    """A token of a piece answers for its share of the piece's score."""

    def advantages(self, scores, reading, mask, population):
        shares = clamp_scores(scores.raw, mask, 5.0)
        moments = population.moments(shares, mask)
        return population.whiten(shares, mask, moments), moments


# The student's tokenizer, the teacher's, and how the two meet.
ARMS = {
    "words": ("words", "words", "ids"),
    "words, by text": ("words", "words", "text"),
    "words from characters": ("words", "characters", "text"),
    "words from characters, GOLD": ("words", "characters", "gold"),
    "characters": ("characters", "characters", "ids"),
    "characters from words": ("characters", "words", "text"),
    "characters from words, even shares": ("characters", "words", "shares"),
    "characters from words, GOLD": ("characters", "words", "gold"),
}


def processor_of(tokenizer: str) -> LlavaProcessor:
    """The demo's processor with either vocabulary, in the form of byte-level ones, which `GOLDTrainer` takes alone."""
    vocabulary, pattern = digits_models.VOCABULARY, digits_models.PATTERN
    if tokenizer == "characters":
        vocabulary, pattern = digits_models.SPECIAL_TOKENS + CHARACTERS, r"\s|."
    processor = digits_models.build_processor(vocabulary, pattern)
    backend = processor.tokenizer.backend_tokenizer
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = {
        "".join(part for part, _ in bytes_of.pre_tokenize_str(token)): id for id, token in enumerate(vocabulary)
    }
    backend.model = models.WordLevel(written, unk_token="<unk>")
    backend.pre_tokenizer = pre_tokenizers.Sequence([backend.pre_tokenizer, bytes_of])
    backend.decoder = decoders.ByteLevel()
    return processor


def build(role: str, tokenizer: str, seed: int, folder: Path) -> Path:
    """The folder of a model, or of the data, built if it is not there."""
    path = folder / f"{role}-{tokenizer}-{seed}"
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        if role == "data":
            digits_data.build_splits(seed).save_to_disk(partial)
        else:
            make = {"teacher": digits_models.build_teacher, "student": digits_models.build_student}[role]
            make(load_from_disk(build("data", "images", seed, folder)), partial, seed, processor_of(tokenizer))
        partial.rename(path)
    return path


def run(arm: str, seed: int, steps: int, learning_rate: float, folder: Path) -> dict:
    mine, theirs, how = ARMS[arm]
    splits = load_from_disk(build("data", "images", seed, folder))
    paths = build("student", mine, seed, folder), build("teacher", theirs, seed, folder)
    student, teacher = map(load_model, paths)
    processors = [load_processor(path) for path in paths]
    with tempfile.TemporaryDirectory() as output_dir:
        options = {**SHARED_OPTIONS, "output_dir": output_dir, "max_steps": steps, "learning_rate": learning_rate}
        options.update(seed=seed, data_seed=seed, max_completion_length=MAX_NEW_TOKENS[mine], num_generations=4)
        sources = {"model": student, "processing_class": processors[0], "train_dataset": splits["train"]}
        if how == "gold":
            # All samples are the student's own, at temperature 1, as they are for the others.
            student.generation_config.suppress_tokens = [student.config.image_token_id]
            args = GOLDConfig(
                **options,
                per_device_train_batch_size=64,
                use_uld_loss=True,
                uld_token_merge_strategy="bayesian",
                uld_skip_student_eos=False,
                uld_skip_teacher_eos=False,
                lmbda=1.0,
                beta=1.0,
                temperature=1.0,
                top_p=1.0,
                max_length=None,
                teacher_tokenizer_name_or_path=str(paths[1]),
            )
            trainer = GOLDTrainer(args=args, teacher_model=teacher, **sources)
        else:
            local = LocalTeacher(teacher, processors[1])
            trainer = GNDPOTrainer(
                args=GNDPOConfig(**options, per_device_train_batch_size=64),
                # A student over characters makes words that a teacher over words has no token for.
                teacher_model=local if how == "ids" else OtherFamily(local, max_unknown=1.0),
                estimator=EvenShares() if how == "shares" else None,
                **sources,
            )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        end = Path(output_dir) / "end"
        digits_models.save(student, processor_of(mine), end)
        accuracy = digits_models.greedy_accuracy(end, splits["test"], max_new_tokens=MAX_NEW_TOKENS[mine])
    logs = [entry for entry in trainer.state.log_history if "teacher/unknown_tokens" in entry]
    unknown = sum(entry["teacher/unknown_tokens"] for entry in logs)
    return {
        "accuracy": accuracy,
        "seconds": seconds,
        "memory": memory,
        "unknown": unknown / max(1, unknown + sum(entry["advantages/num_tokens"] for entry in logs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[30])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/other_family"))
    parser.add_argument("--one", action="store_true", help="run the arm of the seed in this process")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.one:
        warnings.simplefilter("ignore")
        found = run(args.arms[0], args.seeds[0], args.steps, args.learning_rate, args.output_dir)
        print(json.dumps(found), flush=True)
        return
    for seed in args.seeds:
        for role in ("teacher", "student"):
            for tokenizer in ("words", "characters"):
                path = build(role, tokenizer, seed, args.output_dir)
                test_split = load_from_disk(args.output_dir / f"data-images-{seed}")["test"]
                accuracy = digits_models.greedy_accuracy(path, test_split, max_new_tokens=MAX_NEW_TOKENS[tokenizer])
                print(f"seed {seed}: {role} over {tokenizer}: {100 * accuracy:.1f} % right answers", flush=True)
    print("| arm | seed | right answers | seconds | memory, MB | unknown tokens |\n|---|---|---|---|---|---|")
    for seed in args.seeds:
        for arm in args.arms:
            options = ["--arms", arm, "--seeds", str(seed), "--steps", str(args.steps), "--one"]
            options += ["--learning_rate", str(args.learning_rate), "--output_dir", str(args.output_dir)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.other_family", *options],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
            if done.returncode != 0:
                print(f"| {arm} | {seed} | failed: {done.stderr.strip().splitlines()[-1]} | | | |", flush=True)
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            cells = f"{100 * found['accuracy']:.1f} % | {found['seconds']:.0f} | {found['memory']:.0f}"
            print(f"| {arm} | {seed} | {cells} | {100 * found['unknown']:.2g} % |", flush=True)


if __name__ == "__main__":
    main()
