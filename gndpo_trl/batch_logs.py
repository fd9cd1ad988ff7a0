"""What a scored generation batch says, where TRL logs what rewards say."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather, pad_across_processes

from .estimators import Reading
from .grpo.reward_stand_in import RewardStandInMixin
from .objective.statistics import score_metrics, score_statistics, spread_metrics, spread_statistics, tail_metrics
from .token_view.mixin import TokenViewMixin


def teacher_score(completions: list, **kwargs) -> list[float]:
    """Holds the place of the reward that TRL requires; the trainer puts the teacher's mean score there."""
    return [0.0] * len(completions)


# What is logged of each of several teachers, as `teacher/{its name}/{metric}`.
METRICS_PER_TEACHER = ("score/mean", "score/std", "reverse_kl", "advantages/std", "advantages/num_tokens")


@dataclass(frozen=True)
class ScoredBatch:
    """
    A generation batch with its advantages.

    Attributes:
        mode (`str`): `"train"` or `"eval"`.
        rollout (`dict`): The batch, with its `advantages` `(B, T)`.
        reading ([`Reading`]): What was read of it.
        scores (`torch.Tensor` of shape `(B, T)`): Raw scores in nats, 0 on masked tokens.
        mask (`torch.Tensor` of shape `(B, T)`): True on the tokens whose scores are known.
        undefined (`torch.Tensor` of shape `(B,)`): Completions without defined statistics.
        teachers (`torch.Tensor` of shape `(B,)` or `None`): Number of each completion's teacher, if there are several.
    """

    mode: str
    rollout: dict[str, Any]
    reading: Reading
    scores: torch.Tensor
    mask: torch.Tensor
    undefined: torch.Tensor
    teachers: torch.Tensor | None


class BatchLogsMixin(RewardStandInMixin, TokenViewMixin):
    """Logs of a trainer that scores tokens: `score/...`, `reverse_kl` and whatever else `objective/statistics.py` makes."""

    stand_in = staticmethod(teacher_score)

    def _report(self, batch: ScoredBatch) -> None:
        """Log one generation batch, on all ranks together."""
        metrics = self._score_metrics(batch)
        metrics.update(self.estimator.metrics(batch.reading, batch.mask))
        seconds = self.clock.seconds  # the same phases on all ranks; that of the slowest counts
        times = gather(torch.tensor([list(seconds.values())], device=batch.mask.device)).amax(0).tolist()
        metrics.update({f"time/{name}": value for name, value in zip(seconds, times, strict=True)})
        for name, value in metrics.items():
            self._metrics[batch.mode][name].append(value)

        per_completion = torch.stack([batch.scores, batch.rollout["advantages"]], dim=-1).sum(1)
        per_completion = per_completion / batch.mask.sum(-1, keepdim=True)
        self._log_stand_in(batch.mode, *gather(per_completion).unbind(-1))
        # Rows of the token view show what the logs hold by now.
        logps = (batch.reading.teacher_logps, batch.reading.student_logps)
        self._keep_token_rows(batch.mode, batch.rollout, batch.scores, logps, batch.mask)

    def _score_metrics(self, batch: ScoredBatch) -> dict[str, float]:
        scores, advantages, mask, clip = batch.scores, batch.rollout["advantages"], batch.mask, self.args.score_clip
        logps = (batch.reading.teacher_logps, batch.reading.student_logps)
        is_eos = torch.isin(batch.rollout["completion_ids"], torch.tensor(self.eos_token_ids, device=mask.device))
        parts = [torch.ones_like(batch.undefined)]  # all completions, and those of each teacher
        if batch.teachers is not None:
            teachers = batch.teachers.to(mask.device)
            parts += [teachers == number for number in range(len(self.teacher.names))]
        statistics = torch.stack(
            [
                score_statistics(
                    scores,
                    *logps,
                    advantages,
                    batch.undefined & part,
                    is_eos,
                    batch.reading.unknown & part.unsqueeze(-1),
                    mask & part.unsqueeze(-1),
                    clip,
                )
                for part in parts
            ]
        )
        metrics, *of_teachers = (score_metrics(ranks) for ranks in gather(statistics.unsqueeze(0)).unbind(1))
        for name, of_teacher in zip(self.teacher.names, of_teachers, strict=True):
            metrics.update({f"teacher/{name}/{metric}": of_teacher[metric] for metric in METRICS_PER_TEACHER})
        spread = spread_statistics(scores, batch.reading.student_logps, advantages, mask, clip)
        metrics.update(spread_metrics(gather(spread.unsqueeze(0))))
        metrics.update(tail_metrics(*gather_tokens(torch.stack([scores, advantages], dim=-1)[mask]).unbind(-1)))
        return metrics


def gather_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """`(n, K)` numbers of this rank's tokens, none of them NaN, as float32 and with those of all other ranks."""
    nan = float("nan")
    # Ranks have different numbers of tokens, and one may have none: each sends as many as the others, and at least one.
    padded = pad_across_processes(torch.nn.functional.pad(tokens.float(), (0, 0, 0, 1), value=nan), pad_index=nan)
    tokens = gather(padded)
    return tokens[~tokens.isnan().any(-1)]
