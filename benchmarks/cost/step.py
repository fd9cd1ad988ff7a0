"""
What one optimizer step of on-policy distillation costs once the completions are there, in several trainers side by side.

    python benchmarks/step_cost.py --json runs/step_cost.json

    grpo          TRL's GRPOTrainer with a reward of zero: no teacher
    gspo          GSPOTrainer with a reward of zero: no teacher either
    distillation  TRL's DistillationTrainer: reverse KL over the whole vocabulary, same teacher
    padded        GNDPO with TRL's padding and micro-batches (`pad_to_multiple_of=1`)
    gndpo         GNDPO
    gndpo-logps   GNDPO with `use_sampling_logps`, which saves the student's scoring pass where the sampler is vLLM
    gndpo-rows    GNDPO with `share_prompts=False`: each prompt once for each of its completions
    expected      GNDPO with `score_baseline="expected"`
    exact         GNDPO with `estimator="exact"`
    ...-before    the same two, read by passes before the loss, where they are read by the loss itself otherwise

All of them take their steps in turn, in one process, on the same completions, which are drawn once instead of sampled: with
log-normal lengths of which the mean is 0.3 of the longest, and with equal lengths. Models have random weights. A step is
everything between the completions and the updated weights; reported are medians over the repeated steps. Peak memory is
measured in as many steps of its own: the weights and optimizer state of the arm, plus what a step needs on top of them.

Prompts of that are short. `--shared_prompts` adds cases with prompts as long as image questions are, with 16 completions
each in micro-batches of 16, and log-normal lengths.
"""

import argparse
import gc
import json
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm
from trl.data_utils import prepare_multimodal_messages

from gndpo_trl import GNDPOTrainer

from .arm import ARMS, Arm
from .memory import keep_freed_memory, peak_since_reset, reset_peak
from .models import SIZES, draw_batch
from .stopwatch import PHASES, time_trainers


# Size of the models, words in a prompt, mean length of its completions.
SHARED_PROMPTS = {
    "prompts_512": ("small", 512, 150),
    "prompts_512_wide": ("small-wide", 512, 150),
    "prompts_1024": ("small", 1024, 256),
    "images": ("small-whole-internvl", 76, 150),
}


def peak_bytes(arm: Arm, rows: list[dict], device: torch.device) -> dict[str, int]:
    """Peak memory of one more step, in scoring and in the loss: the arm's state and what the step adds to it."""
    gc.collect()
    before = reset_peak(device)
    peaks = {}
    generate = arm.trainer._generate_and_score_completions

    def generate_and_score(inputs):
        rollout = generate(inputs)
        peaks["scoring"] = peak_since_reset(device)
        reset_peak(device)
        return rollout

    arm.trainer._generate_and_score_completions = generate_and_score
    arm.step(rows)
    del arm.trainer._generate_and_score_completions
    peaks["loss"] = peak_since_reset(device)
    return {part: arm.state_bytes() + peak - before for part, peak in peaks.items()}


def measure(
    size: str, args: argparse.Namespace, device: torch.device, cases: tuple[str, ...] = ("heavy_tailed", "constant")
) -> dict:
    if device.type == "cpu":
        keep_freed_memory(True)
    arms = {name: Arm(name, size, args, device) for name in args.arms}
    results = {}
    for lengths in cases:
        rows, completions = draw_batch(size, lengths, args)
        seconds = {name: defaultdict(list) for name in arms}
        for arm in arms.values():
            arm.use(completions)
        rounds = [(repeat, name) for repeat in range(args.repeats + 1) for name in arms]
        for repeat, name in tqdm(rounds, desc=f"{size}, {lengths}", file=sys.stderr):
            arms[name].step(rows)
            if repeat > 0:  # the first round warms up
                phases = arms[name].stopwatch.seconds
                for phase in PHASES:
                    seconds[name][phase].append(phases[phase])
                seconds[name]["step"].append(sum(phases.values()))
        results[lengths] = {
            name: {
                "seconds": {phase: statistics.median(values) for phase, values in seconds[name].items()},
                "tokens": dict(arm.stopwatch.tokens),
            }
            for name, arm in arms.items()
        }
        results[lengths]["gndpo"]["distinct_tokens"] = distinct_tokens(arms["gndpo"].trainer, rows, completions)
    if device.type == "cpu":
        keep_freed_memory(False)
    for lengths, result in results.items():
        rows, completions = draw_batch(size, lengths, args)
        for name, arm in arms.items():
            arm.use(completions)
            peaks = [peak_bytes(arm, rows, device) for _ in range(args.repeats)]
            by_part = {part: int(statistics.median(peak[part] for peak in peaks)) for part in peaks[0]}
            result[name].update(peak_bytes=max(by_part.values()), peak_bytes_by_part=by_part)
    return results


def distinct_tokens(trainer: GNDPOTrainer, rows: list[dict], completions: list[list[int]]) -> int:
    """Tokens of a step's prompts, each counted once, and of its completions."""
    firsts = [row for index, row in enumerate(rows) if index == 0 or row is not rows[index - 1]]
    prompts = [row["prompt"] for row in firsts]
    if "images" in rows[0]:
        prompts = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in firsts]
    return sum(map(len, trainer._tokenize_prompts(prompts)[0])) + sum(map(len, completions))


def measure_shared_prompts(case: str, args: argparse.Namespace, device: torch.device) -> dict:
    size, words, mean = SHARED_PROMPTS[case]
    options = {"prompt_words": words, "max_completion_length": round(mean / 0.3), "num_generations": 16}
    options["micro_batch"] = 16
    return measure(size, argparse.Namespace(**{**vars(args), **options}), device, ("heavy_tailed",))


