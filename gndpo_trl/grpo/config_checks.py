"""What is wrong with the fields of a configuration, each for itself, before TRL looks at it; all of it in one message."""

import copy
import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from numbers import Integral, Real
from typing import Any

import numpy as np
from transformers.debug_utils import DebugOption
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import FSDPOption
from trl import GRPOConfig

from .trl_hooks import ROW_MEAN_LOSSES, TOKEN_SUM_LOSSES


# Optimizer steps after the weights that sampled it in which a sampled log-ratio is learned from. On the digits demo at a
# learning rate of 2e-4, 87 % of the answers are right at 0, 84 at 1, 71 at 2 and 13 at 4; of `estimator="exact"` 87 to 89.
MOST_STEPS_BEHIND = 1

LOSSES = (*ROW_MEAN_LOSSES, *TOKEN_SUM_LOSSES, "bnpo")

# Fields that say how much there is of something; `None` where they allow it says that it follows from others.
COUNTS = (
    *("num_generations", "num_generations_eval", "num_iterations", "steps_per_generation", "generation_batch_size"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("max_completion_length", "pad_to_multiple_of", "scoring_token_budget", "log_completions_steps"),
    *("num_completions_in_page", "max_skipped_steps", "eval_accumulation_steps", "torch_empty_cache_steps"),
    *("dataloader_prefetch_factor", "ref_model_sync_steps", "ddp_timeout", "ddp_bucket_cap_mb"),
    *("vllm_max_model_length", "vllm_tensor_parallel_size"),
)

# Fields whose type allows `None`, of which TRL's default is the only meaning that it has.
NEEDED = ("num_generations", "max_completion_length")

# Where numbers have to lie; an infinity is never meant where the interval is open there.
INTERVALS = {
    "[0, inf)": (
        *("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "eval_delay", "beta"),
        *("epsilon", "epsilon_high", "entropy_target", "entropy_coef_delta", "router_aux_loss_coef"),
        *("dataloader_num_workers", "neftune_noise_alpha", "num_completions_to_print", "max_tool_calling_iterations"),
        "sampling_lead",
    ),
    "[0, inf]": (
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_cap",
    ),
    "(0, inf)": (
        *("temperature", "repetition_penalty", "delta", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos"),
        *("vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "off_policy_mask_threshold", "vllm_server_timeout"),
    ),
    "(-inf, inf)": ("entropy_coef", "entropy_coef_min", "entropy_coef_max", "label_smoothing_factor"),
    "[0, 1)": ("adam_beta1", "adam_beta2"),
    "(0, 1]": ("top_p", "vllm_gpu_memory_utilization"),
    "[0, 1]": ("min_p", "ref_model_mixup_alpha", "top_entropy_quantile"),
    "[0, 4294967295]": ("seed", "data_seed"),
    "[1, 65535]": ("vllm_server_port", "vllm_group_port"),
}

CHOICES = {
    "loss_type": LOSSES,
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "cache_implementation": ALL_CACHE_IMPLEMENTATIONS,
    "include_num_input_tokens_seen": ("all", "non_padding", "no", True, False),
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("vllm", "transformers", "auto"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}

# Texts that name several of something, separated by blanks or in a list.
SEVERAL = {
    "report_to": ("all", "none", *INTEGRATION_TO_CALLBACK),
    "debug": tuple(option.value for option in DebugOption),
    "fsdp": tuple(option.value for option in FSDPOption),
}

# Dictionaries that may be the path of a file as well.
FILES = ("accelerator_config", "fsdp_config", "deepspeed")

WORDS = {int: "an integer", float: "a number", bool: "True or False", type(None): "None", str: "a text"}


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one `ValueError` for all that is wrong; nothing where nothing is."""
    problems = list(problems)
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"{len(problems)} settings cannot be so:\n" + "\n".join(f"- {text}" for text in problems))


def make_plain(args: GRPOConfig) -> None:
    """
    Make plain values of what means the same: numbers of numpy, which a sweep has and JSON and checkpoints cannot hold,
    paths, and True and False where TRL takes them for a name.
    """
    for field in dataclasses.fields(args):
        value = getattr(args, field.name, None)
        if isinstance(value, np.generic):
            setattr(args, field.name, value.item())
        elif isinstance(value, os.PathLike):
            setattr(args, field.name, os.fspath(value))
    if isinstance(args.scale_rewards, bool):
        args.scale_rewards = "group" if args.scale_rewards else "none"


def as_if_typed(args: GRPOConfig, names: Iterable[str]) -> GRPOConfig:
    """A copy in which the named fields have their defaults, so that the others can be looked at."""
    names, result = set(names), copy.copy(args)
    for field in dataclasses.fields(args):
        if field.name in names:
            made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            setattr(result, field.name, made)
    return result


def type_problems(args: GRPOConfig) -> dict[str, str]:
    """
    Fields whose value is not of their type, as a quoted number in a recipe or a notebook is, with a sentence for each.
    """
    problems = {}
    for name, hint in typing.get_type_hints(type(args)).items():
        if typing.get_origin(hint) is typing.ClassVar or not hasattr(args, name):
            continue
        is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        kinds = [*(typing.get_args(hint) if is_union else (hint,))]
        if name in NEEDED and type(None) in kinds:
            kinds.remove(type(None))
        kinds += args._also_of.get(name, ())
        value = getattr(args, name)
        if not any(is_of(value, kind) for kind in kinds):
            wanted = " or ".join(dict.fromkeys(words_for(kind) for kind in kinds))
            problems[name] = f"`{name}` is {short(value)} ({type(value).__name__}), but has to be {wanted}."
        elif isinstance(value, str) and dict in map(origin, kinds):
            refusal = json_refusal(name, value)
            if refusal:
                problems[name] = f"`{name}` is {short(value)}, {refusal}"
    return problems


def origin(kind: Any) -> Any:
    return typing.get_origin(kind) or kind


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as a field has it: a class, a list or dictionary of something, some values."""
    if kind is Any:
        return True
    if kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool | int) and value in (0, 1)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if typing.get_origin(kind) is typing.Literal:
        return any(value is allowed for allowed in typing.get_args(kind))
    if origin(kind) is list:
        items = typing.get_args(kind)
        return isinstance(value, list | tuple) and all(is_of(item, items[0]) for item in value if items)
    if origin(kind) is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, kind | str)  # which texts, `choice_problems` says
    return not isinstance(kind, type) or isinstance(value, kind)


def words_for(kind: Any) -> str:
    if origin(kind) is list:
        items = typing.get_args(kind)
        return "a list" + (f" of {({str: 'texts', float: 'numbers'}).get(items[0], 'them')}" if items else "")
    if origin(kind) is dict:
        return "a dictionary"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "a text"
    return WORDS.get(kind) or f"a `{getattr(kind, '__name__', kind)}`"


def json_refusal(name: str, value: str) -> str | None:
    """Why a text stands for no dictionary; `None` if it does, or is where one may be read from."""
    if name in FILES and not value.startswith("{"):
        # DeepSpeed's may also be one in base64, which is longer than a path.
        is_there = os.path.isfile(value) or name == "deepspeed" and len(value) > 255
        return None if is_there else "and there is no such file. Give the path of a JSON file, or a dictionary."
    try:
        found = json.loads(value)
    except ValueError as error:
        return f'which is no JSON ({error}). Give a dictionary, or one as JSON: \'{{"name": "value"}}\'.'
    return None if isinstance(found, dict) else 'but has to be a dictionary, or one as JSON: \'{"name": "value"}\'.'


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def choice_problems(args: GRPOConfig) -> Iterator[str]:
    """Texts that are none of those which a field knows, many of which would be asked for in the first step only."""
    hints = typing.get_type_hints(type(args))
    for field in dataclasses.fields(args):
        value = getattr(args, field.name, None)
        enums = [
            kind for kind in typing.get_args(hints[field.name]) if isinstance(kind, type) and issubclass(kind, Enum)
        ]
        choices = (
            CHOICES.get(field.name) or field.metadata.get("choices") or [item.value for kind in enums for item in kind]
        )
        if choices and value is not None and value not in choices and field.name not in SEVERAL:
            others = "None or one" if field.default is None else "one"
            yield f"`{field.name}` is {short(value)}. Choose {others} of {', '.join(map(repr, choices))}."
    for name, choices in SEVERAL.items():
        value = getattr(args, name)
        texts = ([value] if name == "report_to" else value.split()) if isinstance(value, str) else value or ()
        if isinstance(texts, bool):  # `fsdp`
            continue
        unknown = [text for text in texts if text not in choices and not isinstance(text, Enum)]
        if unknown:
            yield f"`{name}` is {short(value)}. Choose among {', '.join(map(repr, choices))}, not {unknown[0]!r}."


def number_problems(args: GRPOConfig) -> Iterator[str]:
    """Numbers of things that are none of them, and numbers that lie where they mean nothing."""
    for name in COUNTS:
        value = getattr(args, name, None)
        if isinstance(value, Real) and value < 1:
            yield f"`{name}` is {value}, but it counts something. Give an integer of at least 1."
    for interval, names in INTERVALS.items():
        low, high = map(float, interval[1:-1].split(", "))
        for name in names:
            value = getattr(args, name, None)
            if not isinstance(value, Real) or is_between(value, interval):
                continue
            bounds = (
                [f"above {low:g}" if interval.startswith("(") else f"from {low:.10g} on"] if low > -math.inf else []
            )
            if high < math.inf:
                bounds.append(f"below {high:g}" if interval.endswith(")") else f"up to {high:.10g}")
            others = " and ".join(["finite", *bounds] if interval.endswith("inf)") else bounds)
            yield f"`{name}` is {value}, but has to be {others}. Give such a number{HINTS.get(name, '')}."
    if isinstance(args.pad_to_multiple_of, str) and not re.fullmatch(
        r"auto|none|null|[1-9]\d*", args.pad_to_multiple_of, re.I
    ):
        yield f"`pad_to_multiple_of` is {args.pad_to_multiple_of!r}. Give an integer of at least 1, 'auto' or None."
    if args.top_k < 0 and not (args.use_vllm and args.top_k == -1):
        yield f"`top_k` is {args.top_k}, but it is a number of tokens. Use 0 for all of them, or give a positive integer."
    if args.max_steps < -1 or args.max_steps == 0:
        yield f"`max_steps` is {args.max_steps}. Give a positive integer, or -1 to train for `num_train_epochs`."
    if args.max_steps == -1 and not is_between(args.num_train_epochs, "(0, inf)"):
        yield (
            f"`num_train_epochs` is {args.num_train_epochs}, and `max_steps` is not set. Give one of them as a positive, finite "
            "number."
        )


# What a number that is refused may stand for.
HINTS = {
    "temperature": "; 1.0 is the student as it is",
    "top_p": "; 1.0 keeps all tokens",
    "repetition_penalty": "; 1.0 is none",
    "top_entropy_quantile": "; 1.0 keeps all tokens",
}


def is_between(value: Real, interval: str) -> bool:
    """Whether a number lies in an interval that is written as in mathematics; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(", "))
    above = low < value if interval.startswith("(") else low <= value
    return above and (value < high if interval.endswith(")") else value <= high)


def steps_behind(args: GRPOConfig) -> int:
    """Most optimizer steps between the weights that sample a generation batch and those that first learn from it."""
    return -(-args.sampling_lead * args.steps_per_generation // args.gradient_accumulation_steps)


def lead_problems(args: GRPOConfig) -> Iterator[str]:
    """What does not go with sampling ahead; once TRL has worked out how large a generation batch is."""
    lead = args.sampling_lead
    if lead == 0:
        return
    if args.use_vllm and args.vllm_mode == "colocate":
        yield (
            f'`sampling_lead` is {lead}, but `vllm_mode` is "colocate", whose engine samples in this process, which learns '
            'meanwhile. Set `vllm_mode="server"`, or `sampling_lead` to 0.'
        )
    if args.num_iterations > 1:
        yield (
            f"`sampling_lead` is {lead} and `num_iterations` {args.num_iterations}: nobody has tried how old a batch may be that "
            "is learned from more than once. Set one of them to its default."
        )
    if getattr(args, "use_sampling_logps", False):
        yield (
            f"`sampling_lead` is {lead} and `use_sampling_logps` True, but the sampler's log-probs are those of older weights than "
            "the student has when it learns. Set `use_sampling_logps` to False, or `sampling_lead` to 0."
        )
    behind = steps_behind(args)
    if getattr(args, "estimator", None) != "exact" and behind > MOST_STEPS_BEHIND:
        yield (
            f"`sampling_lead` is {lead}, so that batches are sampled with the weights of up to {behind} optimizer steps ago. The "
            "gradient of sampled tokens bears 1: on the digits demo, at a learning rate of 2e-4, it ends at 87 % right answers "
            'with 0, at 84 with 1, and at 13 with 4. Lower `sampling_lead`, or set `estimator="exact"`, which loses nothing there.'
        )
