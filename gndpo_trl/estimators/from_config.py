"""Which estimator the arguments and the configuration name."""

from collections.abc import Callable

import torch

from ..config import GNDPOConfig
from ..objective.advantages import Population
from ..objective.scores import Score
from .estimator import Estimator, Sampled
from .exact import Exact
from .scored_in_loss import SamplerStatistics, Unnormalized
from .vocabulary import Baseline


def get_estimator(
    estimator: Estimator | None,
    args: GNDPOConfig,
    score: Score,
    population: Population,
    mix: Callable[..., torch.Tensor],
) -> Estimator:
    """
    The estimator that the trainer's arguments and the configuration name.

    Raises:
        `TypeError`: if it is none.
        `ValueError`: if it is given twice, belongs to another trainer already, or does not look at what is asked for.
    """
    defaults = {"estimator": "sampled", "score_baseline": None, "use_sampling_logps": False}
    if estimator is not None:
        if not isinstance(estimator, Estimator):
            raise TypeError(
                f"`estimator` is {estimator!r}, but the trainer takes an `Estimator` there. Those that have a name are set in "
                "the configuration: `GNDPOConfig(estimator=...)`."
            )
        if hasattr(estimator, "models"):
            raise ValueError(
                f"`estimator` ({type(estimator).__name__}) belongs to another trainer already, whose models it reads. Make a new "
                "one for each trainer."
            )
        for name, default in defaults.items():
            if getattr(args, name) != default:
                raise ValueError(
                    f"The estimator is given twice: `estimator` was passed to the trainer, and `{name}` is "
                    f"{getattr(args, name)!r} in the configuration. Keep one of them."
                )
        return estimator
    if args.estimator == "exact":
        # "cispo" clips the ratio and no gradient.
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        return Exact(
            args.score_clip,
            f"`estimator` is {args.estimator!r}",
            std_floor=args.std_floor,
            has_baseline=args.score_baseline is not None,
            clip_range=None if args.loss_type == "cispo" else (1 - args.epsilon, 1 + high),
            coefs=(args.distillation_coef, args.reward_coef),
        )
    if args.score_baseline is not None:
        return Baseline(args.score_clip, f"`score_baseline` is {args.score_baseline!r}")
    if args.teacher_top_k is not None:
        raise ValueError(
            f"`teacher_top_k` is {args.teacher_top_k}, but the sampled token is all that is looked at. Set "
            '`estimator="exact"` or `score_baseline="expected"`, or unset it.'
        )
    if args.use_sampling_logps:
        return SamplerStatistics(score, population, mix)
    if args.advantage_normalization == "none":
        return Unnormalized(score, population, mix)
    return Sampled()
