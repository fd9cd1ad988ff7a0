"""The sampler of the comparison of arms that has the weights of some steps ago."""

import torch
from helpers import canned
from transformers import TrainerCallback

from benchmarks.arms.stale import StaleSampler, copies


class Weights(TrainerCallback):
    """Keeps the weights at the beginning of every step, and those that `generate` samples with."""

    def __init__(self, student):
        self.student, self.before, self.sampled = student, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.before.append(copies(self.student))


def test_a_step_samples_with_the_weights_of_two_steps_ago_and_learns_with_those_of_now(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=5, learning_rate=1e-2, per_device_train_batch_size=8)
    student, cls = trainer.model, type(trainer.model)
    weights, generate = Weights(student), cls.generate

    def watched(self, *args, **kwargs):
        weights.sampled.append(copies(self))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(cls, "generate", watched)
    trainer.add_callback(StaleSampler(student, 2))
    trainer.add_callback(weights)
    trainer.train()
    name = next(iter(weights.before[0]))
    assert not torch.equal(weights.before[0][name], weights.before[1][name])
    for step, (expected, found) in enumerate(zip([0, 0, 0, 1, 2], weights.sampled, strict=True)):
        assert torch.equal(found[name], weights.before[expected][name]), step
    # Between two steps it samples with what it has.
    student.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=1)
    assert torch.equal(weights.sampled[-1][name], student.state_dict()[name])


def test_what_is_learned_does_not_depend_on_who_sampled(make_trainer):
    ends = []
    for callbacks in ([], [StaleSampler]):
        trainer = make_trainer(max_steps=2, trainer_options={"rollout_func": canned}, per_device_train_batch_size=8)
        for callback in callbacks:
            trainer.add_callback(callback(trainer.model, 1))
        trainer.train()
        ends.append(copies(trainer.model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
