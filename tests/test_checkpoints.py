"""Checkpoints in the middle of a generation batch, resumed as they were, otherwise, or from what a kill left."""

import errno
import fcntl
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from gndpo_trl.grpo.checkpoints import CheckpointMixin, last_whole_checkpoint
from gndpo_trl.grpo.run_folder import FULL, DiskFull, lock, why_not_written


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
        ({"max_completion_length": 6}, "`max_completion_length` was 8, is 6"),
        ({"generation_kwargs": {"top_k": 3}}, "`generation_kwargs` was None, is {'top_k': 3}"),
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


@pytest.mark.parametrize("family", ["qwen3", "internvl", "qwen25vl"])
def test_weights_that_are_saved_under_other_names_are_loaded(make_trainer, tmp_path, family):
    """Of a run that goes on, and of the best model: transformers would have left them as they are."""
    options = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    whole = make_trainer(family, output_dir=str(tmp_path / "whole"), max_steps=3, **options)
    whole.train()
    parts = make_trainer(family, output_dir=str(tmp_path / "parts"), max_steps=3, **options)
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, found), expected in zip(parts.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected), name

    start = make_trainer(family, **options)
    start.state.best_model_checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    start._load_best_model()
    for (name, found), expected in zip(start.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected), name


class Interrupt(TrainerCallback):
    """Ctrl-C after the third step, once."""

    is_over = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and not self.is_over:
            self.is_over = True
            raise KeyboardInterrupt


def test_an_interrupted_trainer_goes_on_as_a_new_one_would(make_trainer, text_dataset, tmp_path):
    options = {**MIDDLE, "max_steps": 6, "log_completions": True, "num_completions_to_print": 0}
    options["trainer_options"] = {"callbacks": [Interrupt()], "eval_dataset": text_dataset.select(range(2))}
    same = make_trainer(output_dir=str(tmp_path / "run"), per_device_eval_batch_size=4, **options)
    with pytest.raises(KeyboardInterrupt):
        same.train()
    assert same._step == 3 and same._buffered_inputs is not None  # in the middle of a generation batch
    same.evaluate()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    new = make_trainer(output_dir=str(tmp_path / "copy"), per_device_eval_batch_size=4, **options)
    for trainer in (same, new):
        trainer.train(resume_from_checkpoint=True)
    assert new.state.global_step == 6 and same._step == new._step
    found, expected = ({name: p.clone() for name, p in t.model.named_parameters()} for t in (same, new))
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    times = {"step_time", "time/generation", "time/teacher_scoring", "time/student_scoring"}
    entries = [
        [{k: v for k, v in entry.items() if k not in times} for entry in t.state.log_history if "loss" in entry]
        for t in (same, new)
    ]
    assert entries[0] == entries[1]


def test_another_run_of_the_same_trainer_begins_with_a_batch_of_its_own(make_trainer):
    trainer = make_trainer(max_steps=3, log_completions=True, **{**MIDDLE, "save_strategy": "no"})
    generated, generate = [], trainer._generate
    trainer._generate = lambda prompts: generated.append(prompts) or generate(prompts)
    for _ in range(2):
        trainer.train()
        Path(trainer.args.output_dir, "completions", "completions_00001.parquet").unlink()  # is written by each
    assert len(generated) == 2 and generated[0] == generated[1]


