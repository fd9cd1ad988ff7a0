"""Everything in TRL that this package relies on and that TRL does not promise to keep, in one place.

`tests/test_trl_hooks.py` checks each of them against the installed TRL and says which one changed.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers.trainer
import trl.trainer.utils
from transformers.trainer import TRAINER_STATE_NAME
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
    nanstd,
    pad,
    print_prompt_completions_sample,
    split_pixel_values_by_grid,
    unsplit_pixel_values_by_grid,
)


__all__ = [
    "ATTRIBUTES",
    "ENTROPY_STATE_NAME",
    "MODEL_ATTRIBUTES",
    "MULTIMODAL_KEYS",
    "OVERRIDDEN_METHODS",
    "REWARD_ARGUMENTS",
    "REWARD_METRICS",
    "ROW_MEAN_LOSSES",
    "ROW_METRICS",
    "TRAINER_STATE_NAME",
    "TOKEN_SUM_LOSSES",
    "HeadCall",
    "HeadFields",
    "add_fused_lm_head",
    "before_engine_step",
    "create_model_from_path",
    "get_config_model_id",
    "lm_head_read_by",
    "maybe_gather_lm_head_ctx",
    "nanstd",
    "pad",
    "prepare_deepspeed",
    "prepare_fsdp",
    "print_prompt_completions_sample",
    "real_tokens_in_lm_head",
    "split_pixel_values_by_grid",
    "unsplit_pixel_values_by_grid",
    "uploads_without",
    "without_advice_on_levels",
]

# Methods of `GRPOTrainer` that the mixins of this folder and `GNDPOTrainer` override, calling `super()`.
OVERRIDDEN_METHODS = {
    # Called before every micro-batch; fills `_buffered_inputs` with a new list of `steps_per_generation` micro-batches
    # when it has generated.
    "_prepare_inputs": ("self", "generation_batch"),
    # Its result is the batch that TRL shuffles, splits and hands to the loss; the advantages in it may be (B, T).
    "_generate_and_score_completions": ("self", "inputs"),
    # Called on all ranks after sampling, with this rank's rows, messages and token ids (padding and the mask of truncated
    # completions come later); returns the rewards `(N, F)` of the completions of all ranks, in rank order.
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    # Samples all completions of this rank's prompts, with whatever tools or `rollout_func` take part; returns eight things, the
    # token ids of the completions as the second.
    "_generate": ("self", "prompts"),
    # Samples with `generation_config`, or with vLLM, where `vllm_generation.generation_kwargs` win over its options.
    "_generate_single_turn": None,
    # Reads `old_per_token_logps` from `inputs` only after the forward pass.
    "_compute_loss": ("self", "model", "inputs"),
    # Scores completions through the fused LM head; the one place where log-probs are computed, with `batch_size` for a
    # whole rollout and without it for a micro-batch of the loss. Does nothing with the model but to call it.
    "_get_per_token_logps_and_entropies": None,
    # Writes a checkpoint; the generation batch in progress, `_buffered_inputs` at `_step`, is not part of it.
    "_save_checkpoint": ("self", "model", "trial"),
    # Called on all ranks for a checkpoint that can be resumed, before the main one writes `trainer_state.json`.
    "_save_rng_state": ("self", "output_dir"),
    # Called on all ranks with what a step or an evaluation gives; on the main one it prints `num_completions_to_print`
    # of the completions in `_logs`, none for 0, and hands a table of them to wandb and trackio. It adds `_metrics[mode]` to
    # `logs` (as `eval_{name}` in evaluation), has transformers log that, and comes to completions after it.
    "log": ("self", "logs", "start_time"),
    # Which parameters AdamW has decay.
    "get_decay_parameter_names": ("self", "model"),
    # Called once when a run resumes, before the first micro-batch; the trainer's state is there by then.
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    # Load the weights of a folder by name into `self.model`, and hand what did not fit to the third.
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_load_best_model": ("self",),
    "_issue_warnings_after_load": ("self", "load_result"),
    # Called for the data loader of a run, before that. Its `RepeatSampler` draws a permutation of `num_samples` from its
    # `generator` whenever it is iterated over, which is once in an epoch.
    "_get_train_sampler": ("self", "dataset"),
    # Called with keywords for each epoch that is left, and ends after a step in which `control` says so.
    "_run_epoch": None,
    # Called on all ranks at the end of every step, and of an epoch, when all callbacks have been asked.
    "_maybe_log_save_evaluate": None,
    # Called on all ranks, for each of several sets by itself; what it gives to `log` is what it returns.
    "evaluate": ("self", "eval_dataset", "ignore_keys", "metric_key_prefix"),
    # The two that upload `output_dir`, both with transformers' `hf_api().upload_folder`.
    "push_to_hub": None,
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
}

# What TRL adds to a checkpoint with `use_adaptive_entropy`: `entropy_coef` and `_last_world_entropy`, which it reads before
# `_load_optimizer_and_scheduler` is over.
ENTROPY_STATE_NAME = "entropy_ctrl_state.json"

# Attributes of a constructed `GRPOTrainer` that are read or set.
ATTRIBUTES = (
    "_buffered_inputs",
    "_current_train_step_time",
    "_entropy_bonus_enabled",
    "_get_output_dir",
    "_is_vlm",
    "_last_world_entropy",
    "_logs",
    "_metrics",
    "_pending_extra_logs",
    "_pending_metrics",
    "_step",
    "_tokenize_prompts",
    "_tokenizer",
    "aux_loss_enabled",
    "chat_template",
    "chat_template_kwargs",
    "entropy_coef",
    "environment_factories",
    "eos_token_ids",
    "generation_config",
    "generation_kwargs",
    "importance_sampling_level",
    "log_completions",
    "log_multimodal",
    "log_unique_prompts",
    "num_completions_to_print",
    "num_generations",
    "num_generations_eval",
    "loss_type",
    "num_iterations",
    "pad_to_multiple_of",
    "reward_func_names",
    "reward_funcs",
    "reward_processing_classes",
    "reward_weights",
    "rollout_func",
    "tools",
    "top_entropy_quantile",
    "use_adaptive_entropy",
    "use_vllm",
)

# What transformers says of a model's class, on the way to whether its attention can be exchanged.
MODEL_ATTRIBUTES = ("_supports_attention_backend", "_is_stateful")

# Losses that are a mean over the rows of a micro-batch, divided by the number of micro-batches; and losses that are a
# sum over tokens, with the same divisor for all micro-batches. The remaining one, "bnpo", is the mean over the tokens of
# a micro-batch, so that its gradient depends on which rows share one.
ROW_MEAN_LOSSES = ("grpo", "sapo", "dr_grpo", "luspo")
TOKEN_SUM_LOSSES = ("dapo", "cispo", "vespo")

# Vision inputs that travel with a rollout and that `_get_per_token_logps_and_entropies` takes as keywords.
MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# Metrics that TRL appends to `trainer._metrics[mode]` once for every generation batch, and that describe rewards.
# `trainer._logs["rewards"][name]` and `trainer._logs["advantages"]` have one entry for each completion of all ranks, and
# `trainer._logs["images"]` a list where the batch has images (`num_images` in the rollout) and `log_multimodal` is set. They
# hold the newest `generation_batch_size` completions; `trainer._logs["extra"]` has the columns that rewards add.
REWARD_METRICS = ("reward", "reward_std", "frac_reward_zero_std")


# What TRL passes to every reward function, beside the columns of the data.
REWARD_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)

# Metrics that `_compute_loss` appends once for every micro-batch and that average over its rows. All others average over
# its tokens (those of clipping over rows where the importance ratio is one for a row), and are sums over ranks divided by
# sums over ranks; names that end in `min` or `max` are extremes.
ROW_METRICS = ("vespo/phi_seq_mean",)


@contextmanager
def real_tokens_in_lm_head(device: torch.device) -> Iterator[None]:
    """
    Have TRL's fused LM head project the scored positions alone, on CPUs too.

    TRL does so where Triton runs; elsewhere it projects prompts and padding as well, to spare compilers new shapes. On a
    CPU nothing is compiled, and the head is most of a small model.
    """
    asks = trl.trainer.utils._use_triton
    if device.type == "cpu":
        trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = asks


# Per-token fields of TRL's fused LM head, each `(N,)` or None: log-probs, entropies, and three more.
HeadFields = tuple[torch.Tensor | None, ...]


@dataclass
class HeadCall:
    """What TRL's fused LM head gets from a forward pass at the `N` positions that it scores, row after row."""

    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    ids: torch.Tensor  # (N,)
    temperature: float
    softcap: float | None
    scale: float
    compute: Callable[[], HeadFields]  # what TRL would do with it


