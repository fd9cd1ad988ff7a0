"""Configurations and rows as a recipe, a sweep or a notebook brings them, right and wrong."""

import dataclasses
import math
import types
import typing
from enum import Enum

from hypothesis import strategies as st
from trl import GRPOConfig

from gndpo_trl.grpo.config_checks import CHOICES


# What stands where something else is meant.
STRANGE = [
    *(None, "", "5", "1e-4", "none", "yes", "a word", "{broken", '{"a": 1}', b"bytes", True, False),
    *(-1, 0, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 0.5, -0.5, 1.5, 1e-45, 1e38, math.inf, -math.inf, math.nan),
    *([], [1], ["a", "b"], (), {}, {"a": 1}, {1: "a"}, [None], [[]], object, 1j),
]


def kinds_of(hint) -> tuple:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def usual_values(field: dataclasses.Field, hint) -> st.SearchStrategy:
    """Values that a field may have, from its type and what else is known of it."""
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    found = [st.just(made)]
    choices = CHOICES.get(field.name) or field.metadata.get("choices")
    for kind in kinds_of(hint):
        if isinstance(kind, type) and issubclass(kind, Enum):
            found.append(st.sampled_from([item.value for item in kind]))
        elif kind is bool:
            found.append(st.booleans())
        elif kind is int:
            found.append(st.integers(-1, 9) | st.sampled_from([16, 64, 1000]))
        elif kind is float:
            found.append(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, 2.0, 1e-3, 1e6, math.inf, 4]))
        elif kind is str:
            found.append(
                st.sampled_from(list(choices)) if choices else st.sampled_from(["a", "http://one:8000", "eval_kl"])
            )
        elif kind in (dict, list) or typing.get_origin(kind) in (dict, list):
            found.append(st.just((typing.get_origin(kind) or kind)()))
        elif kind is type(None):
            found.append(st.none())
    return st.one_of(found)


def configurations(config_class: type, most: int = 5) -> st.SearchStrategy[dict]:
    """Up to so many fields of a configuration, each with a usual or with a strange value."""
    hints = typing.get_type_hints(config_class)
    values = {
        field.name: st.one_of(usual_values(field, hints[field.name]), st.sampled_from(STRANGE))
        for field in dataclasses.fields(config_class)
    }
    names = st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=most, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: values[name] for name in chosen}))


# Fields that start what a test has not got: servers, engines, compilers, other processes, the Hub; and those of the run.
NOT_TRAINED = (
    *("output_dir", "max_steps", "resume_from_checkpoint", "use_cpu", "use_vllm", "deepspeed", "fsdp", "fsdp_config"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "push_to_hub", "hub_token"),
    *("log_completions_hub_repo", "report_to", "log_level", "log_level_replica", "parallelism_config", "ddp_backend"),
    *("teacher_model_name_or_path", "teacher_model_revision", "teacher_server_url", "teacher_server_model"),
    *("use_transformers_continuous_batching", "use_transformers_paged", "full_determinism", "tf32", "debug"),
    *("enable_jit_checkpoint", "dataloader_multiprocessing_context"),
)


def trainable(config_class: type, most: int = 6) -> st.SearchStrategy[dict]:
    """
    Up to so many fields with usual values, of those that a run of two steps on a CPU can have; every other one is of the
    fields that this package has added or changed.
    """
    hints = typing.get_type_hints(config_class)
    known = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    values, own = {}, []
    for field in dataclasses.fields(config_class):
        if field.name not in NOT_TRAINED:
            values[field.name] = usual_values(field, hints[field.name])
            if known.get(field.name) is not field:
                own.append(field.name)
    name = st.sampled_from(own) | st.sampled_from(sorted(values))
    return st.lists(name, min_size=1, max_size=most, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: values[name] for name in chosen})
    )
