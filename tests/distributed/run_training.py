"""A job of `worker.py`: one training run on canned completions, and what each rank saw of it.

Its specification holds `model`, `teacher`, `config` (the fields of GNDPOConfig), and optionally `completions` (token ids
of a completion for each prompt; without them the student samples), `images` (whether prompts have one, or "some"), `own_prompts`
(whether the teacher has some), `prompt_fn` (whether a function writes them), `routed` (whether two teachers share the rows), `lora` (true or "4bit"), `resume`, `save`
(a folder), `send_adapter` (whether its adapter goes there as it would to a vLLM server), `fail` (what shall go wrong on the last rank), `broken` (what is NaN there in the second step), `scaler` (whether
losses are scaled, as for float16), `timeout` (seconds that ranks wait for one another), `count_bytes` (that go out) and `fsdp` (see below).
"""

import io
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoProcessor, BitsAndBytesConfig, TrainerCallback

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.vllm_adapter import AdapterSync
from gndpo_trl.teachers import LocalTeacher, Teacher
from gndpo_trl.teachers.weights import piece


PROMPTS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def offer_fsdp_on_cpus() -> None:
    """accelerate knows FSDP on accelerators alone, but torch's FSDP2 runs on gloo as well: pass for an accelerator."""
    initialize = PartialState.__init__

    def initialize_as_accelerator(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = initialize_as_accelerator


def word_of(prompt: str) -> str:
    """The word of `PROMPTS` that a decoded prompt asks for."""
    return prompt.split(" ?")[0].split()[-1]


def canned_rollouts(completions: list[list[int]]):
    """A `rollout_func` that returns the completion of each of `PROMPTS` in place of sampling; another one where a prompt
    comes again."""

    def rollout_func(prompts, trainer):
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        words = [word_of(trainer._tokenizer.decode(ids)) for ids in prompt_ids]
        times = [words[:row].count(word) for row, word in enumerate(words)]
        numbers = [PROMPTS.index(word) + 3 * count for word, count in zip(words, times, strict=True)]
        completion_ids = [completions[number % len(completions)] for number in numbers]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": [[0.0] * len(ids) for ids in completion_ids],
        }

    return rollout_func


def make_rows(images: bool | str, own_prompts: bool = False, routed: bool = False) -> list[dict]:
    rows = [{"prompt": [{"role": "user", "content": f"what is {word} ?"}]} for word in PROMPTS]
    if images:
        rows = [{**row, "images": [tiny_models.draw_image(index)]} for index, row in enumerate(rows)]
    if images == "some":  # of the first process alone, where there are two
        rows[0]["images"].append(tiny_models.draw_image(1))
        rows = [{**row, "images": row["images"] if index in (0, 2) else []} for index, row in enumerate(rows)]
    if own_prompts:  # of the first process alone, where there are two, and longer than the student's
        own = [{"role": "user", "content": "one plus one plus two is what ? what is the sum of one and two ?"}]
        rows = [{**row, "teacher_prompt": own if index < 3 else None} for index, row in enumerate(rows)]
    if routed:  # the first process has rows of both, where there are two, and the second one of one
        rows = [{**row, "teacher": "first" if index < 3 else "second"} for index, row in enumerate(rows)]
    return rows


