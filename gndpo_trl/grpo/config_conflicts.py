"""Fields of a configuration that do not go together: what transformers and TRL would refuse, one at a time and in their words."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import GRPOConfig

from .evaluation_logs import WAITING_SCHEDULES


def conflicts(args: GRPOConfig) -> Iterator[str]:
    """What does not go together, each with the values and the remedy; before anything is worked out from anything."""
    for find in (batch_conflicts, strategy_conflicts, precision_conflicts, optimizer_conflicts, other_conflicts):
        yield from find(args)


def batch_conflicts(args: GRPOConfig) -> Iterator[str]:
    numbers = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_generations)
    if min(*numbers, args.steps_per_generation or 1, args.generation_batch_size or 1) < 1:
        return  # nothing can be divided by it
    ranks = ranks_of_launch()
    times = f" × {ranks} processes" if ranks > 1 else ""
    of_step = f"`per_device_train_batch_size` ({args.per_device_train_batch_size}){times}"
    step = args.per_device_train_batch_size * ranks
    size, steps = args.generation_batch_size, args.steps_per_generation
    if size is not None and steps is not None:
        yield (
            f"`generation_batch_size` is {size} and `steps_per_generation` {steps}, but each follows from the other. Leave one "
            "of them out."
        )
        return
    if size is not None and size % step:
        yield f"`generation_batch_size` is {size}, but has to be divisible by {of_step}. Give a multiple of {step}, or none."
        return
    if size is None:
        steps = steps or args.gradient_accumulation_steps
        size, of_step = step * steps, f"{of_step} × {steps} steps"
    if size % args.num_generations:
        yield (
            f"`num_generations` is {args.num_generations}, but a generation batch has {size} completions ({of_step}), which has "
            "to be divisible by num_generations, since it holds all completions of a prompt. Change one of them, or "
            "`gradient_accumulation_steps`."
        )
    name = "num_generations" if args.num_generations_eval is None else "num_generations_eval"
    num_eval, size_eval = getattr(args, name), args.per_device_eval_batch_size
    if args.eval_strategy != "no" and num_eval > 0 and size_eval > 0 and size_eval * ranks % num_eval:
        yield (
            f"`per_device_eval_batch_size` is {size_eval}{times}, but has to be divisible by `{name}` ({num_eval}). Make it a "
            "multiple, or set `num_generations_eval` to a number that divides it."
        )


def ranks_of_launch() -> int:
    """Processes of this run, as accelerate reads them from the environment."""
    local = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
    if get_int_from_env(local, -1) == -1:
        return 1
    return get_int_from_env(("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), 1)


def strategy_conflicts(args: GRPOConfig) -> Iterator[str]:
    """When a run logs, evaluates and saves."""
    steps = {"logging": args.logging_steps, "save": args.save_steps, "eval": args.eval_steps or args.logging_steps}
    for kind, number in steps.items():
        if getattr(args, f"{kind}_strategy") != "steps":
            continue
        if not 0 < number < math.inf or number > 1 and number != int(number):
            yield (
                f"`{kind}_steps` is {number}. Give a positive integer, or a share of the run between 0 and 1; for none at all "
                f'set `{kind}_strategy` to "no".'
            )
    if args.eval_strategy == "no":
        if args.load_best_model_at_end and args.save_strategy != "best":
            yield (
                '`load_best_model_at_end` is True, but `eval_strategy` is "no". Set that to "steps" or "epoch", or the former '
                "to False."
            )
        if args.lr_scheduler_type in WAITING_SCHEDULES:
            yield (
                f'`lr_scheduler_type` is {plain(args.lr_scheduler_type)!r}, which waits for a metric, but `eval_strategy` is "no". '
                'Set that to "steps" or "epoch", or take another schedule.'
            )
    elif args.load_best_model_at_end and args.save_strategy != "best":
        save, evaluate = (
            round(1e6 * number) if math.isfinite(number) else 0 for number in (steps["save"], steps["eval"])
        )
        if args.save_strategy != args.eval_strategy:
            yield (
                f'`load_best_model_at_end` is True, but `save_strategy` is "{plain(args.save_strategy)}" and `eval_strategy` '
                f'"{plain(args.eval_strategy)}": the best model may be one that is not saved. Make them the same.'
            )
        elif args.eval_strategy == "steps" and evaluate and save % evaluate:
            yield (
                f"`save_steps` is {args.save_steps} and `eval_steps` {args.eval_steps}, but with `load_best_model_at_end` what is "
                "saved has to be evaluated. Make `save_steps` a multiple of `eval_steps`."
            )


def precision_conflicts(args: GRPOConfig) -> Iterator[str]:
    if args.fp16 and args.bf16:
        yield "`fp16` and `bf16` are both True. Set one of them to False."
    if args.fp16 and not args.bf16 and (args.use_cpu or not torch.accelerator.is_available()):
        yield "`fp16` is True, but a CPU trains in bf16 or float32 alone. Set `fp16` to False, and `bf16` to True or False."
    has_bf16 = args.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
    for name in ("bf16", "bf16_full_eval"):
        value = getattr(args, name)
        if not has_bf16 and (value or name == "bf16" and value is None and not args.fp16):
            yield (
                f"`{name}` is {value!r}, but there is no accelerator here that computes in bfloat16. Set it to False, or "
                "`use_cpu` to True to train on the CPU."
            )
    if args.fp16_full_eval and args.bf16_full_eval:
        yield "`fp16_full_eval` and `bf16_full_eval` are both True. Set one of them to False."
    if args.tf32 and not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8):
        yield "`tf32` is True, but there is no GPU that has it (Ampere or newer). Leave it out."


def other_conflicts(args: GRPOConfig) -> Iterator[str]:
    if args.auto_find_batch_size:
        yield (
            "`auto_find_batch_size` is True, but a generation batch has to hold all completions of its prompts at any size. Set "
            "it to False, and lower `per_device_train_batch_size`."
        )
    if args.sync_ref_model and args.beta == 0:
        yield (
            "`sync_ref_model` is True, but `beta` is 0, so that there is no reference model to keep up. Set `beta` to a positive "
            "number, or `sync_ref_model` to False."
        )
    if args.log_completions_hub_repo is not None and not args.log_completions:
        yield (
            f"`log_completions_hub_repo` is {args.log_completions_hub_repo!r}, but `log_completions` is False. Set that to "
            "True, or leave the former out."
        )
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if getattr(args, name) and args.dataloader_num_workers == 0:
            yield (
                f"`{name}` is {getattr(args, name)}, but `dataloader_num_workers` is 0. Raise the latter, or leave the former "
                "out."
            )
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    high = high if args.vllm_importance_sampling_cap is None else args.vllm_importance_sampling_cap
    if low is not None and high is not None and low >= high:
        yield (
            f"`vllm_importance_sampling_clip_min` is {low}, but has to be below `vllm_importance_sampling_clip_max` ({high}). "
            "Lower the former, or raise the latter."
        )
    mode = args.vllm_importance_sampling_mode
    if args.vllm_importance_sampling_correction and mode.endswith("truncate") and low is high is None:
        yield (
            f'`vllm_importance_sampling_mode` is "{mode}", but neither `vllm_importance_sampling_clip_min` nor `_clip_max` is '
            "set. Set one of them."
        )
    if args.loss_type == "vespo" and args.use_vllm and args.vllm_importance_sampling_correction:
        if not mode.startswith("token"):
            yield (
                f'`vllm_importance_sampling_mode` is "{mode}", but `loss_type` is "vespo", which takes "token_truncate" or '
                '"token_mask". Set one of them.'
            )


def optimizer_conflicts(args: GRPOConfig) -> Iterator[str]:
    """What the optimizer and the learning rate's schedule would refuse when training begins."""
    if args.optim in [item.value for item in OptimizerNames]:
        try:
            Trainer.get_optimizer_cls_and_kwargs(args)
        except Exception as error:  # of what is not installed, or takes no such arguments
            if "model" not in str(error):  # some optimizers are made of the whole model
                given = "" if args.optim_args is None else f", with `optim_args` {args.optim_args!r}"
                yield (
                    f"`optim` is {plain(args.optim)!r}{given}, which cannot be made ({error}). Install what it needs, correct its "
                    "arguments, or choose another one."
                )
    options = args.lr_scheduler_kwargs or {}
    options = json.loads(options) if isinstance(options, str) else options
    schedule = plain(args.lr_scheduler_type)
    if options and schedule in [item.value for item in SchedulerType]:
        try:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            get_scheduler(schedule, optimizer, 1, 10, scheduler_specific_kwargs=dict(options))
        except Exception as error:  # whatever a schedule makes of options that it does not know
            yield (
                f"`lr_scheduler_kwargs` is {args.lr_scheduler_kwargs!r}, which `lr_scheduler_type` {schedule!r} does not take "
                f"({error}). Correct it, or choose another schedule."
            )


def plain(value: Any) -> Any:
    """The text of a member of an enumeration."""
    return getattr(value, "value", value)


@contextmanager
def foreign_words(args: GRPOConfig) -> Iterator[None]:
    """
    What transformers or TRL raise at construction without naming a field, as a `ValueError` that names those which were set.
    """
    set_by_hand = {field.name: getattr(args, field.name) for field in fields(args) if is_set(args, field)}
    try:
        yield
    except Exception as error:
        if any(re.search(rf"\b{field.name}\b", str(error)) for field in fields(args)):
            raise
        given = ", ".join(f"`{name}` ({value!r})" for name, value in set_by_hand.items())
        raise ValueError(
            f"These settings cannot be used together ({type(error).__name__}: {error}). Look at what is set: {given}."
        ) from error


def is_set(args: GRPOConfig, field: Any) -> bool:
    return getattr(args, field.name) is not field.default and getattr(args, field.name) not in (field.default, [], {})
