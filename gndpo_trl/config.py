import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import SchedulerType
from trl import GRPOConfig

from .grpo.config import ExtendedGRPOConfig
from .objective.advantages import ADVANTAGE_NORMALIZATIONS


# What `teacher_weights` may be; the docstring says what each means.
TEACHER_WEIGHTS = ("initial", "ema", "periodic", "live")
SCORE_BASELINES = ("expected",)
ESTIMATORS = ("sampled", "exact")

# Losses that go on from a sum over tokens with advantages of both signs. "sapo" and "vespo" treat the signs differently.
LOSSES_OF_EXPECTATIONS = ("grpo", "dapo", "dr_grpo", "bnpo", "luspo", "cispo")


class _SingleGeneration(int):
    """The number 1, but not smaller than 2: passes TRL's check for groups, and no other check, unseen."""

    def __lt__(self, other):
        return other != 2 and int(self) < other


def check_loss_and_level(loss_type: str, level: str) -> None:
    """
    Warn where the level of the importance ratio, "sequence_token" or "token", is not the one that a loss is made for.

    "luspo" is made for the ratio of the sequence, which is "sequence_token" here. "vespo" forms a ratio of its own, the
    same at both levels. All other losses are made for either.
    """
    if loss_type == "luspo" and level == "token":
        warnings.warn(
            '`importance_sampling_level` is "token", but `loss_type` is "luspo", which is made for one ratio per '
            'completion: with ratios per token it is the sum of GRPO\'s token losses. Set "sequence_token".',
            stacklevel=2,
        )