def char_reward(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def failing_reward(completions, **kwargs):
    if PartialState().is_last_process:
        raise KeyError("no such answer")
    return [0.0 for _ in completions]


class FailingTeacher(Teacher):
    """A user's own, which cannot say on the last rank whose a row is."""

    names = ("anyone",)

    def route(self, rows):
        if PartialState().is_last_process:
            raise KeyError("no such subject")
        return [0 for _ in rows]

    def per_token_logps(self, rollout):
        return torch.full(rollout["completion_ids"].shape, -1.0)


class CountBytes(TrainerCallback):
    """What has left the machine by the end of each step."""

    def __init__(self):
        self.sent = []

    def on_step_end(self, args, state, control, **kwargs):
        (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if "eth0:" in line)
        self.sent.append(int(line.split()[9]))


class Sleeper(Teacher):
    """One that has lost its weights: all tokens are equally likely to it."""

    def per_token_logps(self, rollout):
        return torch.full(rollout["completion_ids"].shape, -3.5)


class BreakGradient(TrainerCallback):
    """Puts NaN into what this rank has of a gradient in the second step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            gradients = [piece(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
            next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = float("nan")


def break_loss(trainer: GNDPOTrainer) -> None:
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (
        compute(model, inputs) * (float("nan") if trainer.state.global_step == 1 else 1.0)
    )


def brief_all_but_the_longest(groups: list, fails: bool = False):
    """A `teacher_prompt_fn` that keeps what it saw of groups, in `groups`."""

    def teacher_prompt_fn(rows, completions):
        groups.extend([[(one.text, one.rewards["char_reward"]) for one in each.group] for each in completions])
        words = [row["prompt"][0]["content"].split()[2] for row in rows]
        longest = [max(each.group, key=lambda one: one.num_tokens) for each in completions]  # of equals, the first
        if fails:
            raise KeyError("no such brief")
        return [
            None if each is other else [{"role": "user", "content": f"one plus one is what ? what is {word} ?"}]
            for each, other, word in zip(completions, longest, words, strict=True)
        ]

    return teacher_prompt_fn


def open_broken_image(rows: dict) -> dict:
    return {**rows, "images": [[Image.open(io.BytesIO(b"not an image"))] for _ in rows["prompt"]]}


def send_adapter(trainer: GNDPOTrainer, folder: Path) -> None:
    server = SimpleNamespace(base_url="http://vllm", reset_prefix_cache=lambda: None)
    server.session = SimpleNamespace(post=lambda url, json: SimpleNamespace(status_code=200))
    model = trainer.accelerator.unwrap_model(trainer.model)
    AdapterSync(model, folder, trainer.accelerator).send(server, trainer._dist.gather_params)
    assert trainer.accelerator.is_main_process == hasattr(server, "model")


def train(spec: dict) -> dict:
    if spec.get("fsdp"):
        offer_fsdp_on_cpus()
    if spec.get("timeout"):  # transformers does not hand `ddp_timeout` on to processes on CPUs
        PartialState(cpu=True, timeout=timedelta(seconds=spec["timeout"]))
    config = GNDPOConfig(**spec["config"])
    processing_class = AutoProcessor.from_pretrained(spec["model"])
    # Stored in the dtype of the rest, so that ZeRO-3 can gather all parameters alike.
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.float32
    )
    groups, is_last = [], PartialState().is_last_process
    broken = spec.get("broken") if is_last else None
    reward = failing_reward if spec.get("fail") == "reward" else char_reward if spec.get("prompt_fn") else None
    fails = spec.get("fail") == "prompt_fn" and is_last
    trainer = GNDPOTrainer(
        model=spec["model"],
        reward_funcs=reward,
        teacher_prompt_fn=brief_all_but_the_longest(groups, fails) if spec.get("prompt_fn") else None,
        teacher_model=(
            {"first": spec["teacher"], "second": LocalTeacher(spec["model"])}
            if spec.get("routed")
            else FailingTeacher()
            if spec.get("fail") == "route"
            else Sleeper()
            if spec.get("fail") == "sleep"
            else spec["teacher"]
        ),
        callbacks=[BreakGradient()] if broken == "gradient" else None,
        args=config,
        train_dataset=Dataset.from_list(make_rows(*map(spec.get, ("images", "own_prompts", "routed")))),
        processing_class=processing_class,
        rollout_func=canned_rollouts(spec["completions"]) if spec.get("completions") else None,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if spec.get("lora") else None,
        quantization_config=quantization_config if spec.get("lora") == "4bit" else None,
    )
    if broken == "loss":
        break_loss(trainer)
    if spec.get("scaler"):  # which accelerate makes on accelerators alone
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    counter = CountBytes()
    if spec.get("count_bytes"):
        trainer.add_callback(counter)
    fail = spec.get("fail") if is_last else None
    if fail == "teacher":
        score = trainer.teacher.score
        trainer.teacher.score = lambda model, rollout: score(model, rollout) * float("nan")
    if fail == "sharing":
        compare = trainer._planner._compare
        trainer._planner._compare = lambda model, rows: compare(model, rows) or "it is told not to"
    if fail == "image":
        trainer.train_dataset.set_transform(open_broken_image)

    advantages = {}
    teacher_forwards = []
    teacher = trainer.teacher.teachers["first"] if spec.get("routed") else trainer.teacher
    engine = getattr(getattr(teacher, "teacher", teacher), "model", None)
    engine = engine if isinstance(engine, torch.nn.Module) else trainer.model
    engine.register_forward_pre_hook(
        lambda module, args, kwargs: teacher_forwards.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.in_one_pass = spec.get("in_one_pass", True)
    set_advantages = trainer._set_advantages

    def watch(batch, reading):
        moments = set_advantages(batch, reading)
        rollout = batch.rollout
        for ids, row, mask in zip(
            rollout["prompt_ids"], rollout["advantages"], rollout["completion_mask"], strict=True
        ):
            advantages[word_of(trainer._tokenizer.decode(ids))] = row[: int(mask.sum())].tolist()
        return moments

    trainer._set_advantages = watch
    teacher = trainer.accelerator.unwrap_model(engine)
    held = sum(piece(parameter).numel() for parameter in teacher.parameters())
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in teacher.parameters())

    trainer.train(resume_from_checkpoint=spec.get("resume"))
    if spec.get("save"):
        trainer.save_model(spec["save"])
    if spec.get("send_adapter"):
        send_adapter(trainer, Path(spec["save"]))
    buckets = None
    if hasattr(engine, "zero_optimization_partition_weights") and engine.zero_optimization_partition_weights():
        buckets = [engine.zero_reduce_bucket_size(), engine.zero_prefetch_bucket_size()]
        buckets += [engine.zero_param_persistence_threshold()]
    return {
        "advantages": advantages,
        "teacher_buckets": buckets,
        "num_4bit_layers": sum(type(module).__name__ == "Linear4bit" for module in trainer.model.modules()),
        "teacher_forwards": len(teacher_forwards),
        "teacher_tokens": sum(teacher_forwards),
        "reasons_against_sharing": list(trainer._planner.reasons.values()),
        "teacher_parameters": {"held": held, "whole": whole},
        "log_history": trainer.state.log_history,
        "global_step": trainer.state.global_step,
        "skipped_steps": trainer.skipped_steps,
        "groups": groups,
        "bytes_sent": counter.sent,
        "has_generated": bool(advantages),
        "distributed_type": str(trainer.accelerator.distributed_type),
        "num_processes": trainer.accelerator.num_processes,
    }
