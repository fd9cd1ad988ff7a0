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

All of them take their steps in turn, in one process, on the same completions, which are drawn once instead of sampled: with
log-normal lengths of which the mean is 0.3 of the longest, and with equal lengths. Models have random weights. A step is
everything between the completions and the updated weights; reported are medians over the repeated steps. Peak memory is
measured in as many steps of its own: the weights and optimizer state of the arm, plus what a step needs on top of them.

Prompts of that are short. `--shared_prompts` adds cases with prompts as long as image questions are, with 16 completions
each in micro-batches of 16, and log-normal lengths.
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.gspo import GSPOConfig, GSPOTrainer


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny_models  # noqa: E402  the image-text pair's processor, which needs no torchvision


ARMS = ("grpo", "gspo", "distillation", "padded", "gndpo", "gndpo-logps", "gndpo-rows", "expected", "exact")
PHASES = (
    *("teacher scoring", "student scoring", "distributions", "loss + backward", "optimizer"),
    *("TRL's bookkeeping", "GNDPO's own"),
)
TEXT_TOKENS = 8000

# Hidden size, intermediate size, layers, heads, of student and teacher. The LM head is half of the small student, and a
# quarter of the deep one, as of Qwen3-0.6B; then Qwen3-0.6B and 1.7B themselves, and the text models of InternVL3.5-1B
# and 2B, which have the same shapes.
SIZES = {
    "small": ((128, 384, 4, 4), (256, 768, 4, 4)),
    "small-deep": ((128, 384, 12, 4), (192, 576, 12, 6)),
    "small-wide": ((256, 768, 4, 4), (768, 2304, 4, 12)),
    "small-vocabulary": ((128, 384, 4, 4), (256, 768, 4, 4)),  # of 150,000
    "small-internvl": ((128, 384, 4, 4), (256, 768, 4, 4)),
    "small-whole-internvl": ((128, 384, 4, 4), (256, 768, 4, 4)),  # images of 256 tokens
    "qwen3": ((1024, 3072, 28, 16), (2048, 6144, 28, 16)),
    "internvl": ((1024, 3072, 28, 16), (2048, 6144, 28, 16)),
}

# Size of the models, words in a prompt, mean length of its completions.
SHARED_PROMPTS = {
    "prompts_512": ("small", 512, 150),
    "prompts_512_wide": ("small-wide", 512, 150),
    "prompts_1024": ("small", 1024, 256),
    "images": ("small-whole-internvl", 76, 150),
}


# ---- models and completions


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<eos>", *(f"w{index}" for index in range(TEXT_TOKENS - 2))]
    backend = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left"
    )