@dataclass
class GNDPOConfig(ExtendedGRPOConfig):
    r"""
    Configuration class for the [`GNDPOTrainer`].

    This class includes the parameters that are specific to GNDPO, and those of [`~trl.GRPOConfig`] whose default value
    or meaning differs. For a full list please refer to the [`~trl.GRPOConfig`] and
    [`~transformers.TrainingArguments`] documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the teacher

        teacher_model_name_or_path (`str`, *optional*):
            Model id on the Hub or path of the teacher, or `"self"`: the student teaches itself, from the column
            `teacher_prompt` of the data. Leave it unset if `teacher_model` is passed to the trainer. With
            `teacher_server_url`, only its tokenizer is loaded, to be compared with the student's.
        teacher_model_revision (`str`, *optional*):
            Revision of the teacher on the Hub: a branch, a tag or a commit. Also used for its processing class.
        teacher_model_init_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` when the teacher is loaded from a path or a model id. If `dtype` is
            not among them, the teacher keeps the dtype of its checkpoint.
        teacher_offload (`bool`, *optional*, defaults to `False`):
            Whether to keep the teacher's weights in CPU memory (pinned, on CUDA), and on the device only while it
            scores. Not for ZeRO-3 and FSDP, which have an offloading of their own, nor for quantized teachers.
        teacher_server_url (`str` or `list[str]`, *optional*):
            Base URL of a `vllm serve` that runs the teacher, as `http://host:8000`, or of several that run the same one
            and share the work. No weights of it are loaded then.
        teacher_server_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds after which a request to the teacher's servers has failed, tries included. The run then ends with a
            checkpoint.
        teacher_chat_template_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for the chat template where it renders the column `teacher_prompt`, over those of
            `chat_template_kwargs`. The answer has to begin at the same point of the template for both.
        teacher_weights (`str`, *optional*, defaults to `"initial"`):
            Weights of a teacher that is the student itself. `"initial"`: those that training starts from, in a model of
            their own, or for a PEFT student those under its adapters, without a second copy. `"ema"`: the exponential
            moving average of the student's. `"periodic"`: a copy of them from time to time. `"live"`: those in training.
        teacher_ema_decay (`float`, *optional*, defaults to `0.999`):
            Share of the average that every optimizer step leaves, for `teacher_weights="ema"`.
        teacher_sync_steps (`int`, *optional*, defaults to `50`):
            Number of optimizer steps between two copies, for `teacher_weights="periodic"`.

        > Parameters that control the evaluation

        eval_temperature (`float`, *optional*):
            Temperature for sampling during evaluation. `None` uses `temperature`, as TRL does. `0.0` is greedy
            decoding, with one completion per prompt (`num_generations_eval=1`). Log-probs are computed at `temperature`
            all the same, so `eval_reverse_kl` then estimates no divergence.

        > Parameters that control scoring

        scoring_token_budget (`int`, *optional*):
            Most tokens, padding included, in a forward pass that scores completions (of the teacher, the student and
            the reference model). Completions of similar length share a forward pass; one that is longer than the
            budget gets its own. If `None`, as many forward passes are made as there are micro-batches in the loss, of
            the same size.
        share_prompts (`bool`, *optional*):
            Whether a forward pass computes a prompt, with its images, once for all of its completions. `None` does so
            where the model is found to compute the same and at least a quarter of the tokens is saved; the log names the
            models that keep separate rows, and why. `True` raises an error instead. `False` keeps separate rows.
        use_sampling_logps (`bool`, *optional*, defaults to `False`):
            Whether to save the student's scoring pass by normalizing with the mean and standard deviation of scores
            that are computed from the sampler's log-probs (vLLM). Each token's score still uses the log-prob of the
            training forward pass. Deviates from the paper, whose statistics are of the training engine too. Needs one
            optimizer step per generation batch.

        > Parameters that control vLLM

        sampling_logp_threshold (`float`, *optional*):
            Largest mean difference, in nats, between vLLM's log-probs of the sampled tokens and those of the training
            engine. A run whose first batch exceeds it stops. `None` is 0.05 if both compute in float32, and 0.2
            otherwise. `inf` never stops a run; the difference is logged all the same.

        > Parameters that control the advantage

        score_clip (`float`, *optional*, defaults to `5.0`):
            Bound c, in nats, of the clamp of the scores (teacher log-prob minus student log-prob) to [-c, c] before
            they are normalized. `None` turns the clamp off.
        advantage_normalization (`str`, *optional*, defaults to `"global"`):
            Population over which the clamped scores are whitened. `"global"`: all valid tokens of the generation
            batch, on all ranks and in all accumulation steps (GNDPO). `"none"`: no whitening, the clamped scores are
            the advantages (on-policy distillation). `"group"`: the tokens of the completions of the same prompt.
            `"sequence"`: the tokens of the same completion. `"teacher"`: the tokens that the same one of several
            teachers scored, since teachers differ in scale.
        std_floor (`float`, *optional*, defaults to `0.0`):
            Lower bound, in nats, of the standard deviation that the scores are divided by. A positive value keeps
            rounding noise from being blown up to unit variance once the student has become its teacher.
        extrapolation (`float`, *optional*, defaults to `1.0`):
            Weight λ of the teacher's lead over the student before training, in the scores of G-OPD:
            `λ (log π_teacher - log π_ref) - (log π_student - log π_ref)`. 1 is the plain score, which needs no reference;
            above 1 the student is led beyond its teacher. The reference is TRL's with `beta`, else a copy of the student
            or, for a PEFT student, what lies under its adapters.
        score_power (`float`, *optional*, defaults to `0.0`):
            Exponent α of PowerOPD: what is whitened is the difference `π_teacher^α - π_student^α` of the sampled token's
            probabilities, which needs no clamp (`score_clip=None`), and which PowerOPD does not whiten
            (`advantage_normalization="none"`). 0 is the paper: the difference of log-probs. Metrics of scores stay in
            nats.
        score_discount (`float`, *optional*, defaults to `0.0`):
            Discount γ of the clamped scores of later tokens, which are added to those of a token before they are
            normalized. 0 is the paper: each token for itself. 1 adds up all that follow.
        distillation_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the teacher's advantages beside those of the rewards.
        reward_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the advantages that GRPO makes of the rewards, the same for all tokens of a completion. At 0 the
            rewards are only logged.

        score_baseline (`str`, *optional*):
            What is subtracted from a clamped score before it is normalized. `"expected"`: the expected clamped score of
            its position, over the student's distribution; the normalization then divides by the standard deviation and
            subtracts no mean. The expected gradient stays the same, with less noise. `None` (the paper): nothing.
        estimator (`str`, *optional*, defaults to `"sampled"`):
            What the gradient of a position looks at. `"sampled"` (the paper): the advantage of the sampled token.
            `"exact"`: the expected advantage over the whole vocabulary, the sum over all tokens of probability times
            advantage times gradient of the log-prob, normalized by the moments of the student's distributions. Needs
            `importance_sampling_level="sequence_token"` and a teacher in the same process, as does `score_baseline`.

        > Parameters that control the loss

        importance_sampling_level (`str`, *optional*, defaults to `"sequence_token"`):
            Level of the importance ratio. `"sequence_token"`: the value of the sequence-level ratio with a gradient
            for every token (GSPO-token). `"token"`: one ratio per token. `"sequence"` is refused, because its gradient
            is the same for all tokens of a completion, which erases what the teacher says about each of them.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            Loss formulation, see [`~trl.GRPOConfig`]. `"grpo"` is the mean over completions of the mean over their
            tokens. Each goes with both levels of the importance ratio, but `"luspo"` is made for `"sequence_token"`,
            and `"vespo"` forms a ratio of its own, the same at both.
        beta (`float`, *optional*, defaults to `0.0`):
            Coefficient of the KL divergence to the initial student (not to the teacher). If `0.0`, the reference model
            is not loaded.
        epsilon (`float`, *optional*, defaults to `0.2`):
            Epsilon value for clipping the importance ratio.
        vllm_importance_sampling_correction (`bool`, *optional*, defaults to `False`):
            Whether to correct for the mismatch between vLLM's log-probs and those of the training engine. Completions
            or tokens that it drops from the loss are left out of the normalization as well.

        > Parameters that control the optimizer

        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning rate schedule, see [`~transformers.TrainingArguments`].
        weight_decay (`float`, *optional*, defaults to `0.01`):
            Weight decay of AdamW, see [`~transformers.TrainingArguments`].

    `num_generations=1` is allowed, unlike in [`~trl.GRPOConfig`]: distillation compares no completions of a group. The
    student is scored at the sampling `temperature`, the teacher always at temperature 1.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]; they are those of the paper's code:
    > - `importance_sampling_level`: Defaults to `"sequence_token"` instead of `"token"`.
    > - `loss_type`: Defaults to `"grpo"` instead of `"dapo"`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `weight_decay`: Defaults to `0.01` instead of `0.0`.
    > - `vllm_importance_sampling_correction`: Defaults to `False` instead of `True`.
    >
    > These keep the value they have there, which is that of the paper's code too: `beta=0.0`, `epsilon=0.2`,
    > `learning_rate=1e-6`, `max_grad_norm=1.0`, `temperature=1.0`, `top_p=1.0`.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs", "teacher_chat_template_kwargs"]

    # Parameters that control the teacher
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": 'Model id on the Hub or path of the teacher, or `"self"`: the student teaches itself, from the '
            "column `teacher_prompt` of the data. Leave it unset if `teacher_model` is passed to the trainer. With "
            "`teacher_server_url`, only its tokenizer is loaded, to be compared with the student's."
        },
    )
    teacher_model_revision: str | None = field(
        default=None,
        metadata={
            "help": "Revision of the teacher on the Hub: a branch, a tag or a commit. Also used for its processing "
            "class."
        },
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `from_pretrained` when the teacher is loaded from a path or a model id. If "
            "`dtype` is not among them, the teacher keeps the dtype of its checkpoint."
        },
    )

    teacher_offload: bool = field(
        default=False,
        metadata={
            "help": "Whether to keep the teacher's weights in CPU memory (pinned, on CUDA), and on the device only "
            "while it scores. Not for ZeRO-3 and FSDP, which have an offloading of their own, nor for quantized "
            "teachers."
        },
    )
    teacher_server_url: list[str] | None = field(
        default=None,
        metadata={
            "help": "Base URL of a `vllm serve` that runs the teacher, as `http://host:8000`, or of several that run "
            "the same one and share the work. No weights of it are loaded then."
        },
    )
    teacher_server_timeout: float = field(
        default=600.0,
        metadata={
            "help": "Seconds after which a request to the teacher's servers has failed, tries included. The run then "
            "ends with a checkpoint."
        },
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for the chat template where it renders the column `teacher_prompt`, over those "
            "of `chat_template_kwargs`. The answer has to begin at the same point of the template for both."
        },
    )
    teacher_weights: str = field(
        default="initial",
        metadata={
            "help": 'Weights of a teacher that is the student itself. `"initial"`: those that training starts from, in '
            "a model of their own, or for a PEFT student those under its adapters, without a second copy. "
            '`"ema"`: the exponential moving average of the student\'s. `"periodic"`: a copy of them from time to '
            'time. `"live"`: those in training.',
            "choices": list(TEACHER_WEIGHTS),
        },
    )
    teacher_ema_decay: float = field(
        default=0.999,
        metadata={
            "help": 'Share of the average that every optimizer step leaves, for `teacher_weights="ema"`.',
        },
    )
    teacher_sync_steps: int = field(
        default=50,
        metadata={"help": 'Number of optimizer steps between two copies, for `teacher_weights="periodic"`.'},
    )

    # Parameters that control scoring
    use_sampling_logps: bool = field(
        default=False,
        metadata={
            "help": "Whether to save the student's scoring pass by normalizing with the mean and standard deviation "
            "of scores that are computed from the sampler's log-probs (vLLM). Each token's score still uses the "
            "log-prob of the training forward pass. Deviates from the paper, whose statistics are of the training "
            "engine too. Needs one optimizer step per generation batch."
        },
    )

    # Parameters that control the advantage
    score_clip: float | None = field(
        default=5.0,
        metadata={
            "help": "Bound c, in nats, of the clamp of the scores (teacher log-prob minus student log-prob) to "
            "[-c, c] before they are normalized. `None` turns the clamp off."
        },
    )
    advantage_normalization: str = field(
        default="global",
        metadata={
            "help": 'Population over which the clamped scores are whitened. `"global"`: all valid tokens of the '
            'generation batch, on all ranks and in all accumulation steps (GNDPO). `"none"`: no whitening, the '
            'clamped scores are the advantages (on-policy distillation). `"group"`: the tokens of the completions '
            'of the same prompt. `"sequence"`: the tokens of the same completion. `"teacher"`: the tokens that the '
            "same one of several teachers scored, since teachers differ in scale.",
            "choices": list(ADVANTAGE_NORMALIZATIONS),
        },
    )
    std_floor: float = field(
        default=0.0,
        metadata={
            "help": "Lower bound, in nats, of the standard deviation that the scores are divided by. A positive value "
            "keeps rounding noise from being blown up to unit variance once the student has become its teacher."
        },
    )
    extrapolation: float = field(
        default=1.0,
        metadata={
            "help": "Weight λ of the teacher's lead over the student before training, in the scores of G-OPD: `λ (log "
            "π_teacher - log π_ref) - (log π_student - log π_ref)`. 1 is the plain score, which needs no reference; above "
            "1 the student is led beyond its teacher. The reference is TRL's with `beta`, else a copy of the student or, "
            "for a PEFT student, what lies under its adapters."
        },
    )
    score_power: float = field(
        default=0.0,
        metadata={
            "help": "Exponent α of PowerOPD: what is whitened is the difference `π_teacher^α - π_student^α` of the sampled "
            "token's probabilities, which needs no clamp (`score_clip=None`), and which PowerOPD does not whiten "
            '(`advantage_normalization="none"`). 0 is the paper: the difference of log-probs. Metrics of scores stay in '
            "nats."
        },
    )
    score_discount: float = field(
        default=0.0,
        metadata={
            "help": "Discount γ of the clamped scores of later tokens, which are added to those of a token before they "
            "are normalized. 0 is the paper: each token for itself. 1 adds up all that follow."
        },
    )
    distillation_coef: float = field(
        default=1.0,
        metadata={"help": "Weight of the teacher's advantages beside those of the rewards."},
    )
    reward_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the advantages that GRPO makes of the rewards, the same for all tokens of a completion. "
            "At 0 the rewards are only logged."
        },
    )

    score_baseline: str | None = field(
        default=None,
        metadata={
            "help": 'What is subtracted from a clamped score before it is normalized. `"expected"`: the expected '
            "clamped score of its position, over the student's distribution; the normalization then divides by the "
            "standard deviation and subtracts no mean. The expected gradient stays the same, with less noise. `None` "
            "(the paper): nothing.",
            "choices": list(SCORE_BASELINES),
        },
    )
    estimator: str = field(
        default="sampled",
        metadata={
            "help": 'What the gradient of a position looks at. `"sampled"` (the paper): the advantage of the sampled '
            'token. `"exact"`: the expected advantage over the whole vocabulary, the sum over all tokens of '
            "probability times advantage times gradient of the log-prob, normalized by the moments of the student's "
            'distributions. Needs `importance_sampling_level="sequence_token"` and a teacher in the same process, as '
            "does `score_baseline`.",
            "choices": list(ESTIMATORS),
        },
    )

    # Parameters that control the loss
    importance_sampling_level: str = field(
        default="sequence_token",
        metadata={
            "help": 'Level of the importance ratio. `"sequence_token"`: the value of the sequence-level ratio with '
            'a gradient for every token (GSPO-token). `"token"`: one ratio per token. `"sequence"` is refused, '
            "because its gradient is the same for all tokens of a completion, which erases what the teacher says "
            "about each of them."
        },
    )
    loss_type: str = field(
        default="grpo",
        metadata={
            "help": 'Loss formulation, see [`~trl.GRPOConfig`]. `"grpo"` is the mean over completions of the mean '
            'over their tokens. Each goes with both levels of the importance ratio, but `"luspo"` is made for '
            '`"sequence_token"`, and `"vespo"` forms a ratio of its own, the same at both.'
        },
    )
    beta: float = field(
        default=0.0,
        metadata={
            "help": "Coefficient of the KL divergence to the initial student (not to the teacher). If `0.0`, the "
            "reference model is not loaded."
        },
    )
    epsilon: float = field(
        default=0.2,
        metadata={"help": "Epsilon value for clipping the importance ratio."},
    )
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Whether to correct for the mismatch between vLLM's log-probs and those of the training engine. "
            "Completions or tokens that it drops from the loss are left out of the normalization as well."
        },
    )

    # Parameters that control the optimizer
    lr_scheduler_type: SchedulerType | str = field(
        default="constant",
        metadata={"help": "Learning rate schedule, see [`~transformers.TrainingArguments`]."},
    )
    weight_decay: float = field(
        default=0.01,
        metadata={"help": "Weight decay of AdamW, see [`~transformers.TrainingArguments`]."},
    )

    def __post_init__(self):
        if self.score_clip is not None and not self.score_clip > 0:
            raise ValueError(
                f"`score_clip` is {self.score_clip}, but it bounds the scores to [-score_clip, score_clip] and must "
                "be positive. Use the reference's 5.0, or None to turn the clamp off."
            )
        if self.advantage_normalization not in ADVANTAGE_NORMALIZATIONS:
            raise ValueError(
                f"`advantage_normalization` is {self.advantage_normalization!r}. Choose one of "
                f"{', '.join(map(repr, ADVANTAGE_NORMALIZATIONS))}."
            )
        if self.teacher_weights not in TEACHER_WEIGHTS:
            raise ValueError(
                f"`teacher_weights` is {self.teacher_weights!r}. Choose one of {', '.join(map(repr, TEACHER_WEIGHTS))}."
            )
        if not 0 <= self.teacher_ema_decay < 1:
            raise ValueError(
                f"`teacher_ema_decay` is {self.teacher_ema_decay}, but it is the share of the average that a step leaves: "
                "give a number from 0 up to, but not including, 1. A teacher that never moves is "
                '`teacher_weights="initial"`.'
            )
        if self.teacher_sync_steps < 1:
            raise ValueError(
                f"`teacher_sync_steps` is {self.teacher_sync_steps}, but it is a number of optimizer steps. Give a "
                'positive one; a teacher that never moves is `teacher_weights="initial"`.'
            )
        check_loss_and_level(self.loss_type, self.importance_sampling_level)
        self._check_expectations()
        if not self.std_floor >= 0:
            raise ValueError(
                f"`std_floor` is {self.std_floor}, but it is a lower bound of a standard deviation. Use 0.0 for the "
                "reference's behaviour, or a positive number of nats."
            )
        if not 0 < self.extrapolation < float("inf"):
            raise ValueError(
                f"`extrapolation` is {self.extrapolation}, but it weighs what the teacher adds to the student's beginning. "
                "Use 1.0 for the plain score, or another positive number."
            )
        self._check_score_power()
        if not 0 <= self.score_discount <= 1:
            raise ValueError(
                f"`score_discount` is {self.score_discount}, but it is the weight of the next token's score. Give a number "
                "from 0, the paper's, to 1."
            )
        for name in ("distillation_coef", "reward_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but it weighs one of two parts of the advantages. Give a number "
                    "from 0 on."
                )
        if self.distillation_coef == self.reward_coef == 0:
            raise ValueError(
                "`distillation_coef` and `reward_coef` are both 0, so that nothing would be learned. Raise one of them."
            )
        if self.reward_coef != 0 and self.num_generations == 1:
            raise ValueError(
                f"`reward_coef` is {self.reward_coef}, but `num_generations` is 1: a reward is compared with those of other "
                "completions of its prompt. Raise `num_generations`, or leave `reward_coef` at 0."
            )
        if self.importance_sampling_level == "sequence":
            raise ValueError(
                '`importance_sampling_level="sequence"` gives every token of a completion the same gradient, so the '
                'token-level advantages of the teacher would be averaged away. Use "sequence_token" (GSPO-token: '
                'the same ratio, a gradient per token) or "token".'
            )
        if self.importance_sampling_level not in ("sequence_token", "token"):
            raise ValueError(
                f'`importance_sampling_level` is {self.importance_sampling_level!r}. Choose "sequence_token" or '
                '"token".'
            )
        if not 0 < self.teacher_server_timeout < self.ddp_timeout:
            raise ValueError(
                f"`teacher_server_timeout` is {self.teacher_server_timeout}, but it must be positive, and shorter than "
                f"`ddp_timeout` ({self.ddp_timeout}), after which ranks stop to wait for one another. Raise the latter "
                "if it takes that long."
            )
        if self.use_sampling_logps and self.vllm_importance_sampling_correction:
            raise ValueError(
                "`use_sampling_logps` saves the student's scoring pass, and `vllm_importance_sampling_correction` needs "
                "it. Switch one of them off."
            )
        # TRL refuses a single generation per prompt because it has no group to compare it with; distillation needs
        # no group. Everything else that TRL checks about `num_generations` still applies.
        single = self.num_generations == 1
        if single:
            self.num_generations = _SingleGeneration(1)
        super().__post_init__()
        if single:
            self.num_generations = 1
        generate_every = self.steps_per_generation * self.num_iterations
        if self.use_sampling_logps and self.gradient_accumulation_steps % generate_every != 0:
            raise ValueError(
                f"`use_sampling_logps` needs one optimizer step per generation batch, but `steps_per_generation` "
                f"({self.steps_per_generation}) × `num_iterations` ({self.num_iterations}) is more than "
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}): later steps have to know the "
                "log-probs of the student that sampled. Switch it off, or raise `gradient_accumulation_steps`."
            )
        if self.generation_batch_size == self.num_generations > 1 and self.advantage_normalization == "global":
            warnings.warn(
                f"A generation batch holds {self.num_generations} completions of a single prompt "
                f"(`generation_batch_size` {self.generation_batch_size}, `num_generations` {self.num_generations}), so "
                'that `advantage_normalization="global"` is the same as "group". For the statistics of many prompts, raise '
                "`gradient_accumulation_steps` or `per_device_train_batch_size`, or lower `num_generations`.",
                stacklevel=2,
            )

    def _check_score_power(self) -> None:
        """Raise `ValueError` where `score_power` is no exponent, or another field is about differences of log-probs."""
        if not 0 <= self.score_power < float("inf"):
            raise ValueError(
                f"`score_power` is {self.score_power}, but it is an exponent of probabilities. Use 0.0 for the paper's "
                "difference of log-probs, or a positive number; 1.0 compares the probabilities themselves."
            )
        if self.score_power != 0 and self.score_clip is not None:
            raise ValueError(
                f"`score_power` is {self.score_power}, so that scores lie between -1 and 1, and `score_clip` "
                f"({self.score_clip}) is a number of nats. Set `score_clip` to None."
            )
        if self.score_power != 0 and self.extrapolation != 1.0:
            raise ValueError(
                f"`score_power` is {self.score_power} and `extrapolation` {self.extrapolation}, but extrapolated are "
                "differences of log-probs. Set `score_power` to 0.0, or `extrapolation` to 1.0."
            )

    def _check_expectations(self) -> None:
        """Raise `ValueError` where `score_baseline` or `estimator` is unknown or does not go with another field."""
        if self.score_baseline not in (None, *SCORE_BASELINES):
            raise ValueError(f"`score_baseline` is {self.score_baseline!r}. Choose None or 'expected'.")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` is {self.estimator!r}. Choose one of {', '.join(map(repr, ESTIMATORS))}.")
        asked = 'score_baseline="expected"' if self.score_baseline is not None else f'estimator="{self.estimator}"'
        if asked != 'estimator="sampled"':
            reasons = {
                "use_sampling_logps": (self.use_sampling_logps, "the sampler says nothing about the other tokens"),
                "torch_compile": (self.torch_compile, "a compiled model does not hand out its hidden states"),
                "extrapolation": (self.extrapolation != 1.0, "the reference's distribution is not looked at"),
                "score_power": (self.score_power != 0, "expectations are of differences of log-probs"),
                "score_discount": (
                    self.score_discount != 0.0,
                    "what follows a token is known of the sampled one only",
                ),
            }
            if self.estimator == "exact":
                asked = 'estimator="exact"'
                reasons |= {
                    "reward_coef": (self.reward_coef != 0, "a reward belongs to the sampled tokens"),
                    "distillation_coef": (self.distillation_coef != 1.0, "there is nothing to weigh it against"),
                    "beta": (self.beta != 0, "the KL divergence to the reference model is that of sampled tokens"),
                    "importance_sampling_level": (
                        self.importance_sampling_level == "token",
                        'the ratio of a token is part of the sum over all tokens; set "sequence_token"',
                    ),
                    "loss_type": (
                        self.loss_type not in LOSSES_OF_EXPECTATIONS,
                        "advantages of both signs meet in a position, which this loss treats differently; choose one of "
                        + ", ".join(map(repr, LOSSES_OF_EXPECTATIONS)),
                    ),
                    "off_policy_mask_threshold": (
                        self.off_policy_mask_threshold is not None,
                        "it looks at the sign of an advantage, and a position has advantages of both signs",
                    ),
                }
            for name, (is_set, reason) in reasons.items():
                if is_set:
                    raise ValueError(
                        f"`{name}` is {getattr(self, name)!r}, which does not go with `{asked}`: {reason}."
                    )
