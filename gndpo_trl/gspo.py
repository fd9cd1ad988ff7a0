"""GSPO with verifiable rewards, the paper's baseline without a teacher: TRL's `GRPOTrainer` with its settings."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import SchedulerType
from trl import GRPOTrainer

from .eval_temperature import EvalTemperatureConfig, EvalTemperatureMixin
from .grpo.vllm import LossWatchMixin, VLLMConfig
from .launch import check_ddp_backend, check_launch
from .trainer import check_images_are_read, keep_checkpoint_names


@dataclass
class GSPOConfig(EvalTemperatureConfig, VLLMConfig):
    r"""
    Configuration class for the [`GSPOTrainer`].

    This class includes the parameters of [`~trl.GRPOConfig`] whose default value differs; they are those of the paper's
    code, as are `beta=0.0`, `epsilon=0.2`, `learning_rate=1e-6` and `max_grad_norm=1.0`, which TRL shares.

    Parameters:
        eval_temperature (`float`, *optional*):
            Temperature for sampling during evaluation. `None` uses `temperature`, as TRL does. `0.0` is greedy
            decoding, with one completion per prompt (`num_generations_eval=1`). Log-probs are computed at `temperature`
            all the same, so `eval_reverse_kl` then estimates no divergence.
        sampling_logp_threshold (`float`, *optional*):
            Largest mean difference, in nats, between vLLM's log-probs of the sampled tokens and those of the training
            engine. A run whose first batch exceeds it stops. `None` is 0.05 if both compute in float32, and 0.2
            otherwise. `inf` never stops a run; the difference is logged all the same.
        importance_sampling_level (`str`, *optional*, defaults to `"sequence"`):
            Level of the importance ratio. `"sequence"` is GSPO, `"token"` is GRPO.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            Loss formulation, see [`~trl.GRPOConfig`]. `"grpo"` is the mean over completions of the mean over their
            tokens.
        vllm_importance_sampling_correction (`bool`, *optional*, defaults to `False`):
            Whether to correct for the mismatch between vLLM's log-probs and those of the training engine.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning rate schedule, see [`~transformers.TrainingArguments`].
        weight_decay (`float`, *optional*, defaults to `0.01`):
            Weight decay of AdamW, see [`~transformers.TrainingArguments`].
    """

    importance_sampling_level: str = field(
        default="sequence",
        metadata={"help": 'Level of the importance ratio. `"sequence"` is GSPO, `"token"` is GRPO.'},
    )
    loss_type: str = field(
        default="grpo",
        metadata={
            "help": 'Loss formulation, see [`~trl.GRPOConfig`]. `"grpo"` is the mean over completions of the mean '
            "over their tokens."
        },
    )
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Whether to correct for the mismatch between vLLM's log-probs and those of the training engine."
        },
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="constant",
        metadata={"help": "Learning rate schedule, see [`~transformers.TrainingArguments`]."},
    )
    weight_decay: float = field(
        default=0.01,
        metadata={"help": "Weight decay of AdamW, see [`~transformers.TrainingArguments`]."},
    )

    def __post_init__(self):
        check_ddp_backend(self)
        super().__post_init__()
        check_launch(self)


class GSPOTrainer(EvalTemperatureMixin, LossWatchMixin, GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] for the comparison with [`GNDPOTrainer`]: the same validation, the same checks of the data, and
    checkpoints under the same names.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model to train, as in [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc | list[RewardFunc]`):
            Rewards to train for, as in [`~trl.GRPOTrainer`].
        args ([`GSPOConfig`]):
            Configuration for this trainer.

        All other arguments, which are keywords here, are those of [`~trl.GRPOTrainer`].
    """

    def __init__(self, model: str | PreTrainedModel, reward_funcs: Any, args: GSPOConfig, **kwargs):
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        check_images_are_read(self)
        keep_checkpoint_names(self.model)
