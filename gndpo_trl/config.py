from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers.trainer_utils import SchedulerType
from trl import GRPOConfig

from .config_checks import (
    ESTIMATORS,
    SCORE_BASELINES,
    TEACHER_ALIGNMENTS,
    TEACHER_WEIGHTS,
    advantage_problems,
    alignment_problems,
    estimator_problems,
    loss_problems,
    sampling_statistics_problems,
    score_problems,
    teacher_problems,
    warn_on_level,
    warn_on_single_prompt,
)
from .grpo.config import ExtendedGRPOConfig
from .objective.advantages import ADVANTAGE_NORMALIZATIONS


class _SingleGeneration(int):
    """The number 1, but not smaller than 2: passes TRL's check for groups, and no other check, unseen."""

    def __lt__(self, other):
        return other != 2 and int(self) < other


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
            not among them, the teacher keeps the dtype of its checkpoint. `trust_remote_code` counts for the teacher only
            here; the field of that name is the student's.
        teacher_offload (`bool`, *optional*, defaults to `False`):
            Whether to keep the teacher's weights in CPU memory (pinned, on CUDA), and on the device only while it
            scores. Not for ZeRO-3 and FSDP, which have an offloading of their own, nor for quantized teachers.
        teacher_server_url (`str` or `list[str]`, *optional*):
            Base URL of a `vllm serve` that runs the teacher, as `http://host:8000`, or of several that run the same one
            and share the work. No weights of it are loaded then. A key is read from the environment variable
            `VLLM_API_KEY`.
        teacher_server_model (`str`, *optional*):
            Name of the teacher on servers that serve several models, as a base and adapters on it. If `None`, they have
            to serve a single one.
        teacher_server_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds after which a request to the teacher's servers has failed, tries included. The run then ends with a
            checkpoint.
        teacher_top_k (`int`, *optional*):
            For `estimator="exact"` and `score_baseline="expected"`: number of the teacher's likeliest tokens that are known
            at each position, beside the sampled one and the mass of the rest. A teacher behind a server needs it, and its
            `--max-logprobs` has to be larger. `None`: all tokens, of teachers in this process.
        teacher_alignment (`str`, *optional*, defaults to `"ids"`):
            How the teacher reads what the student sampled. `"ids"`: token by token, after the student's prompt and images, which
            takes a teacher of the student's model family. `"text"`: as text, with a chat template, image processor and tokenizer
            of its own, compared with the student's tokens in pieces that end alike. For teachers of any family; only for sampled
            tokens.
        teacher_chat_template_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for the chat template where it renders the column `teacher_prompt`, over those of
            `chat_template_kwargs`. The answer has to begin at the same point of the template for both.
        teacher_weights (`str`, *optional*, defaults to `"initial"`):
            Weights of a teacher that is the student itself. `"initial"`: those that training starts from, in a model of
            their own, or for a PEFT student in a copy of what is trained. `"ema"`: the exponential moving average of the
            student's. `"periodic"`: a copy of them from time to time. `"live"`: those in training.
        teacher_ema_decay (`float`, *optional*, defaults to `0.999`):
            Share of the average that every optimizer step leaves, for `teacher_weights="ema"`.
        teacher_sync_steps (`int`, *optional*, defaults to `50`):
            Number of optimizer steps between two copies, for `teacher_weights="periodic"`.

        > Parameters that control the generation batch

        num_generations (`int`, *optional*, defaults to `1`):
            Number of completions per prompt. Distillation compares no completions of a prompt, so that one of each of
            many prompts says most for its tokens. More are needed for `reward_coef`, and share their prompt in forward
            passes.
        stop_at_teacher_eos (`bool`, *optional*, defaults to `True`):
            Whether sampling also stops at the tokens with which the teacher ends its turns, where the student has them and
            would sample on: an instruct teacher leads a base student to say them. The saved student stops there, too.

        > Parameters that control the evaluation

        eval_temperature (`float`, *optional*):
            Temperature for sampling during evaluation. `None` uses `temperature`, as TRL does. `0.0` is greedy
            decoding, with one completion per prompt (`num_generations_eval=1`). Log-probs are computed at `temperature`
            all the same, so `eval_reverse_kl` then estimates no divergence.

        > Parameters that control the logging

        log_completions_steps (`int`, *optional*):
            Number of optimizer steps between two logs of completions, with `log_completions`: in the terminal, in files
            and in wandb. The first log at or after each multiple of it has them. `None` spreads 100 over the run; 1 logs
            them with every log. The very first log and the last step have them in any case.
        num_completions_in_page (`int`, *optional*, defaults to `64`):
            Most completions in a page of the token view: those with the most extreme tokens, and others at random. `None`
            has all of them, as the file beside it does.

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
            sampled with the weights of one optimizer step ago. More go with `estimator="exact"`.
        use_sampling_logps (`bool`, *optional*, defaults to `False`):
            Whether to save the student's scoring pass by normalizing with the mean and standard deviation of scores
            that are computed from the sampler's log-probs (vLLM). Each token's score still uses the log-prob of the
            training forward pass. Deviates from the paper, whose statistics are of the training engine too. Needs one
            optimizer step per generation batch.

        > Parameters that control vLLM

        sampling_logp_threshold (`float`, *optional*):
            Largest mean difference, in nats, between vLLM's log-probs of the sampled tokens and those of the training
            engine. A run whose first batch exceeds it stops, or whose first batch of new weights. `None` is 0.05 if both
            compute in float32, and 0.2 otherwise. `inf` never stops a run; the difference is logged all the same.

        > Parameters that control the advantage

        score_clip (`float`, *optional*, defaults to `5.0`):
            Bound c, in nats, of the clamp of the scores (teacher log-prob minus student log-prob) to [-c, c] before
            they are normalized. `None` turns the clamp off.
        advantage_normalization (`str`, *optional*):
            Population over which the clamped scores are whitened. `None` is `"global"`, or `"none"` with `score_power`.
            `"global"`: all valid tokens of the generation batch, on all ranks and in all accumulation steps (GNDPO).
            `"none"`: no whitening, the clamped scores are the advantages (on-policy distillation). `"group"`: the tokens
            of the completions of the same prompt, level with `"global"` on short answers. `"sequence"`: the tokens of the
            same completion. `"teacher"`: the tokens that the same one of several teachers scored, since teachers differ in
            scale.
        std_floor (`float`, *optional*, defaults to `0.0`):
            Lower bound, in nats, of the standard deviation that the scores are divided by. A positive value keeps
            rounding noise from being blown up to unit variance once the student has become its teacher. It holds SGD
            alone: Adam makes up for the smaller gradient.
        extrapolation (`float`, *optional*, defaults to `1.0`):
            Weight λ of the teacher's lead over the student before training, in the scores of G-OPD:
            `λ (log π_teacher - log π_ref) - (log π_student - log π_ref)`. 1 is the plain score, which needs no reference;
            above 1 the student is led beyond its teacher. The reference is TRL's with `beta`, else a copy of the student
            or, for a PEFT student, what lies under its adapters. On short answers, at a good learning rate, 1.25 and
            1.5 were level with 1.
        score_power (`float`, *optional*, defaults to `0.0`):
            Exponent α of PowerOPD: the score is the difference `π_teacher^α - π_student^α` of the sampled token's
            probabilities. It needs no clamp, so that the default of `score_clip` means none, and PowerOPD does not whiten
            it, so that `advantage_normalization` is `"none"` unless it is set. 0 is the paper: the difference of
            log-probs. Metrics of scores stay in nats.
        score_discount (`float`, *optional*, defaults to `0.0`):
            Discount γ of the clamped scores of later tokens, which are added to those of a token before they are
            normalized. 0 is the paper: each token for itself. 1 adds up all that follow. On short answers 0.9 was
            level with 0 at a good learning rate, and 12 points better at three times that.
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
            `importance_sampling_level="sequence_token"`. Both need a teacher in the same process, or `teacher_top_k`.

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

    `num_generations=1` is allowed, unlike in [`~trl.GRPOConfig`]. The student is scored at the sampling `temperature`, the teacher always at temperature 1.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]; they are those of the paper's code:
    > - `importance_sampling_level`: Defaults to `"sequence_token"` instead of `"token"`.
    > - `loss_type`: Defaults to `"grpo"` instead of `"dapo"`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `weight_decay`: Defaults to `0.01` instead of `0.0`.
    > - `vllm_importance_sampling_correction`: Defaults to `False` instead of `True`.
    >
    > This one is not (it samples 16 completions of each of 32 prompts, which takes 8 GPUs):
    > - `num_generations`: Defaults to `1` instead of `8`, so that a generation batch of one device holds 8 prompts, over
    >   which the method normalizes, and not one.
    >
    > These keep the value they have there, which is that of the paper's code too: `beta=0.0`, `epsilon=0.2`,
    > `learning_rate=1e-6`, `max_grad_norm=1.0`, `temperature=1.0`, `top_p=1.0`.
    """

    _less_is_better: ClassVar[tuple[str, ...]] = (
        *("reverse_kl", "reverse_kl_k3", "teacher/{name}/reverse_kl", "score/clamped_low", "score/clamped_high"),
        *("teacher/unknown_tokens", "advantages/undefined"),
        *ExtendedGRPOConfig._less_is_better,
    )
    _greater_is_better: ClassVar[tuple[str, ...]] = (
        *("score/mean", "teacher/{name}/score/mean", "teacher/mean_logp"),
        *ExtendedGRPOConfig._greater_is_better,
    )

    _also_of: ClassVar[dict[str, tuple[type, ...]]] = {**ExtendedGRPOConfig._also_of, "teacher_server_url": (str,)}

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
            "`dtype` is not among them, the teacher keeps the dtype of its checkpoint. `trust_remote_code` counts for "
            "the teacher only here; the field of that name is the student's."
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
            "the same one and share the work. No weights of it are loaded then. A key is read from the environment "
            "variable `VLLM_API_KEY`."
        },
    )
    teacher_server_model: str | None = field(
        default=None,
        metadata={
            "help": "Name of the teacher on servers that serve several models, as a base and adapters on it. If `None`, "
            "they have to serve a single one."
        },
    )
    teacher_server_timeout: float = field(
        default=600.0,
        metadata={
            "help": "Seconds after which a request to the teacher's servers has failed, tries included. The run then "
            "ends with a checkpoint."
        },
    )
    teacher_top_k: int | None = field(
        default=None,
        metadata={
            "help": 'For `estimator="exact"` and `score_baseline="expected"`: number of the teacher\'s likeliest tokens '
            "that are known at each position, beside the sampled one and the mass of the rest. A teacher behind a server "
            "needs it, and its `--max-logprobs` has to be larger. `None`: all tokens, of teachers in this process."
        },
    )
    teacher_alignment: str = field(
        default="ids",
        metadata={
            "help": 'How the teacher reads what the student sampled. `"ids"`: token by token, after the student\'s prompt and '
            'images, which takes a teacher of the student\'s model family. `"text"`: as text, with a chat template, image '
            "processor and tokenizer of its own, compared with the student's tokens in pieces that end alike. For teachers "
            "of any family; only for sampled tokens.",
            "choices": list(TEACHER_ALIGNMENTS),
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
            "a model of their own, or for a PEFT student in a copy of what is trained. "
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

    # Parameters that control the generation batch
    num_generations: int | None = field(
        default=1,
        metadata={
            "help": "Number of completions per prompt. Distillation compares no completions of a prompt, so that one of each "
            "of many prompts says most for its tokens. More are needed for `reward_coef`, and share their prompt in forward "
            "passes."
        },
    )
    stop_at_teacher_eos: bool = field(
        default=True,
        metadata={
            "help": "Whether sampling also stops at the tokens with which the teacher ends its turns, where the student has "
            "them and would sample on: an instruct teacher leads a base student to say them. The saved student stops there, "
            "too."
        },
    )

    # Parameters that control the logging
    num_completions_in_page: int | None = field(
        default=64,
        metadata={
            "help": "Most completions in a page of the token view: those with the most extreme tokens, and others at "
            "random. `None` has all of them, as the file beside it does."
        },
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
    advantage_normalization: str | None = field(
        default=None,
        metadata={
            "help": 'Population over which the clamped scores are whitened. `None` is `"global"`, or `"none"` with '
            '`score_power`. `"global"`: all valid tokens of the '
            'generation batch, on all ranks and in all accumulation steps (GNDPO). `"none"`: no whitening, the '
            'clamped scores are the advantages (on-policy distillation). `"group"`: the tokens of the completions '
            'of the same prompt, level with `"global"` on short answers. `"sequence"`: the tokens of the same completion. '
            '`"teacher"`: the tokens that the same one of several teachers scored, since teachers differ in scale.',
            "choices": list(ADVANTAGE_NORMALIZATIONS),
        },
    )
    std_floor: float = field(
        default=0.0,
        metadata={
            "help": "Lower bound, in nats, of the standard deviation that the scores are divided by. A positive value "
            "keeps rounding noise from being blown up to unit variance once the student has become its teacher. It holds "
            "SGD alone: Adam makes up for the smaller gradient."
        },
    )
    extrapolation: float = field(
        default=1.0,
        metadata={
            "help": "Weight λ of the teacher's lead over the student before training, in the scores of G-OPD: `λ (log "
            "π_teacher - log π_ref) - (log π_student - log π_ref)`. 1 is the plain score, which needs no reference; above "
            "1 the student is led beyond its teacher. The reference is TRL's with `beta`, else a copy of the student or, "
            "for a PEFT student, what lies under its adapters. On short answers, at a good learning rate, 1.25 and 1.5 "
            "were level with 1."
        },
    )
    score_power: float = field(
        default=0.0,
        metadata={
            "help": "Exponent α of PowerOPD: the score is the difference `π_teacher^α - π_student^α` of the sampled token's "
            "probabilities. It needs no clamp, so that the default of `score_clip` means none, and PowerOPD does not whiten "
            'it, so that `advantage_normalization` is `"none"` unless it is set. 0 is the paper: the difference of '
            "log-probs. Metrics of scores stay in nats."
        },
    )
    score_discount: float = field(
        default=0.0,
        metadata={
            "help": "Discount γ of the clamped scores of later tokens, which are added to those of a token before they "
            "are normalized. 0 is the paper: each token for itself. 1 adds up all that follow. On short answers 0.9 was "
            "level with 0 at a good learning rate, and 12 points better at three times that."
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
            'distributions. Needs `importance_sampling_level="sequence_token"`. Both need a teacher in the same process, '
            "or `teacher_top_k`.",
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
        if self.score_power != 0:
            # PowerOPD's own: scores that lie between -1 and 1 need no clamp, and are not whitened.
            self.score_clip = None if self.score_clip == 5.0 else self.score_clip
        if self.advantage_normalization is None:
            self.advantage_normalization = "none" if self.score_power != 0 else "global"
        # TRL refuses a single generation per prompt because it has no group to compare it with; distillation needs
        # no group. Everything else that TRL checks about `num_generations` still applies.
        is_single = type(self.num_generations) is int and self.num_generations == 1
        if is_single:
            self.num_generations = _SingleGeneration(1)
        super().__post_init__()
        if is_single:
            self.num_generations = 1
        warn_on_level(self)
        warn_on_single_prompt(self)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for find in (
            *(score_problems, advantage_problems, teacher_problems),
            *(alignment_problems, loss_problems, estimator_problems),
        ):
            yield from find(self)

    def _late_problems(self) -> Iterator[str]:
        yield from super()._late_problems()
        yield from sampling_statistics_problems(self)
