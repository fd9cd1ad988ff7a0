"""Mistakes in how a run is launched, found before any model is loaded."""

import os

from transformers import TrainingArguments


def check_launch(args: TrainingArguments) -> None:
    """
    Raise `ValueError` where the launcher's settings and the training arguments contradict each other.

    Called at the end of `GNDPOConfig.__post_init__`. What transformers and TRL refuse there themselves (a world size
    that does not divide the generation batch, say) is left to them.
    """
    launcher_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    # "no" is also what accelerate passes on when nothing was asked for; the training arguments then decide alone.
    if launcher_precision not in ("no", precision):
        raise ValueError(
            f"Accelerate was launched with `mixed_precision: {launcher_precision}`, but the training arguments say "
            f"`bf16={args.bf16}` and `fp16={args.fp16}`. Make them agree, or leave it to the training arguments with "
            "`mixed_precision: 'no'`."
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
        if accumulation.isdigit() and int(accumulation) != args.gradient_accumulation_steps:
            raise ValueError(
                f"Accelerate was launched with `gradient_accumulation_steps: {accumulation}`, but the training "
                f"arguments say `gradient_accumulation_steps={args.gradient_accumulation_steps}`. Write `auto` in the "
                "accelerate configuration, so that the training arguments decide."
            )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and args.distributed_state.distributed_type == "MULTI_CPU":
        raise ValueError(
            "FSDP was asked for on CPUs, where accelerate silently runs plain data parallelism instead and every "
            "process holds the whole of both models. Use DeepSpeed ZeRO-3 (recipes/accelerate/cpu/zero3.yaml)."
        )


def check_ddp_backend(args: TrainingArguments) -> None:
    """Raise `ValueError` if `ddp_backend` is set in a process that no launcher started: it has no group to join."""
    if args.ddp_backend is not None and "WORLD_SIZE" not in os.environ and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"`ddp_backend` is {args.ddp_backend!r}, but this is a single process without a process group. Unset it, "
            "or start the script with `accelerate launch` or `torchrun`."
        )


def check_final_save(args: TrainingArguments) -> None:
    """Raise `ValueError` if saving would leave nothing that `from_pretrained` can load: shards, or no weights at all."""
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        if not plugin.deepspeed_config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "Under ZeRO-3, models are saved as shards that `from_pretrained` cannot load unless "
                "`zero3_save_16bit_model: true` is set in the accelerate configuration "
                "(`stage3_gather_16bit_weights_on_model_save` in a DeepSpeed file). Set it."
            )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state_dict_type = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
        if state_dict_type != "FULL_STATE_DICT":
            raise ValueError(
                f"Under FSDP with `fsdp_state_dict_type: {state_dict_type}`, transformers saves no model at the end of "
                "a run. Set `fsdp_state_dict_type: FULL_STATE_DICT` in the accelerate configuration."
            )