def test_a_later_epoch_goes_on_with_its_own_prompts(make_trainer, tmp_path):
    """Two epochs of three steps, with eight of their 24 prompts each."""
    options = {"max_steps": 6, "per_device_train_batch_size": 16, "max_completion_length": 4}
    options |= {"save_strategy": "steps", "save_steps": 1}

    def run(folder, checkpoint=None):
        trainer = make_trainer(output_dir=str(tmp_path / folder), **options)
        read, generate = {}, trainer._generate

        def note(prompts):
            read[trainer.state.global_step] = [prompt[0]["content"] for prompt in prompts[::2]]
            return generate(prompts)

        trainer._generate = note
        trainer.train(resume_from_checkpoint=checkpoint)
        return read, dict(trainer.model.named_parameters())

    read, expected = run("whole")
    assert all(len({*read[epoch], *read[epoch + 1], *read[epoch + 2]}) == 24 for epoch in (0, 3))
    for step in (3, 5):
        read_again, found = run(f"from {step}", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert read_again == {number: prompts for number, prompts in read.items() if number >= step}
        assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_a_run_that_is_over_makes_no_other_step(make_trainer, saved):
    trainer = make_trainer(output_dir=saved, max_steps=2, **MIDDLE)
    trainer._generate_and_score_completions = None
    with pytest.warns(UserWarning, match="checkpoint-2' is of step 2, and the run is over after 2"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    before = torch.load(f"{saved}/checkpoint-2/optimizer.pt")["state"][0]["step"]
    assert trainer.optimizer.state_dict()["state"][0]["step"] == before
    assert not Path(saved, "checkpoint-3").exists()


class Terminate(TrainerCallback):
    """SIGTERM in a step, as a scheduler sends it."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_sigterm_ends_is_not_finished(make_trainer, tmp_path, caplog, step):
    options = {"output_dir": str(tmp_path / "run"), "enable_jit_checkpoint": True, "max_steps": 4}
    terminate = Terminate(step)
    trainer = make_trainer(trainer_options={"callbacks": [terminate]}, **options)
    trainer._on_signal.jit_manager.kill_wait = 0
    before = signal.getsignal(signal.SIGTERM)
    if step == 4:
        assert trainer.train().global_step == 4
        return
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143 and "after step 2 of 4" in caplog.text
    assert last_whole_checkpoint(str(tmp_path / "run")).endswith("checkpoint-2")
    terminate.step = 3
    with pytest.raises(SystemExit):
        trainer.train(resume_from_checkpoint=True)
    assert last_whole_checkpoint(str(tmp_path / "run")).endswith("checkpoint-3")
    assert signal.getsignal(signal.SIGTERM) != before


class PressCtrlC(TrainerCallback):
    """Ctrl-C in a step, as often as it says."""

    def __init__(self, step: int, times: int = 1):
        self.step, self.times = step, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_the_step_that_it_ends(make_trainer, tmp_path, caplog):
    options = {"output_dir": str(tmp_path / "run"), "enable_jit_checkpoint": True, "max_steps": 4}
    press = PressCtrlC(2)
    trainer = make_trainer(trainer_options={"callbacks": [press]}, **options)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        KeyboardInterrupt, match="Ctrl-C ended the run after step 2 of 4.*`resume_from_checkpoint=True`"
    ):
        trainer.train()
    assert "the run ends after this step, with a checkpoint" in caplog.text
    assert last_whole_checkpoint(str(tmp_path / "run")).endswith("checkpoint-2")
    assert "has made 2 of 4 steps" in (tmp_path / "run" / "README.md").read_text()
    press.step, press.times = 3, 2
    with pytest.raises(KeyboardInterrupt, match="in step 3 of 4.*last whole checkpoint is .*checkpoint-2'"):
        trainer.train(resume_from_checkpoint=True)
    assert signal.getsignal(signal.SIGINT) == before
    press.times = 0
    assert trainer.train(resume_from_checkpoint=True).global_step == 4  # whose end is not saved
    assert "has made" not in (tmp_path / "run" / "README.md").read_text()


def test_a_run_that_a_signal_ends_has_its_teacher_of_that_step(make_self_taught, tmp_path):
    make_self_taught("whole", save_strategy="steps", save_steps=2).train()
    with pytest.raises(KeyboardInterrupt):
        make_self_taught("cut off", [PressCtrlC(2)], enable_jit_checkpoint=True).train()
    one, two = (load_file(tmp_path / name / "checkpoint-2" / "teacher.safetensors") for name in ("whole", "cut off"))
    assert one.keys() == two.keys() and all(torch.equal(values, two[name]) for name, values in one.items())


def test_ctrl_c_that_is_ignored_stays_so(make_trainer, tmp_path):
    """As in jobs that a script starts in the background."""
    options = {"output_dir": str(tmp_path / "run"), "enable_jit_checkpoint": True}
    trainer = make_trainer(trainer_options={"callbacks": [PressCtrlC(1)]}, **options)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert trainer.train().global_step == 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_without_checkpoints_says_what_is_lost(make_trainer):
    trainer = make_trainer(max_steps=4, trainer_options={"callbacks": [PressCtrlC(2)]})
    with pytest.raises(
        KeyboardInterrupt, match="in step 2 of 4: it is not finished. There is no checkpoint of it. With `ena"
    ):
        trainer.train()


def test_what_a_rollout_keeps_in_cpu_memory_stays_there():
    """The teacher's hidden states, in a run on an accelerator."""
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("meta")))
    home = {place: CheckpointMixin._back_home(trainer, torch.UntypedStorage(8), place) for place in ("cpu", "cuda:3")}
    assert {place: storage.device.type for place, storage in home.items()} == {"cpu": "cpu", "cuda:3": "meta"}


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


