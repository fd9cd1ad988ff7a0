"""Steps whose loss or gradient is not finite."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from gndpo_trl.grpo.checkpoints import RunCannotGoOn


class Poison(TrainerCallback):
    """Puts NaN or infinity into a gradient at the end of some steps."""

    def __init__(self, *steps: int, value: float = math.nan):
        self.steps, self.value, self.weights = steps, value, {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            parameter = list(model.parameters())[-1]
            parameter.grad.view(-1)[0] = self.value
            self.weights[state.global_step] = parameter.detach().clone()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        before = self.weights.get(state.global_step - 1)
        assert before is None or torch.equal(list(model.parameters())[-1], before)


def training_log(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_a_step_with_a_broken_gradient_changes_no_weight(make_trainer, tmp_path):
    poison = Poison(1, 3, value=-math.inf)
    options = {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 4, "weight_decay": 0.1}
    trainer = make_trainer(max_steps=4, max_skipped_steps=2, trainer_options={"callbacks": [poison]}, **options)
    trainer.train()
    assert len(poison.weights) == 2
    assert [entry["skipped_steps"] for entry in training_log(trainer)] == [0, 1, 1, 2]
    assert all(math.isfinite(entry["loss"]) for entry in training_log(trainer))
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert all(values.isfinite().all() for values in saved.values())
    assert trainer.optimizer.state_dict()["state"][0]["step"] == 2  # of four


def test_a_loss_that_is_nan_is_logged_as_such(make_trainer):
    trainer = make_trainer(max_steps=3, gradient_accumulation_steps=2)
    compute = trainer._compute_loss

    def compute_loss(model, inputs):
        loss = compute(model, inputs)
        return loss * math.nan if trainer.state.global_step == 1 and trainer._step == 2 else loss

    trainer._compute_loss = compute_loss
    trainer.train()
    losses = [entry["loss"] for entry in training_log(trainer)]
    assert [math.isnan(loss) for loss in losses] == [False, True, False]
    assert training_log(trainer)[-1]["skipped_steps"] == 1
    assert all(values.isfinite().all() for values in trainer.model.parameters())


def test_broken_steps_in_a_row_end_the_run_with_a_checkpoint(make_trainer, tmp_path):
    options = {"output_dir": str(tmp_path / "run"), "max_steps": 9, "max_skipped_steps": 3}
    trainer = make_trainer(trainer_options={"callbacks": [Poison(0, 2, 3, 4)]}, **options)
    with pytest.raises(
        RunCannotGoOn, match="3 steps in a row.*`max_skipped_steps`.*ended after step 5, which is saved"
    ):
        trainer.train()
    assert [path.name for path in Path(tmp_path, "run").iterdir() if path.is_dir()] == ["checkpoint-5"]
    trainer.train(resume_from_checkpoint=True)  # the poison is over
    assert trainer.state.global_step == 9 and trainer.skipped_steps == 0


def test_a_run_that_broken_steps_end_has_its_teacher_of_the_last_one(make_self_taught, tmp_path):
    make_self_taught("whole", [Poison(1)], save_strategy="steps", save_steps=2).train()
    with pytest.raises(RunCannotGoOn):
        make_self_taught("cut off", [Poison(1)], max_skipped_steps=1).train()
    one, two = (load_file(tmp_path / name / "checkpoint-2" / "teacher.safetensors") for name in ("whole", "cut off"))
    assert one.keys() == two.keys() and all(torch.equal(values, two[name]) for name, values in one.items())


def test_a_broken_student_is_not_saved(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1 weights of the student hold NaN or infinity \(lm_head.weight\)"):
        trainer.save_model(str(tmp_path / "result"))
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    "options, name",
    [({"max_skipped_steps": 0}, "max_skipped_steps"), ({"learning_rate": math.nan}, "learning_rate")],
)
def test_numbers_that_cannot_be_are_refused(make_config, options, name):
    with pytest.raises(ValueError, match=f"`{name}` is {options[name]}"):
        make_config(**options)
