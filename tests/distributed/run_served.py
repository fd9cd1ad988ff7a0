"""A job of `worker.py`: a run whose teacher is behind the server that `config` names, and what each rank asked it."""

from datasets import Dataset
from run_training import make_rows
from transformers import TrainerCallback

from gndpo_trl import GNDPOConfig, GNDPOTrainer


class SayStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print(f"step {state.global_step} is done", flush=True)


def train_served(spec: dict) -> dict:
    trainer = GNDPOTrainer(
        model=spec["model"],
        args=GNDPOConfig(**spec["config"]),
        train_dataset=Dataset.from_list(make_rows(images=False)),
        callbacks=[SayStep()],
    )
    asked = []
    request = trainer.teacher.model.request

    def watch(questions):
        asked.extend(list(question.ids) for question in questions)
        return request(questions)

    trainer.teacher.model.request = watch
    trainer.train()
    return {"asked": asked, "log_history": trainer.state.log_history}
