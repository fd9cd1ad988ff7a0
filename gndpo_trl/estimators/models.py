"""The models of a run, as an estimator reads them."""

from functools import partial
from typing import Any

import torch

from ..grpo.hidden_states import HiddenStates


class Models:
    """
    Student and teacher of a run, in timed forward passes over real tokens. All ranks make a pass together.

    Args:
        trainer ([`GNDPOTrainer`]): Whose models these are.

    Attributes:
        teacher ([`~teachers.Teacher`]): The teacher.
        clock (`Clock`): Times the phases of a step.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The student's.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self.teacher, self.clock, self.tokenizer = trainer.teacher, trainer.clock, trainer._tokenizer

    @property
    def is_training(self) -> bool:
        return self._trainer.model.training

    def student_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        """Log-probs `(B, T)`, in nats and without gradient, of the sampled tokens under the student."""
        with self.clock.phase("student_scoring"):
            logps = self._trainer._per_token_logps(self._trainer.model, rollout)
        self.watch_sampler(rollout, logps)
        return logps

    def teacher_logps(self, question: dict[str, Any]) -> torch.Tensor:
        """The same under the teacher, who reads `question`: the rollout, after prompts of its own where it has them."""
        with self.clock.phase("teacher_scoring"), torch.no_grad():
            return self._trainer.teacher.per_token_logps(question)

    def reference_logps(self, rollout: dict[str, Any], rows: list[dict[str, Any]]) -> torch.Tensor | None:
        """The same under the student before training, if scores need them; `rows` are those of the data."""
        trainer = self._trainer
        if trainer.reference is None:
            return rollout["ref_per_token_logps"] if trainer.args.extrapolation != 1.0 else None
        with self.clock.phase("reference_scoring"), torch.no_grad():
            return trainer.reference.per_token_logps({**rollout, "rows": rows})

    def student_states(self, rollout: dict[str, Any]) -> HiddenStates:
        """Last hidden states of the student at the sampled tokens, and its LM head."""
        with self.clock.phase("student_scoring"):
            return self._trainer._hidden_states(self._trainer.model, rollout)

    def teacher_states(self, question: dict[str, Any]) -> HiddenStates:
        """The same of the teacher."""
        with self.clock.phase("teacher_scoring"), torch.no_grad():
            return self._trainer.teacher.hidden_states(question, self._trainer._hidden_states)

    def teacher_states_in_loss(self, question: dict[str, Any], in_one_pass: bool) -> HiddenStates:
        """
        The same for a micro-batch whose loss is due, left on the device; in one pass, or in as many as so many rows have in
        scoring.
        """
        device = question["completion_ids"].device
        batch_size = len(question["completion_ids"]) if in_one_pass else None
        read = partial(self._trainer._hidden_states, batch_size=batch_size, device=device)
        # Scoring is not under the loss's autocast elsewhere.
        with self.clock.phase("teacher_scoring"), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self._trainer.teacher.hidden_states(question, read)

    def may_read_in_loss(self, rollout: dict[str, Any], is_scaled_later: bool) -> bool:
        """
        Whether the passes of the loss can be the ones that read the student.

        Args:
            rollout (`dict`): What the student sampled.
            is_scaled_later (`bool`): Whether the gradient that they leave is to be scaled by one number.
        """
        return self._trainer._may_read_in_loss(rollout, is_scaled_later)

    def watch_sampler(self, rollout: dict[str, Any], logps: torch.Tensor) -> None:
        """Compare the sampler's log-probs with the training engine's `(B, T)`, if there is one."""
        self._trainer._watch_sampling_logps(rollout, logps)