def ratios(results: dict) -> dict:
    """Time and memory of the arms relative to each other, of those that were measured."""
    table = {}
    for lengths, arms in results.items():
        table[lengths] = row = {}
        pairs = [(of, to) for of in ("gndpo", "gndpo-logps") for to in ("padded", "distillation", "grpo")]
        pairs += [(of, to) for of in ("expected", "exact") for to in ("gndpo", "distillation")]
        pairs += [("gspo", "grpo"), ("gndpo", "gndpo-rows")]
        for of, to in pairs:
            if {of, to} <= arms.keys():
                name = f"{of.replace('-', '_')}_vs_{to.removeprefix('gndpo-')}"
                row[name] = arms[of]["seconds"]["step"] / arms[to]["seconds"]["step"]
                row[f"{name}_memory"] = arms[of]["peak_bytes"] / arms[to]["peak_bytes"]
        gndpo = arms["gndpo"]
        # Teacher, student and loss compute every token once.
        row["tokens_vs_distinct"] = gndpo["tokens"]["padded"] / (3 * gndpo["distinct_tokens"])
        row["padded_per_real_token"] = gndpo["tokens"]["padded"] / gndpo["tokens"]["real"]
        row["own_share_of_step"] = gndpo["seconds"]["GNDPO's own"] / gndpo["seconds"]["step"]
    return table


def print_table(size: str, results: dict) -> None:
    for lengths, arms in results.items():
        print(f"\n{size}, {lengths.replace('_', '-')} lengths: seconds per step, median\n")
        print(
            "| arm | "
            + " | ".join(PHASES)
            + " | step | peak GiB, scoring | loss | padded / real tokens | gndpo / arm | memory |"
        )
        print("|---" * (len(PHASES) + 7) + "|")
        for name, arm in arms.items():
            phases = " | ".join(f"{arm['seconds'][phase]:.3f}" for phase in PHASES)
            time_ratio = arms["gndpo"]["seconds"]["step"] / arm["seconds"]["step"]
            memory_ratio = arms["gndpo"]["peak_bytes"] / arm["peak_bytes"]
            print(
                f"| {name} | {phases} | {arm['seconds']['step']:.3f} | "
                f"{arm['peak_bytes_by_part']['scoring'] / 2**30:.2f} | {arm['peak_bytes_by_part']['loss'] / 2**30:.2f} | "
                f"{arm['tokens']['padded'] / arm['tokens']['real']:.3f} | {time_ratio:.3f} | {memory_ratio:.3f} |"
            )


def plot(sizes: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(sizes), 2, figsize=(10, 3.2 * len(sizes)), squeeze=False)
    for axes, (size, results) in zip(grid, sizes.items(), strict=True):
        for axis, (lengths, arms) in zip(axes, results.items(), strict=True):
            left = [0.0] * len(arms)
            for phase in PHASES:
                widths = [arm["seconds"][phase] for arm in arms.values()]
                axis.barh(list(arms), widths, left=left, label=phase)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            axis.set_title(f"{size}, {lengths.replace('_', '-')} lengths")
            axis.set_xlabel("seconds per step")
            axis.invert_yaxis()
    grid[0][0].legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", nargs="+", choices=SIZES, help="default: small on a CPU, qwen3 and internvl on a GPU"
    )
    parser.add_argument("--completions", type=int, default=32, help="per optimizer step")
    parser.add_argument("--num_generations", type=int, default=4, help="completions per prompt")
    parser.add_argument("--micro_batch", type=int, default=4, help="per_device_train_batch_size")
    parser.add_argument("--max_completion_length", type=int, help="default: 512 on a CPU, 4096 on a GPU")
    parser.add_argument("--scoring_token_budget", type=int, help="of the arm gndpo; see GNDPOConfig")
    parser.add_argument(
        "--shared_prompts", nargs="*", choices=SHARED_PROMPTS, default=["prompts_512"], help="cases of longer prompts"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help='"gndpo" is always one of them')
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, default=Path("runs/step_cost.png"))
    args = parser.parse_args()
    args.prompt_words = None
    args.arms = [name for name in ARMS if name in (*args.arms, "gndpo")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.max_completion_length = args.max_completion_length or (512 if device.type == "cpu" else 4096)
    args.size = args.size or (["small"] if device.type == "cpu" else ["qwen3", "internvl"])

    time_trainers()
    sizes = {size: measure(size, args, device) for size in args.size}
    shared_prompts = {case: measure_shared_prompts(case, args, device) for case in args.shared_prompts}
    print(f"\n{machine(device)}; torch {torch.__version__}")
    for size, results in sizes.items():
        print_table(size, results)
    for case, results in shared_prompts.items():
        print_table(case, results)
    plot(sizes, args.plot)
    print(f"\nBar chart: {args.plot}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        first = next(iter(sizes))
        report = {
            "machine": machine(device),
            "ratios": {
                **ratios(sizes[first]),
                "shared_prompts": {case: ratios(results)["heavy_tailed"] for case, results in shared_prompts.items()},
            },
            "sizes": {size: {"ratios": ratios(results), "arms": results} for size, results in sizes.items()},
            "shared_prompts": shared_prompts,
        }
        args.json.write_text(json.dumps(report, indent=2))
        print(f"Figures: {args.json}")


if __name__ == "__main__":
    main()