@contextmanager
def lm_head_read_by(reader: Callable[[HeadCall], HeadFields]) -> Iterator[None]:
    """
    Have TRL's fused LM head hand hidden states and weights to `reader`, which says what the head returns.

    The head projects the scored positions alone, on all devices. Nothing else of the forward pass changes: weights are
    gathered as TRL does, and gradients flow through what `reader` returns.
    """
    original, asks = trl.trainer.utils._ChunkedLogProbFunction, trl.trainer.utils._use_triton

    def apply(hidden, weight, bias, ids, temperature, chunk_size, softcap, scale, outputs):
        def compute():
            arguments = (hidden, weight, bias, ids, temperature, chunk_size, softcap, scale, outputs)
            return original.apply(*arguments)

        return reader(HeadCall(hidden, weight, bias, ids, temperature, softcap, scale, compute))

    trl.trainer.utils._ChunkedLogProbFunction = SimpleNamespace(apply=apply)
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._ChunkedLogProbFunction, trl.trainer.utils._use_triton = original, asks


@contextmanager
def before_engine_step(engine: Any, act: Callable[[], None]) -> Iterator[None]:
    """Have `act` called before each `step` of a DeepSpeed engine, which accelerate makes within its `backward`."""
    step = engine.step

    def step_after(*args, **kwargs):
        act()
        return step(*args, **kwargs)

    engine.step = step_after
    try:
        yield
    finally:
        del engine.step


