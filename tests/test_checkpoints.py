"""Checkpoints in the middle of a generation batch, resumed as they were, otherwise, or from what a kill left."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from gndpo_trl.grpo.checkpoints import last_whole_checkpoint


# Four micro-batches for each generation, one for each step: a checkpoint after two steps is in the middle.
MIDDLE = {"steps_per_generation": 4, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def saved(make_trainer, tmp_path):
    make_trainer(output_dir=str(tmp_path / "run"), **MIDDLE).train()
    assert (tmp_path / "run" / "checkpoint-2" / "generation_buffer_0.pt").exists()
    return str(tmp_path / "run")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"steps_per_generation": 8}, "`steps_per_generation` was 4, is 8"),
        ({"steps_per_generation": 2}, "`steps_per_generation` was 4, is 2"),
        ({"per_device_train_batch_size": 2}, "`per_device_train_batch_size` was 4, is 2"),
        ({"num_generations": 4}, "`num_generations` was 2, is 4"),
        ({"num_iterations": 2}, "`num_iterations` was 1, is 2"),
        ({"beta": 0.1}, "`reference model` was False, is True"),
        ({"score_clip": 1.0}, "`score_clip` was 5.0, is 1.0"),
        ({"advantage_normalization": "none"}, "`advantage_normalization` was global, is none"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_layout_generates_anew(make_trainer, saved, changes, reason):
    trainer = make_trainer(output_dir=saved, max_steps=6, **{**MIDDLE, **changes})
    generated = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: generated.append(inputs) or generate(inputs)
    with pytest.warns(UserWarning, match=f"not for this run .{reason}.*new ones are generated"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and generated
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(math.isfinite(loss) for loss in losses)
    # In step with the sampler, whose batches come once for every micro-batch of a generation.
    steps = trainer.args.steps_per_generation * trainer.num_iterations
    assert len(generated) == math.ceil(6 / steps) - 2 // steps


def test_the_same_layout_goes_on_without_a_word(make_trainer, saved, recwarn):
    trainer = make_trainer(output_dir=saved, max_steps=4, learning_rate=1e-4, **MIDDLE)
    trainer._generate_and_score_completions = None  # nothing to generate before the fifth step
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert not [warning for warning in recwarn if "completions" in str(warning.message)]


def test_a_checkpoint_is_whole_or_absent(make_trainer, saved, monkeypatch):
    """A run that dies while it writes what is left of a generation batch, after weights and optimizer."""
    trainer = make_trainer(output_dir=saved, max_steps=8, **MIDDLE)
    save = torch.save

    def die(state, path, **kwargs):
        if "generation_buffer" in str(path):
            raise KeyboardInterrupt
        save(state, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=True)
    broken = Path(saved, "checkpoint-6")
    assert (broken / "model.safetensors").exists() and (broken / "optimizer.pt").exists()
    with pytest.warns(UserWarning, match="checkpoint-6' is left out: the run that wrote it ended"):
        assert last_whole_checkpoint(saved) == f"{saved}/checkpoint-4"
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is .*checkpoint-6', which is no whole checkpoint"):
        make_trainer(output_dir=saved, max_steps=8, **MIDDLE).train(resume_from_checkpoint=str(broken))
    resumed = make_trainer(output_dir=saved, max_steps=8, **MIDDLE)
    with pytest.warns(UserWarning, match="left out"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8


def test_a_checkpoint_that_is_written_again_forgets_the_old_one(make_trainer, saved):
    """Where the folder of an earlier run holds a later step, it must not pass for the new run's."""
    shutil.copytree(f"{saved}/checkpoint-2", f"{saved}/checkpoint-4")
    trainer = make_trainer(output_dir=saved, max_steps=4, **MIDDLE)
    trainer.train(resume_from_checkpoint=f"{saved}/checkpoint-2")
    # The fourth step ends a generation batch: there is nothing to keep of it.
    assert not list(Path(saved, "checkpoint-4").glob("generation_buffer_*"))


def test_nothing_to_go_on_from(make_trainer, tmp_path):
    with pytest.raises(
        ValueError, match="`resume_from_checkpoint` is True, but `output_dir` .* has no whole checkpoint"
    ):
        make_trainer(output_dir=str(tmp_path / "nowhere")).train(resume_from_checkpoint=True)
