"""What the tests of both modes share."""

from trl import GRPOTrainer

from gndpo_trl.grpo.loss_seam import LossSeamMixin
from gndpo_trl.grpo.vllm import SamplerWatch, VLLMMixin


class Trainer(LossSeamMixin, VLLMMixin, GRPOTrainer):
    """The mixin, and the watch of trainers that leave scoring to TRL, alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.surrogate = SamplerWatch(self._watch_sampling_logps)


def some_reward(completions, completion_ids, **kwargs):
    """One that tells completions apart, so that there is something to learn."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def agrees(trainer: GRPOTrainer, steps: int = 2) -> bool:
    """Whether both engines gave every sampled token the same log-prob, to 1e-5, before and after an update."""
    differences = logged(trainer, "sampling/logp_difference/max")
    return len(differences) == steps and max(differences) < 1e-5
