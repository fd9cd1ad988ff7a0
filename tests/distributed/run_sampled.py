"""A job of `worker.py`: a run whose student is sampled by the server that `config` names, and what each rank saw of it."""

import pytest
from datasets import Dataset
from run_training import make_rows
from stand_in_sampler import stand_in
from transformers import TrainerCallback

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.checkpoints import RunCannotGoOn


class EndAfter(TrainerCallback):
    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def train_sampled(spec: dict) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        trainer = GNDPOTrainer(
            model=spec["model"],
            teacher_model=spec["teacher"],
            args=GNDPOConfig(**spec["config"]),
            train_dataset=Dataset.from_list(make_rows(images=False)),
            callbacks=[EndAfter(spec.get("end_after"))],
        )
        seen = []
        generate = trainer.vllm_generation.generate

        def watch(prompts, *args):
            result = generate(prompts, *args)
            seen.append({"prompts": prompts, "completions": result[1]})
            return result

        trainer.vllm_generation.generate = lambda prompts, images, num_generations, profiler=None: watch(
            prompts, images, num_generations, profiler
        )
        error = None
        try:
            trainer.train(resume_from_checkpoint=spec.get("resume"))
        except RunCannotGoOn as reason:  # on all ranks
            error = str(reason)
    return {"seen": seen, "log_history": trainer.state.log_history, "error": error, "step": trainer.state.global_step}
