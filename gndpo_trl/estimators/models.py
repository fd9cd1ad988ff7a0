"""The models of a run, as an estimator reads them."""

from typing import Any

import torch

from ..grpo.hidden_states import HiddenStates


class Models:
    """
    Student and teacher of a run, in timed forward passes over real tokens. All ranks make a pass together.

    Args:
        trainer ([`GNDPOTrainer`]): Whose models these are.

    Attributes:
        clock (`Clock`): Times the phases of a step.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The student's.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self.clock, self.tokenizer = trainer.clock, trainer._tokenizer

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

    def watch_sampler(self, rollout: dict[str, Any], logps: torch.Tensor) -> None:
        """Compare the sampler's log-probs with the training engine's `(B, T)`, if there is one."""
        self._trainer._watch_sampling_logps(rollout, logps)