@contextmanager
def without_advice_on_levels() -> Iterator[None]:
    """
    Keep back what TRL says about `importance_sampling_level` while it constructs a trainer for some losses.

    It knows no "sequence_token" and advises "sequence", which is refused here, for "luspo", and "token", which makes no
    difference, for "vespo". What is to be said about them, `warn_on_level` says.
    """
    logger = logging.getLogger("trl.trainer.grpo_trainer")

    def is_other(record: logging.LogRecord) -> bool:
        return "`importance_sampling_level` should be set" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


class _Uploads:
    """The hub's client of transformers, whose uploads of folders leave out more than they are told to."""

    def __init__(self, client: Any, patterns: list[str]):
        self.client, self.patterns = client, patterns

    def __getattr__(self, name):
        return getattr(self.client, name)

    def upload_folder(self, *, ignore_patterns: list[str] | None = None, **kwargs):
        return self.client.upload_folder(ignore_patterns=[*(ignore_patterns or ()), *self.patterns], **kwargs)


@contextmanager
def uploads_without(patterns: list[str]) -> Iterator[None]:
    """Have transformers' trainer leave out these paths where it uploads `output_dir`; it takes no patterns itself."""
    get_client = transformers.trainer.hf_api
    transformers.trainer.hf_api = lambda: _Uploads(get_client(), patterns)
    try:
        yield
    finally:
        transformers.trainer.hf_api = get_client
