"""Everything in TRL that this package relies on and that TRL does not promise to keep, in one place.

`tests/test_trl_hooks.py` checks each of them against the installed TRL and says which one changed.
"""

from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id, nanstd


__all__ = [
    "ATTRIBUTES",
    "MULTIMODAL_KEYS",
    "OVERRIDDEN_METHODS",
    "REWARD_METRICS",
    "add_fused_lm_head",
    "create_model_from_path",
    "disable_gradient_checkpointing",
    "get_config_model_id",
    "nanstd",
    "prepare_deepspeed",
    "prepare_fsdp",
]

# Methods of `GRPOTrainer` that `GNDPOTrainer` overrides, calling `super()`.
OVERRIDDEN_METHODS = {
    # Its result is the batch that TRL shuffles, splits and hands to the loss; the advantages in it may be (B, T).
    "_generate_and_score_completions": ("self", "inputs"),
    # Reads `old_per_token_logps` from `inputs` only after the forward pass.
    "_compute_loss": ("self", "model", "inputs"),
    # Scores completions through the fused LM head; the one place where the loss computes log-probs.
    "_get_per_token_logps_and_entropies": None,
    # Writes a checkpoint; the generation batch in progress, `_buffered_inputs` at `_step`, is not part of it.
    "_save_checkpoint": ("self", "model", "trial"),
    # Called once when a run resumes, before the first micro-batch.
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
}

# Attributes of a constructed `GRPOTrainer` that are read or set.
ATTRIBUTES = (
    "_buffered_inputs",
    "_logs",
    "_metrics",
    "_step",
    "_tokenizer",
    "eos_token_ids",
    "generation_config",
    "generation_kwargs",
    "importance_sampling_level",
    "num_generations",
    "num_generations_eval",
    "num_iterations",
    "reward_funcs",
    "use_vllm",
)

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
# `trainer._logs["rewards"][name]` and `trainer._logs["advantages"]` have one entry for each completion of all ranks.
REWARD_METRICS = ("reward", "reward_std", "frac_reward_zero_std")
