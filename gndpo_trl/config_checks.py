"""
What in a [`GNDPOConfig`] is wrong, or does not go with what else is set: a sentence for each, with the value and the remedy.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any


# What `teacher_weights` may be; the docstring of the configuration says what each means.
TEACHER_WEIGHTS = ("initial", "ema", "periodic", "live")
TEACHER_ALIGNMENTS = ("ids", "text")
SCORE_BASELINES = ("expected",)
ESTIMATORS = ("sampled", "exact")
LEVELS = ("sequence_token", "token")

# Losses that go on from a sum over tokens with advantages of both signs. "sapo" and "vespo" treat the signs differently.
LOSSES_OF_EXPECTATIONS = ("grpo", "dapo", "dr_grpo", "bnpo", "luspo", "cispo")

# Below it, scores are cut to what float32 cannot tell from 0.
SMALLEST_CLIP = 1e-6


def score_problems(args: Any) -> Iterator[str]:
    if args.score_clip is not None and not SMALLEST_CLIP <= args.score_clip < math.inf:
        yield (
            f"`score_clip` is {args.score_clip}, but it bounds the scores to [-score_clip, score_clip] nats and must "
            "be positive and finite. Use the reference's 5.0, or None to turn the clamp off."
        )
    if not 0 < args.extrapolation < math.inf:
        yield (
            f"`extrapolation` is {args.extrapolation}, but it weighs what the teacher adds to the student's beginning. "
            "Use 1.0 for the plain score, or another positive number."
        )
    if not 0 <= args.score_power < math.inf:
        yield (
            f"`score_power` is {args.score_power}, but it is an exponent of probabilities. Use 0.0 for the paper's "
            "difference of log-probs, or a positive number; 1.0 compares the probabilities themselves."
        )
    if args.score_power != 0 and args.score_clip is not None:
        yield (
            f"`score_power` is {args.score_power}, so that scores lie between -1 and 1, and `score_clip` "
            f"({args.score_clip}) is a number of nats. Set `score_clip` to None."
        )
    if args.score_power != 0 and args.extrapolation != 1.0:
        yield (
            f"`score_power` is {args.score_power} and `extrapolation` {args.extrapolation}, but extrapolated are "
            "differences of log-probs. Set `score_power` to 0.0, or `extrapolation` to 1.0."
        )
    if not 0 <= args.score_discount <= 1:
        yield (
            f"`score_discount` is {args.score_discount}, but it is the weight of the next token's score. Give a number "
            "from 0, the paper's, to 1."
        )


def advantage_problems(args: Any) -> Iterator[str]:
    if not 0 <= args.std_floor < math.inf:
        yield (
            f"`std_floor` is {args.std_floor}, but it is a lower bound of a standard deviation. Use 0.0 for the "
            "reference's behaviour, or a positive number of nats."
        )
    for name in ("distillation_coef", "reward_coef"):
        if not 0 <= getattr(args, name) < math.inf:
            yield (
                f"`{name}` is {getattr(args, name)}, but it weighs one of two parts of the advantages. Give a number "
                "from 0 on."
            )
    if args.distillation_coef == args.reward_coef == 0:
        yield (
            f"`distillation_coef` is {args.distillation_coef} and `reward_coef` {args.reward_coef}, so that nothing would be "
            "learned. Raise one of them."
        )
    if args.reward_coef != 0 and args.num_generations == 1:
        yield (
            f"`reward_coef` is {args.reward_coef}, but `num_generations` is 1: a reward is compared with those of other "
            "completions of its prompt. Raise `num_generations`, or leave `reward_coef` at 0."
        )


def teacher_problems(args: Any) -> Iterator[str]:
    if not 0 <= args.teacher_ema_decay < 1:
        yield (
            f"`teacher_ema_decay` is {args.teacher_ema_decay}, but it is the share of the average that a step leaves: "
            "give a number from 0 up to, but not including, 1. A teacher that never moves is "
            '`teacher_weights="initial"`.'
        )
    if args.teacher_sync_steps < 1:
        yield (
            f"`teacher_sync_steps` is {args.teacher_sync_steps}, but it is a number of optimizer steps. Give a "
            'positive one; a teacher that never moves is `teacher_weights="initial"`.'
        )
    if args.teacher_top_k is not None and args.teacher_top_k < 1:
        yield (
            f"`teacher_top_k` is {args.teacher_top_k}, but it is a number of tokens. Give a positive one, or None for the whole "
            "distribution of a teacher in this process."
        )
    longest = args.ddp_timeout if args.teacher_server_url else math.inf
    if not 0 < args.teacher_server_timeout < longest:
        yield (
            f"`teacher_server_timeout` is {args.teacher_server_timeout}, but it must be positive, and shorter than "
            f"`ddp_timeout` ({args.ddp_timeout}), after which ranks stop to wait for one another. Raise the latter "
            "if it takes that long."
        )


def alignment_problems(args: Any) -> Iterator[str]:
    if args.teacher_alignment == "ids":
        return
    other_vocabulary = "a teacher of another family has distributions over other tokens than the student's"
    reasons = {
        "estimator": (args.estimator != "sampled", other_vocabulary),
        "score_baseline": (args.score_baseline is not None, other_vocabulary),
        "teacher_top_k": (args.teacher_top_k is not None, other_vocabulary),
        "score_discount": (
            args.score_discount != 0.0,
            "a token has the score of its whole piece, which would be added up",
        ),
    }
    yield from what_does_not_go_with(f'teacher_alignment="{args.teacher_alignment}"', args, reasons)


def loss_problems(args: Any) -> Iterator[str]:
    level = args.importance_sampling_level
    if level == "sequence":
        yield (
            '`importance_sampling_level="sequence"` gives every token of a completion the same gradient, so the '
            'token-level advantages of the teacher would be averaged away. Use "sequence_token" (GSPO-token: '
            'the same ratio, a gradient per token) or "token".'
        )
    elif level not in LEVELS:
        yield f"`importance_sampling_level` is {level!r}. Choose one of {', '.join(map(repr, LEVELS))}."


def warn_on_level(args: Any) -> None:
    """
    Warn where the level of the importance ratio, "sequence_token" or "token", is not the one that a loss is made for.

    "luspo" is made for the ratio of the sequence, which is "sequence_token" here. "vespo" forms a ratio of its own, the
    same at both levels. All other losses are made for either.
    """
    if args.loss_type == "luspo" and args.importance_sampling_level == "token":
        warnings.warn(
            '`importance_sampling_level` is "token", but `loss_type` is "luspo", which is made for one ratio per '
            'completion: with ratios per token it is the sum of GRPO\'s token losses. Set "sequence_token".',
            stacklevel=2,
        )


def estimator_problems(args: Any) -> Iterator[str]:
    if args.use_sampling_logps and args.vllm_importance_sampling_correction:
        yield (
            "`use_sampling_logps` is True and saves the student's scoring pass, and `vllm_importance_sampling_correction` needs "
            "it. Switch one of them off."
        )
    if args.score_baseline is None and args.estimator == "sampled":
        return
    # What does not go with looking at the whole vocabulary, and why.
    reasons = {
        "use_sampling_logps": (args.use_sampling_logps, "the sampler says nothing about the other tokens"),
        "torch_compile": (args.torch_compile, "a compiled model does not hand out its hidden states"),
        "extrapolation": (args.extrapolation != 1.0, "the reference's distribution is not looked at"),
        "score_power": (args.score_power != 0, "expectations are of differences of log-probs"),
        "score_discount": (args.score_discount != 0.0, "what follows a token is known of the sampled one only"),
    }
    if args.estimator == "exact":
        reasons |= {
            "distillation_coef": (
                args.distillation_coef != 1.0 and args.reward_coef == 0,
                "without `reward_coef` there is nothing to weigh it against",
            ),
            "beta": (args.beta != 0, "the KL divergence to the reference model is that of sampled tokens"),
            "importance_sampling_level": (
                args.importance_sampling_level == "token",
                'the ratio of a token is part of the sum over all tokens; set "sequence_token"',
            ),
            "loss_type": (
                args.loss_type not in LOSSES_OF_EXPECTATIONS,
                "advantages of both signs meet in a position, which this loss treats differently; choose one of "
                + ", ".join(map(repr, LOSSES_OF_EXPECTATIONS)),
            ),
            "off_policy_mask_threshold": (
                args.off_policy_mask_threshold is not None,
                "it looks at the sign of an advantage, and a position has advantages of both signs",
            ),
        }
    asked = (
        f'estimator="{args.estimator}"' if args.estimator != "sampled" else f'score_baseline="{args.score_baseline}"'
    )
    yield from what_does_not_go_with(asked, args, reasons)


def what_does_not_go_with(asked: str, args: Any, reasons: dict[str, tuple[bool, str]]) -> Iterator[str]:
    """A sentence for each field that is set beside what is `asked` for, with the reason why the two exclude each other."""
    for name, (is_set, reason) in reasons.items():
        if is_set:
            yield f"`{name}` is {getattr(args, name)!r}, which does not go with `{asked}`: {reason}. Leave one of them out."


def sampling_statistics_problems(args: Any) -> Iterator[str]:
    """Once TRL has worked out how large a generation batch is."""
    generate_every = args.steps_per_generation * args.num_iterations
    if args.use_sampling_logps and args.gradient_accumulation_steps % generate_every != 0:
        yield (
            f"`use_sampling_logps` is True and needs one optimizer step per generation batch, but `steps_per_generation` "
            f"({args.steps_per_generation}) × `num_iterations` ({args.num_iterations}) is more than "
            f"`gradient_accumulation_steps` ({args.gradient_accumulation_steps}): later steps have to know the "
            "log-probs of the student that sampled. Switch it off, or raise `gradient_accumulation_steps`."
        )


def warn_on_single_prompt(args: Any) -> None:
    """Warn where a generation batch is the completions of one prompt, which the method is not about."""
    if args.generation_batch_size == args.num_generations > 1 and args.advantage_normalization == "global":
        warnings.warn(
            f"A generation batch holds {args.num_generations} completions of a single prompt "
            f"(`generation_batch_size` {args.generation_batch_size}, `num_generations` {args.num_generations}), so "
            'that `advantage_normalization="global"` is the same as "group". For the statistics of many prompts, raise '
            "`gradient_accumulation_steps` or `per_device_train_batch_size`, or lower `num_generations`.",
            stacklevel=2,
        )
