"""Samples of weights that are some steps old, as a sampler that runs beside the training gives them."""

from collections import deque
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, TrainerCallback


class StaleSampler(TrainerCallback):
    """
    Has a student generate with the weights that it had some optimizer steps ago; its first weights, in the steps before.

    Only what a step samples changes: the rest of it, and evaluations between two steps, see the weights of now.

    Args:
        student ([`~transformers.PreTrainedModel`]): Trained on one device, without an adapter.
        staleness (`int`): Number of optimizer steps between the weights that sample and those that learn.
    """

    def __init__(self, student: PreTrainedModel, staleness: int):
        self.student = student
        self.weights = deque([copies(student)], maxlen=staleness + 1)  # oldest first

    def on_step_begin(self, args, state, control, **kwargs):
        self.student.generate = self._generate

    def on_step_end(self, args, state, control, **kwargs):
        del self.student.generate
        self.weights.append(copies(self.student))

    def _generate(self, *args, **kwargs):
        with self._old_weights():
            return type(self.student).generate(self.student, *args, **kwargs)

    @contextmanager
    def _old_weights(self):
        now = copies(self.student)
        self.student.load_state_dict(self.weights[0])
        try:
            yield
        finally:
            self.student.load_state_dict(now)


def copies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
