"""Adapters of PEFT that learn prompts, and which of them can be trained here."""

from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from transformers import TrainingArguments


# Reach the layers as a cache, which layers drop in training where they are checkpointed.
IN_THE_CACHE = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


def check_learned_prompts(args: TrainingArguments | None, model: Any, peft_config: PeftConfig | None) -> None:
    """Raise `ValueError` if the student's adapter learns a prompt in a way that its forward passes here cannot go."""
    field = "peft_config"
    if peft_config is None and isinstance(model, PeftModel):
        field, peft_config = "model", model.active_peft_config
    if peft_config is None or not peft_config.is_prompt_learning:
        return
    reason, remedy = None, "Take PromptTuningConfig or LoraConfig."
    if peft_config.peft_type in IN_THE_CACHE and getattr(args, "gradient_checkpointing", True):
        reason = "its keys and values are in a cache, which `gradient_checkpointing` has the layers drop"
        remedy = "Set `gradient_checkpointing: false`, or take PromptTuningConfig or LoraConfig."
    if peft_config.peft_type == PeftType.MULTITASK_PROMPT_TUNING:
        reason = "it needs `task_ids` in every call of the model, and TRL passes none"
    if peft_config.peft_type == PeftType.CPT:
        reason = "it makes a loss of its own of logits, and the fused LM head of TRL returns none"
    if reason is not None:
        raise ValueError(f"`{field}` has a {type(peft_config).__name__}, which cannot be trained: {reason}. {remedy}")