def test_nothing_of_a_checkpoint_is_written_after_what_makes_it_whole(make_trainer, tmp_path):
    """TRL writes the state of an adaptive entropy bonus last: a run that is killed before that would go on without."""
    options = {"entropy_coef": 0.1, "use_adaptive_entropy": True, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(output_dir=str(tmp_path / "run"), **options)
    trainer.train()
    files = sorted((tmp_path / "run" / "checkpoint-2").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert files[-1].name == "trainer_state.json" and "entropy_ctrl_state.json" in [path.name for path in files]
    resumed = make_trainer(output_dir=str(tmp_path / "run"), max_steps=3, **options)
    assert resumed.entropy_coef == 0.1 != trainer.entropy_coef
    resumed._generate_and_score_completions = None
    with pytest.raises(TypeError):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.entropy_coef == trainer.entropy_coef


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


def written(folder: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def test_a_folder_has_the_checkpoints_of_one_run(make_trainer, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "elsewhere")
    before = written(f"{saved}/checkpoint-2")
    new = make_trainer(output_dir=saved, max_steps=1, **MIDDLE)
    for checkpoint in (None, False, str(tmp_path / "elsewhere" / "checkpoint-2")):
        with pytest.raises(ValueError, match=r"has the checkpoints of another run \(checkpoint-2\).*or remove them"):
            new.train(resume_from_checkpoint=checkpoint)
    with pytest.warns(UserWarning, match="another run .checkpoint-2., which `resume_from_checkpoint=True` would take"):
        make_trainer(output_dir=saved, max_steps=1).train()  # which saves none
    assert written(f"{saved}/checkpoint-2") == before
    # What a run did not finish writing is no checkpoint: it is as if there were none.
    Path(saved, "checkpoint-2", "trainer_state.json").unlink()
    assert new.train().global_step == 1


def test_going_back_says_what_is_later(make_trainer, saved):
    make_trainer(output_dir=saved, max_steps=4, **MIDDLE).train(resume_from_checkpoint=True)
    again = make_trainer(output_dir=saved, max_steps=3, **MIDDLE)
    with pytest.warns(
        UserWarning, match="later checkpoints than the one that this run goes on from: checkpoint-4. Until"
    ):
        again.train(resume_from_checkpoint=f"{saved}/checkpoint-2/")


def test_a_trainer_that_trains_for_longer_keeps_its_checkpoints(make_trainer, tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path / "run"), **MIDDLE)
    trainer.train()
    before = written(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoints of this trainer's last run .* raise `trainer.args.max_steps`"):
        trainer.train()
    trainer.args.max_steps = 4
    assert trainer.train(resume_from_checkpoint=True).global_step == 4
    assert written(tmp_path / "run" / "checkpoint-2") == before
    trainer.args.output_dir, trainer.args.max_steps = str(tmp_path / "another"), 2
    assert trainer.train().global_step == 2
    assert [path.name for path in (tmp_path / "another").glob("checkpoint-*")] == ["checkpoint-2"]


def hold(folder: str, is_held) -> None:
    file = lock(folder)
    is_held.set()
    time.sleep(60)
    file.close()


def test_a_folder_is_held_by_one_run_until_that_is_dead(make_trainer, tmp_path):
    folder, context = str(tmp_path / "run"), multiprocessing.get_context("fork")
    is_held = context.Event()
    other = context.Process(target=hold, args=(folder, is_held))
    other.start()
    assert is_held.wait(10)
    trainer = make_trainer(output_dir=folder, **MIDDLE)
    with pytest.raises(RuntimeError, match=rf"Another run is writing to .*/run\): process {other.pid} on "):
        trainer.train()
    other.kill()
    other.join()
    assert trainer.train().global_step == 2


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="has no locks .*No locks available.*: nothing keeps a second run"):
        lock(str(tmp_path)).close()


# What torch says where the system said that there is no space.
LOST = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 57664 vs 57552")


def refuse_to_write(dir: str):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), dir)


def test_a_full_disk_is_called_that(make_trainer, saved, monkeypatch):
    def fail(*args, **kwargs):
        raise LOST

    trainer = make_trainer(output_dir=saved, max_steps=4, **MIDDLE)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(RuntimeError, match="unexpected pos"):  # there is room: it is something else
            trainer.train(resume_from_checkpoint=True)
        patch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
        with pytest.raises(
            DiskFull, match=rf"{saved}/checkpoint-4' is full.* The last whole checkpoint is '{saved}/checkpoint-2'"
        ):
            trainer.train(resume_from_checkpoint=True)
        patch.setattr(tempfile, "TemporaryFile", refuse_to_write)
        with pytest.raises(OSError, match=rf"'{saved}' can no longer be written to .Read-only file.* when it can"):
            trainer.train(resume_from_checkpoint=True)
        patch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
        patch.setattr(trainer.model, "save_pretrained", fail)
        with pytest.raises(DiskFull, match=rf"The disk or quota of '{saved}' is full"):
            trainer.save_model()
    assert trainer.train(resume_from_checkpoint=True).global_step == 4


def chained(error: Exception) -> RuntimeError:
    last = RuntimeError("could not write")
    last.__context__ = error
    return last


@pytest.mark.parametrize(
    "error, is_full",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (chained(OSError(errno.ENOSPC, "No space left on device")), True),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (LOST, False),
    ],
)
def test_an_error_that_is_a_full_disk(tmp_path, error, is_full):
    assert why_not_written(error, str(tmp_path)) in (FULL if is_full else (None,))
