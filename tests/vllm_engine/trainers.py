"""What the tests of both modes share."""

from trl import GRPOTrainer

from gndpo_trl.grpo.vllm import LossWatchMixin


class Trainer(LossWatchMixin, GRPOTrainer):
    """The mixin alone."""


def some_reward(completions, completion_ids, **kwargs):
    """One that tells completions apart, so that there is something to learn."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def agrees(trainer: GRPOTrainer, steps: int = 2) -> bool:
    """Whether both engines gave every sampled token the same log-prob, to 1e-5, before and after an update."""
    differences = logged(trainer, "sampling/logp_difference/max")
    return len(differences) == steps and max(differences) < 1e-5
