"""The rows behind every form of the token view: one for each completion, with what was found out about its tokens."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class TokenRow:
    """
    A completion of a generation batch. The arrays are `(T,)`, one value for each of its tokens; log-probs and scores are in
    nats and float32.

    A token that does not take part in the loss (tool output, a completion that was masked or dropped, a token that the
    teacher does not know) has a score of NaN and an advantage of 0. A log-prob of NaN says that there is none.
    """

    rank: int
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    scores: np.ndarray  # raw: before the clamp
    clamped: np.ndarray  # bool: the clamp changes the score
    teacher_logps: np.ndarray
    student_logps: np.ndarray
    advantages: np.ndarray
    # What TRL logs of a completion, see `TokenViewMixin`.
    reward: float = float("nan")  # the weighted sum
    rewards: dict[str, float] = field(default_factory=dict)
    images: list[Any] = field(default_factory=list)
    # What the tokenizer makes of the ids, see `TokenTexts`.
    prompt: str = ""
    tokens: list[str] = field(default_factory=list)

    @property
    def completion(self) -> str:
        return "".join(self.tokens)

    @property
    def mean_score(self) -> float:
        """Over the tokens that take part in the loss; NaN without any."""
        return mean(self.scores[~np.isnan(self.scores)])

    @property
    def mean_advantage(self) -> float:
        return mean(self.advantages[~np.isnan(self.scores)])


def mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")


def completion_lengths(completion_ids: torch.Tensor, completion_mask: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """
    Number of tokens `(B,)` of each completion, those of completions that `mask_truncated_completions` has masked included.

    TRL zeroes the whole mask of such a completion. Its last token is neither an end nor a padding token, or it would not
    count as truncated, so that what follows it is the padding.
    """
    places = torch.arange(1, completion_ids.size(1) + 1, device=completion_ids.device)
    until_padding = ((completion_ids != pad_token_id) * places).amax(1) if len(places) else completion_mask.sum(-1)
    lengths = completion_mask.sum(-1)
    return torch.where(lengths > 0, lengths, until_padding)


def rows_of(
    rollout: dict[str, Any],
    scores: torch.Tensor,
    logps: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    *,
    score_clip: float | None,
    rank: int,
    pad_token_id: int,
) -> list[TokenRow]:
    """
    The rows of this process.

    Args:
        rollout (`dict`): The batch, with its `advantages` `(B, T)`.
        scores (`torch.Tensor` of shape `(B, T)`): Raw scores in nats.
        logps (`tuple[torch.Tensor, torch.Tensor]`): Log-probs `(B, T)` of teacher and student, in nats.
        mask (`torch.Tensor` of shape `(B, T)`): True on the tokens that take part in the loss.
        score_clip (`float` or `None`): Bound of the clamp, in nats.
        rank (`int`): Number of this process.
        pad_token_id (`int`): Id that completions are padded with.
    """
    ids, completion_mask = rollout["completion_ids"], rollout["completion_mask"]
    lengths = completion_lengths(ids, completion_mask, pad_token_id).tolist()
    # Tokens that were masked as a whole have not been scored: what stands in their place is no log-prob.
    teacher, student = (values.masked_fill(completion_mask == 0, float("nan")) for values in logps)
    clamped = mask & (scores.abs() > (float("inf") if score_clip is None else score_clip))
    columns = (
        scores.masked_fill(~mask, float("nan")).float(),
        clamped,
        teacher.float(),
        student.float(),
        rollout["advantages"].float(),
    )
    columns = [values.detach().cpu().numpy() for values in (ids, *columns)]
    prompt_ids, prompt_mask = rollout["prompt_ids"].cpu(), rollout["prompt_mask"].cpu().bool()
    return [
        TokenRow(
            rank,
            prompt_ids[row][prompt_mask[row]].numpy(),
            *(values[row, :length].copy() for values in columns),
        )
        for row, length in enumerate(lengths)
    ]


def extreme_tokens(rows: list[TokenRow], count: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """
    Where the lowest and the highest scores of a batch are.

    Returns:
        `tuple`: two lists of at most `count` pairs (row, token), the most extreme first. No token is in both.
    """
    starts = np.cumsum([0] + [len(row.scores) for row in rows])
    scores = np.concatenate([row.scores for row in rows])
    valid = np.flatnonzero(~np.isnan(scores))
    order = valid[np.argsort(scores[valid], kind="stable")]
    count = min(count, len(order) // 2)
    numbers = np.searchsorted(starts, order, side="right") - 1
    places = list(zip(numbers.tolist(), (order - starts[numbers]).tolist(), strict=True))
    return places[:count], places[::-1][:count]


def sample_rows(rows: list[TokenRow], count: int | None, step: int) -> list[int]:
    """Numbers of `count` rows taken at random, in their order; of all of them for `None`."""
    if count is None or count >= len(rows):
        return list(range(len(rows)))
    # Not from the generator that the run draws from.
    return sorted(random.Random(step).sample(range(len(rows)), max(count, 0)))


def score_scale(rows: list[TokenRow], score_clip: float | None) -> float:
    """Score in nats that gets the full colour: the clamp's bound, or the largest size where there is no clamp."""
    if score_clip is not None:
        return score_clip
    sizes = [np.abs(row.scores[~np.isnan(row.scores)]) for row in rows]
    return max((float(values.max()) for values in sizes if len(values)), default=0.0) or 1.0
