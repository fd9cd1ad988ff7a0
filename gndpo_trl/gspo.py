"""GSPO with verifiable rewards, the paper's baseline without a teacher: TRL's `GRPOTrainer` with its settings."""

from dataclasses import dataclass, field

from transformers.trainer_utils import SchedulerType

from .grpo.config import ExtendedGRPOConfig
from .grpo.loss_seam import LossSeamMixin
from .grpo.trainer import ExtendedGRPOTrainer
from .grpo.vllm import SamplerWatch


@dataclass
class GSPOConfig(ExtendedGRPOConfig):
    r"""
    Configuration class for the [`GSPOTrainer`].

    This class includes the parameters of [`~trl.GRPOConfig`] whose default value differs; they are those of the paper's
    code, as are `beta=0.0`, `epsilon=0.2`, `learning_rate=1e-6` and `max_grad_norm=1.0`, which TRL shares.

    Parameters:
        eval_temperature (`float`, *optional*):
            Temperature for sampling during evaluation. `None` uses `temperature`, as TRL does. `0.0` is greedy
            decoding, with one completion per prompt (`num_generations_eval=1`). Log-probs are computed at `temperature`
            all the same, so `eval_reverse_kl` then estimates no divergence.
        scoring_token_budget (`int`, *optional*):
            Most tokens, padding included, in a forward pass that scores completions (of the teacher, the student and
            the reference model). Completions of similar length share a forward pass; one that is longer than the
            budget gets its own. If `None`, as many forward passes are made as there are micro-batches in the loss, of
            the same size.
        sampling_logp_threshold (`float`, *optional*):
            Largest mean difference, in nats, between vLLM's log-probs of the sampled tokens and those of the training
            engine. A run whose first batch exceeds it stops, or whose first batch of new weights. `None` is 0.05 if both
            compute in float32, and 0.2 otherwise. `inf` never stops a run; the difference is logged all the same.
        share_prompts (`bool`, *optional*):
            Whether a forward pass computes a prompt, with its images, once for all of its completions. `None` does so
            where the model is found to compute the same and at least a quarter of the tokens is saved; the log names the
            models that keep separate rows, and why. `True` raises an error instead. `False` keeps separate rows.
        log_completions_steps (`int`, *optional*):
            Number of optimizer steps between two logs of completions, with `log_completions`: in the terminal, in files
            and in wandb. The first log at or after each multiple of it has them. `None` spreads 100 over the run; 1 logs
            them with every log. The very first log and the last step have them in any case.
        mask_repeating_completions (`bool`, *optional*, defaults to `False`):
            Whether completions that end in a loop, of at most 64 tokens at least four times, are left out of the loss and of
            all statistics. `completions/repeating_ratio` counts them in any case.
        max_skipped_steps (`int`, *optional*, defaults to `5`):
            Steps in a row whose loss or gradient is not finite, after which the run ends with a checkpoint. Such a step
            changes no weight.
        fetch_image_urls (`bool`, *optional*, defaults to `False`):
            Whether images that the data give as http(s) URLs are fetched, by every rank in every step that has them, for
            30 seconds and 32 MiB at most. By default they are refused.
        sampling_lead (`int`, *optional*, defaults to `0`):
            Generation batches that are sampled ahead while the student learns, with `vllm_mode="server"` or a `rollout_func`
            that has the attribute `samples_ahead = True`. At 1 sampling and learning go on at the same time, and a batch is
            sampled with the weights of one optimizer step ago; more would be older.
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


class GSPOTrainer(LossSeamMixin, ExtendedGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] for the comparison with [`GNDPOTrainer`], on the same floors: forward passes over real tokens,
    checkpoints that a run goes on from exactly, the same validation, the same checks of the data.

    All arguments are those of [`~trl.GRPOTrainer`]; `args` is a [`GSPOConfig`].
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.surrogate = SamplerWatch(self._watch_sampling_logps)
