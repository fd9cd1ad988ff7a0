"""What an estimator is, and the paper's: the advantage of the sampled token."""

from typing import Any

import torch

from ..grpo.loss_seam import Surrogate
from ..objective.advantages import Population
from ..objective.scores import Scores
from ..teachers import Teacher
from .models import Models
from .reading import Reading


class Estimator(Surrogate):
    """
    Decides what is read of the models, what becomes of it, and what of that the loss needs. Nearly all of it has a default,
    which is the paper's in [`Sampled`].

    Pass an instance as `estimator` to one trainer, which calls, in this order and on all ranks: `check` before it loads any
    model; `prepare` when the models are there; for each generation batch `read`, `advantages`, `for_the_loss` and `metrics`;
    for each micro-batch of the loss `head_reader` and `advantages_in_loss`; `save_state` and `load_state` with checkpoints that are
    written while a generation batch is in use. Where it `waits_for_loss`, `begin` and the micro-batches come first, and then
    `finish` in the place of `read`, `advantages`, whose moments scale the gradient that is there by then, and `metrics`.

    Example: a smooth clamp in the place of clamp and whitening.

    ```python
    >>> class SmoothClamp(Sampled):
    ...     def advantages(self, scores, reading, mask, population):
    ...         return 5.0 * torch.tanh(scores.raw / 5.0), None
    ```

    A *rollout* is the batch that `GRPOTrainer` makes of its samples, see [`~teachers.Teacher`].
    """

    models: Models

    def check(self, teacher: Teacher) -> None:
        """Raise `ValueError` if the teacher cannot say what is asked of it."""

    def prepare(self, models: Models) -> None:
        self.models = models

    def read(self, rollout: dict[str, Any], question: dict[str, Any]) -> Reading:
        """
        Ask student and teacher.

        Args:
            rollout (`dict`): What the student sampled.
            question (`dict`): The same as the teacher reads it, which has begun to.

        Returns:
            [`Reading`]
        """
        raise NotImplementedError(f"{type(self).__name__} has no `read`.")

    def waits_for_loss(self, rollout: dict[str, Any]) -> bool:
        """Whether this generation batch is read in one pass, by the micro-batches of its own loss."""
        return False

    def begin(self, rollout: dict[str, Any], question: dict[str, Any]) -> dict[str, Any]:
        """
        What the loss is to find of a generation batch that is read in one pass, as of `for_the_loss`. It also finds
        `row_of_batch` `(b,)`, the numbers of a micro-batch's rows.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `begin`.")

    def finish(self, rollout: dict[str, Any]) -> Reading:
        """What all micro-batches have found, after the last backward pass."""
        raise NotImplementedError(f"{type(self).__name__} has no `finish`.")

    def advantages(
        self, scores: Scores, reading: Reading, mask: torch.Tensor, population: Population
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Advantages of the sampled tokens.

        Args:
            scores ([`Scores`]): Of the sampled tokens, `(B, T)`, 0 where `mask` is False.
            reading ([`Reading`]): What they were made of.
            mask (`torch.Tensor` of shape `(B, T)`): True on the tokens whose scores are known.
            population ([`Population`]): Whom a completion is compared with.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: the advantages `(B, T)`, without gradient and 0 where the mask is
            False; and the moments `(B, 3)` that they were normalized by, if they were.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `advantages`.")

    def for_the_loss(self, rollout: dict[str, Any], reading: Reading, moments: torch.Tensor | None) -> dict[str, Any]:
        """
        What this estimator wants to find in the `inputs` of the loss, beside what TRL has there: tensors, or lists of tensors
        and plain types, with an entry for each row, which are split and shuffled with the rows and saved with a checkpoint.
        Called before `advantages` replaces those `(B,)` of the rewards in the rollout.
        """
        return {}

    def identity(self) -> str:
        """
        Who this estimator is, in words that a warning can quote: a run goes on with what it made of a generation batch only
        under the same one. One with settings of its own names them here.
        """
        return type(self).__name__

    def metrics(self, reading: Reading, mask: torch.Tensor) -> dict[str, float]:
        """More to log of a generation batch, the same numbers on all ranks."""
        return {}

    def save_state(self, folder: str) -> None:
        """Write what the rest of a generation batch needs, and `for_the_loss` does not hold, into a checkpoint's folder."""

    def load_state(self, folder: str) -> None:
        """Read it back."""


class Sampled(Estimator):
    """
    The paper's: the gradient of a position is that of the sampled token's log-prob, times its advantage,

        A[b,t] = (score[b,t] - μ) / max(sqrt(σ² + 1e-8), std_floor)

    with μ and σ of the scores of the population. Student and teacher are asked for the log-probs of the sampled tokens, the
    student as it sampled: where several optimizer steps use a generation batch, TRL has scored it already.
    """

    def read(self, rollout, question):
        student_logps = rollout.get("old_per_token_logps")
        if student_logps is None:
            student_logps = self.models.student_logps(rollout)
        return Reading(self.models.teacher_logps(question), student_logps)

    def advantages(self, scores, reading, mask, population):
        moments = population.moments(scores.shaped, mask)
        return population.whiten(scores.shaped, mask, moments), moments