def build_model(size: str, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> PreTrainedModel:
    hidden_size, intermediate_size, layers, heads = shape
    is_small = size.startswith("small")
    text = {
        "vocab_size": {"small-vocabulary": 150_000}.get(size, TEXT_TOKENS) if is_small else 151_936,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": hidden_size // heads if is_small else 128,
        "tie_word_embeddings": not size.endswith("internvl"),
        "max_position_embeddings": 32_768,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    if not size.endswith("internvl"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **text), dtype=dtype)
    tokenizer = tiny_models.build_tokenizer(image="<IMG_CONTEXT>")
    text.update(
        model_type="qwen3", vocab_size=max(text["vocab_size"], len(tokenizer)), pad_token_id=tokenizer.pad_token_id
    )
    vision = {"image_size": [448, 448], "patch_size": [14, 14]}  # 256 tokens per tile
    if is_small:
        vision.update(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    if size == "small-internvl":
        vision["image_size"] = [56, 56]
    tokens_per_tile = 4 if size == "small-internvl" else 256
    config = AutoConfig.for_model(
        "internvl",
        text_config={**text, "eos_token_id": tokenizer.eos_token_id},
        vision_config=vision,
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=tokens_per_tile,
    )
    return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def build_processing_class(size: str):
    if not size.endswith("internvl"):
        return build_tokenizer()
    _, processor = tiny_models.build_internvl()
    edge = 56 if size == "small-internvl" else 448
    processor.image_processor.size = {"height": edge, "width": edge}
    processor.image_seq_length = 4 if size == "small-internvl" else 256
    return processor


def draw_completion_lengths(lengths: str, num_completions: int, longest: int, generator: torch.Generator) -> list[int]:
    """Log-normal lengths, of which the longest is `longest` and the mean 0.3 of it; or its mean for all of them."""
    if lengths == "constant":
        return [round(0.3 * longest)] * num_completions
    normal = torch.randn(num_completions, generator=generator)
    normal = (normal - normal.max()) / normal.std()
    # The mean shrinks as the spread grows: bisect for the spread that gives 0.3.
    low, high = 0.0, 10.0
    for _ in range(50):
        spread = (low + high) / 2
        low, high = (spread, high) if (spread * normal).exp().mean() > 0.3 else (low, spread)
    return (longest * (low * normal).exp()).round().clamp(min=1).long().tolist()


def draw_batch(size: str, lengths: str, args: argparse.Namespace) -> tuple[list[dict], list[list[int]]]:
    """Rows of a data set, and a completion for each of them that ends in the end token."""
    generator = torch.Generator().manual_seed(args.seed)
    rows = []
    for _ in range(args.completions // args.num_generations):
        num_words = 44 if lengths == "constant" else torch.randint(24, 65, (1,), generator=generator).item()
        num_words = args.prompt_words or num_words
        if size.endswith("internvl"):
            words = torch.randint(0, len(tiny_models.WORDS), (num_words,), generator=generator).tolist()
            prompt = [{"role": "user", "content": " ".join(tiny_models.WORDS[word] for word in words)}]
            row = {"prompt": prompt, "images": [tiny_models.draw_image(len(rows))]}
        else:
            words = torch.randint(0, TEXT_TOKENS - 2, (num_words,), generator=generator).tolist()
            row = {"prompt": " ".join(f"w{word}" for word in words)}
        rows += [row] * args.num_generations
    vocabulary = 40 if size.endswith("internvl") else TEXT_TOKENS
    completions = []
    for length in draw_completion_lengths(lengths, args.completions, args.max_completion_length, generator):
        # neither the end token nor an image's placeholders, which come first in the vocabularies
        completion = torch.randint(20, vocabulary, (length - 1,), generator=generator).tolist()
        completions.append([*completion, 2 if size.endswith("internvl") else 1])
    return rows, completions


# ---- the clock: phases exclude each other; what is called within a phase and is none of its own counts for it


class Stopwatch:
    def __init__(self, device: torch.device, teacher: PreTrainedModel | None):
        self.device = device
        self.teacher = teacher
        self.reset()

    def reset(self) -> None:
        self.seconds = defaultdict(float)
        self.tokens = defaultdict(int)
        self.stack = []
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str):
        self.switch()
        self.stack.append(name)
        yield
        self.switch()
        self.stack.pop()

    def switch(self) -> None:
        now = self.now()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    def count_tokens(self, module, args, kwargs) -> None:
        self.tokens["padded"] += kwargs["input_ids"].numel()
        if "shared_prompts" in kwargs:  # a packed row holds no padding
            self.tokens["real"] += kwargs["input_ids"].numel()
        else:
            self.tokens["real"] += kwargs["attention_mask"].sum().item()


def time_method(cls: type, name: str, get_phase) -> None:
    """Have `cls.name` report to the stopwatch of the trainer it is called on."""
    method = getattr(cls, name)

    @functools.wraps(method)
    def timed(self, *args, **kwargs):
        model = args[0] if args else kwargs.get("model")
        with self.stopwatch.phase(get_phase(self, model)):
            return method(self, *args, **kwargs)

    setattr(cls, name, timed)


def forward_phase(trainer, model) -> str:
    if not isinstance(model, torch.nn.Module):  # what GNDPO hands to TRL in place of the model, in a phase of its own
        return trainer.stopwatch.stack[-1]
    if model is trainer.stopwatch.teacher:
        return "teacher scoring"
    return "loss + backward" if torch.is_grad_enabled() else "student scoring"


def time_trainers() -> None:
    for trainer in (GRPOTrainer, DistillationTrainer):
        for name in ("_prepare_inputs", "_generate_and_score_completions"):
            time_method(trainer, name, lambda *_: "TRL's bookkeeping")
        time_method(trainer, "_compute_loss", lambda *_: "loss + backward")
    time_method(GRPOTrainer, "_get_per_token_logps_and_entropies", forward_phase)
    time_method(DistillationTrainer, "_get_last_hidden_state", forward_phase)
    for trainer in (GNDPOTrainer, GSPOTrainer):
        for name in ("_prepare_inputs", "_generate_and_score_completions", "_compute_loss"):
            time_method(trainer, name, lambda *_: "GNDPO's own")
        time_method(trainer, "_get_per_token_logps_and_entropies", lambda *_: "GNDPO's own")
        time_method(trainer, "_forward", forward_phase)
    time_method(GNDPOTrainer, "_compare_rows", lambda *_: "distributions")


# ---- an arm: a trainer, its optimizer, and one step of it


class Arm:
    def __init__(self, name: str, size: str, args: argparse.Namespace, device: torch.device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        student_shape, teacher_shape = SIZES[size]
        has_teacher = name not in ("grpo", "gspo")
        configs = {"grpo": GRPOConfig, "gspo": GSPOConfig, "distillation": DistillationConfig}
        config_class = configs.get(name, GNDPOConfig)
        options = {
            "output_dir": "runs/step_cost",
            "use_cpu": device.type == "cpu",
            "bf16": device.type == "cuda",
            "gradient_checkpointing": args.gradient_checkpointing,
            "per_device_train_batch_size": args.micro_batch,
            "gradient_accumulation_steps": args.completions // args.micro_batch,
            "max_completion_length": args.max_completion_length,
            "report_to": "none",
            "seed": args.seed,
        }
        if name != "distillation":
            options["num_generations"] = args.num_generations
        if name == "padded":
            options["pad_to_multiple_of"] = 1
        if config_class in (GNDPOConfig, GSPOConfig) and name != "padded":
            options["scoring_token_budget"] = args.scoring_token_budget
        if name == "expected":
            options["score_baseline"] = "expected"
        if name == "exact":
            options["estimator"] = "exact"
        if name == "gndpo-logps":
            options["use_sampling_logps"] = True
        if name == "gndpo-rows":
            options["share_prompts"] = False
        sources = {"model": build_model(size, student_shape, dtype, seed=0)}
        if has_teacher:
            sources["teacher_model"] = build_model(size, teacher_shape, dtype, seed=1)
        if not has_teacher:
            sources["reward_funcs"] = lambda completions, **kwargs: [0.0] * len(completions)
        if name != "distillation":
            sources["rollout_func"] = self.rollout
        processing_class = build_processing_class(size)
        if config_class is GNDPOConfig:
            sources["teacher_processing_class"] = processing_class
        rows = [{"prompt": "w1"}] if not size.endswith("internvl") else draw_batch(size, "constant", args)[0][:1]
        trainers = {"grpo": GRPOTrainer, "gspo": GSPOTrainer, "distillation": DistillationTrainer}
        trainer_class = trainers.get(name, GNDPOTrainer)
        self.trainer = trainer_class(
            args=config_class(**options),
            train_dataset=Dataset.from_list(rows * args.completions),
            processing_class=processing_class,
            **sources,
        )
        self.trainer.stopwatch = self.stopwatch = Stopwatch(device, sources.get("teacher_model"))
        self.steps = args.completions // args.micro_batch
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.trainer.model_wrapped = self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.models = [self.model] + ([sources["teacher_model"]] if "teacher_model" in sources else [])
        for model in self.models:
            model = self.trainer.accelerator.unwrap_model(model)
            model.base_model.register_forward_pre_hook(self.stopwatch.count_tokens, with_kwargs=True)

    def use(self, completions: list[list[int]]) -> None:
        """Have the trainer take these completions for sampled."""
        self.completions = completions
        if isinstance(self.trainer, DistillationTrainer):  # has no `rollout_func`
            self.trainer._generate_single_turn = lambda *args, **kwargs: completions

    def rollout(self, prompts: list, trainer: GRPOTrainer) -> dict:
        """The completions in use, with log-probs that cost what real ones cost."""
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        logprobs = [[-1.0] * len(ids) for ids in self.completions]
        return {"prompt_ids": prompt_ids, "completion_ids": self.completions, "logprobs": logprobs}

    def step(self, rows: list[dict]) -> None:
        self.model.train()
        self.trainer.current_gradient_accumulation_steps = self.steps
        self.stopwatch.reset()
        for _ in range(self.steps):
            with self.stopwatch.phase("loss + backward"):
                self.trainer.training_step(self.model, rows, None)
        with self.stopwatch.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Weights of its models and state of its optimizer."""
        tensors = [tensor for model in self.models for tensor in model.parameters()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- memory


def keep_freed_memory(keep: bool) -> None:
    """
    Have glibc keep the memory of freed tensors for the next ones, as PyTorch does on GPUs, or give it all back at once.

    By default its behaviour depends on what was allocated before, and page faults decide which arm is faster. Given
    back, freed memory does not count as resident.
    """
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold, m_mmap_max, m_arena_max = -1, -3, -4, -8  # malloc.h
    libc.mallopt(m_arena_max, 1)
    libc.mallopt(m_mmap_max, 0 if keep else 65_536)
    libc.mallopt(m_mmap_threshold, 65_536)
    libc.mallopt(m_trim_threshold, 2**31 - 1 if keep else 65_536)


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak(device: torch.device) -> int:
    """Bytes in use now, from which on the peak is taken."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
    return resident_bytes("VmRSS")


def peak_since_reset(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


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


# ---- the measurement, and what becomes of it


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
