"""What the teacher says, in TRL's logs: metrics of the scores, and the mean score where TRL shows a reward."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather, pad_across_processes

from .grpo.reward_stand_in import RewardStandInMixin
from .objective.statistics import score_metrics, score_statistics, spread_metrics, spread_statistics, tail_metrics


def teacher_score(completions: list, **kwargs) -> list[float]:
    """Holds the place of the reward that TRL requires; the trainer puts the teacher's mean score there."""
    return [0.0] * len(completions)


# What is logged of each of several teachers, as `teacher/{its name}/{metric}`.
METRICS_PER_TEACHER = ("score/mean", "score/std", "reverse_kl", "advantages/std", "advantages/num_tokens")


class TeacherLogsMixin(RewardStandInMixin):
    """Logs of a trainer that scores tokens: `score/...`, `reverse_kl` and whatever else `objective/statistics.py` makes."""

    stand_in = staticmethod(teacher_score)

    _generation_seconds = 0.0  # of this rank, for the generation batch in progress

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        return time.perf_counter()

    def _generate(self, prompts: list):
        start = self._now()
        result = super()._generate(prompts)
        self._generation_seconds = self._now() - start
        return result

    @contextmanager
    def _timer(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        self._begin_phase(name.removeprefix("time/").replace("_", " "))
        start = self._now()
        yield
        seconds[name] = seconds.get(name, 0.0) + self._now() - start

    def _log_teacher(
        self,
        mode: str,
        rollout: dict[str, Any],
        seconds: dict[str, float],
        scores: torch.Tensor,
        logps: tuple[torch.Tensor, torch.Tensor],
        undefined: torch.Tensor,
        unknown: torch.Tensor,
        mask: torch.Tensor,
        teachers: torch.Tensor | None,
    ) -> None:
        """
        Log one generation batch, on all ranks together.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            rollout (`dict`): The batch, with its `advantages` `(B, T)`.
            seconds (`dict[str, float]`): Time of each phase on this rank, the same phases on all ranks.
            scores (`torch.Tensor` of shape `(B, T)`): Raw scores in nats, 0 on masked tokens.
            logps (`tuple[torch.Tensor, torch.Tensor]`): Log-probs `(B, T)` of teacher and student, in nats.
            undefined (`torch.Tensor` of shape `(B,)`): Completions without defined statistics.
            unknown (`torch.Tensor` of shape `(B, T)`): True on tokens whose log-prob the teacher does not know.
            mask (`torch.Tensor` of shape `(B, T)`): True on valid tokens.
            teachers (`torch.Tensor` of shape `(B,)` or `None`): Number of each completion's teacher, if there are several.
        """
        advantages = rollout["advantages"]
        is_eos = torch.isin(rollout["completion_ids"], torch.tensor(self.eos_token_ids, device=mask.device))
        parts = [torch.ones_like(undefined)]  # all completions, and those of each teacher
        if teachers is not None:
            parts += [teachers == number for number in range(len(self.teacher.names))]
        statistics = torch.stack(
            [
                score_statistics(
                    scores,
                    *logps,
                    advantages,
                    undefined & part,
                    is_eos,
                    unknown & part.unsqueeze(-1),
                    mask & part.unsqueeze(-1),
                    self.args.score_clip,
                )
                for part in parts
            ]
        )
        of_all, *of_teachers = (score_metrics(ranks) for ranks in gather(statistics.unsqueeze(0)).unbind(1))
        metrics = dict(of_all)
        for name, of_teacher in zip(self.teacher.names, of_teachers, strict=True):
            metrics.update({f"teacher/{name}/{metric}": of_teacher[metric] for metric in METRICS_PER_TEACHER})
        _, student_logps = logps
        spread = spread_statistics(scores, student_logps, advantages, mask, self.args.score_clip)
        metrics.update(spread_metrics(gather(spread.unsqueeze(0))))
        metrics.update(tail_metrics(*gather_tokens(torch.stack([scores, advantages], dim=-1)[mask]).unbind(-1)))
        times = gather(torch.tensor([list(seconds.values())], device=mask.device)).amax(0)  # the slowest rank
        metrics.update(zip(seconds, times.tolist(), strict=True))
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

        per_completion = torch.stack([scores, advantages], dim=-1).sum(1) / mask.sum(-1, keepdim=True)
        self._log_stand_in(mode, *gather(per_completion).unbind(-1))


def gather_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """`(n, K)` numbers of this rank's tokens, none of them NaN, as float32 and with those of all other ranks."""
    nan = float("nan")
    # Ranks have different numbers of tokens, and one may have none: each sends as many as the others, and at least one.
    padded = pad_across_processes(torch.nn.functional.pad(tokens.float(), (0, 0, 0, 1), value=nan), pad_index=nan)
    tokens = gather(padded)
    return tokens[~tokens.isnan().any(-1)]
