"""Launches that end early: by a signal (and are resumed), by a rank that fails, by a mistake in the launch itself.

They come after the other files' tests, whose processes they end.
"""

import json
import signal
import time

import pytest
import torch
from conftest import ADAMW, FOUR_STEPS, ROOT
from safetensors.torch import load_file
from stand_in_server import StandInServer


def wait_for(words: str, job) -> None:
    """Until a job that goes on has said something, for five minutes at most."""
    deadline = time.monotonic() + 300
    while words not in job.output:
        assert job.process.poll() is None and time.monotonic() < deadline, job.output
        time.sleep(0.1)


@pytest.mark.parametrize("accelerate_config", ["ddp", "zero2"])
def test_sigterm_saves_a_checkpoint_on_all_ranks_and_ends(launch, accelerate_config):
    config = {**ADAMW, "max_steps": 100_000, "save_strategy": "steps", "save_steps": 50_000}
    job = launch.begin(accelerate_config, config={**config, "enable_jit_checkpoint": True}, save=None, last=True)
    wait_for("score/mean", job)
    job.process.send_signal(signal.SIGTERM)  # as a scheduler does; the launcher passes it on to its workers
    assert job.process.wait(timeout=60) != 0
    assert "It is not finished: go on with `resume_from_checkpoint=True`" in job.output
    (checkpoint,) = (job.folder / "out").glob("checkpoint-*")
    assert not (checkpoint / "checkpoint-is-incomplete.txt").exists(), job.output
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    assert not list(job.folder.glob("rank*.json")), job.output  # of a run that is over
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    resumed = launch(accelerate_config, config={**config, "max_steps": step + 1}, resume=str(checkpoint))
    assert resumed.returncode == 0 and resumed.reports[0]["global_step"] == step + 1, resumed.output


@pytest.mark.parametrize("accelerate_config", ["ddp", "zero3"])
@pytest.mark.parametrize(
    "fail, family, message",
    [
        ("teacher", "qwen3", "The teacher gave non-finite log-probs"),
        ("image", "internvl", "cannot identify image file"),
        ("sleep", "qwen3", "tokens the same log-prob, -3.5 nats"),
    ],
)
def test_a_rank_that_fails_brings_the_job_down_with_its_message(launch, accelerate_config, fail, family, message):
    start = time.monotonic()
    run = launch(accelerate_config, family, {"per_device_train_batch_size": 2}, fail=fail)
    assert run.returncode != 0
    assert message in run.output
    assert not run.reports  # nobody finished
    assert time.monotonic() - start < 60 + 30  # a minute after a start of less than 30 seconds


@pytest.mark.parametrize("accelerate_config", ["ddp"])
@pytest.mark.parametrize(
    "fail, words",
    [
        ("prompt_fn", "KeyError: 'no such brief'"),
        ("reward", "KeyError: 'no such answer'"),
        ("route", "KeyError: 'no such subject'"),
    ],
)
def test_what_a_users_function_raises_on_one_rank_ends_the_others(launch, accelerate_config, fail, words):
    config = {"per_device_train_batch_size": 2, "remove_unused_columns": False}
    run = launch(accelerate_config, config=config, prompt_fn=fail == "prompt_fn", fail=fail)
    assert run.returncode != 0 and not run.reports
    assert f"ValueError: {words}" in run.output  # of the other


@pytest.mark.parametrize("accelerate_config", ["zero2"])
def test_deepspeed_ends_with_a_gradient_that_is_not_finite_on_one_rank(launch, accelerate_config):
    run = launch(accelerate_config, config={**ADAMW, "max_steps": 3}, broken="loss")
    assert run.returncode != 0 and not run.reports
    assert run.output.count("ValueError: The gradient of step 2 is not finite, and DeepSpeed has applied it") >= 2
    assert not (run.folder / "saved").exists()


@pytest.mark.parametrize("accelerate_config", ["ddp", "zero2"])
def test_ctrl_c_saves_a_checkpoint_on_all_ranks_and_ends(launch, accelerate_config):
    config = {**ADAMW, "max_steps": 100_000, "save_strategy": "steps", "save_steps": 50_000}
    job = launch.begin(accelerate_config, config={**config, "enable_jit_checkpoint": True}, save=None, last=True)
    wait_for("score/mean", job)
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(timeout=60) != 0
    assert "KeyboardInterrupt: Ctrl-C ended the run after step" in job.output
    (checkpoint,) = (job.folder / "out").glob("checkpoint-*")
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2 and (checkpoint / "trainer_state.json").exists()
    assert not list(job.folder.glob("rank*.json")), job.output


def mislead_once(server: StandInServer) -> None:
    """Answer a single request, of one of the ranks, in a form that no server has."""
    asked = []

    def mislead(path, body, answer):
        asked.append(path)
        return (200, {"choices": [None]}) if len(asked) == 1 else answer

    server.misbehave = mislead


@pytest.mark.parametrize(
    "accelerate_config, end, message",
    [
        ("ddp", StandInServer.stop, "has not answered for 1 seconds"),
        ("zero2", mislead_once, "answers in another form"),
    ],
)
def test_a_teacher_that_does_not_answer_ends_all_ranks_with_a_checkpoint(
    launch, accelerate_config, checkpoints, end, message
):
    server = StandInServer(checkpoints["qwen3-teacher"])
    served = {"teacher_server_url": [server.url], "teacher_server_timeout": 1.0}
    job = launch.begin(accelerate_config, config={**ADAMW, "max_steps": 100_000, **served}, task="served")
    wait_for("step 2 is done", job)
    end(server)
    assert job.process.wait(timeout=60) != 0
    if end is mislead_once:
        server.stop()
    (checkpoint,) = (job.folder / "out").glob("checkpoint-*")
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert step >= 2 and job.output.count(f"step {step} is done") == 2
    assert job.output.count(f"The run ended after step {step}, which is saved") >= 2 and server.url in job.output
    assert message in job.output


@pytest.mark.parametrize("accelerate_config", ["ddp", "zero2", "zero3"])
def test_resuming_ends_in_the_weights_of_the_uninterrupted_run(launch, uninterrupted, accelerate_config):
    """With sampled completions, from the middle of a generation batch, by new processes."""
    whole = uninterrupted(accelerate_config)
    launch.stop()
    checkpoint = whole.folder / "out" / "checkpoint-3"
    resumed = launch(accelerate_config, config=FOUR_STEPS, resume=str(checkpoint))
    assert resumed.returncode == 0, resumed.output
    assert resumed.reports[0]["global_step"] == 4
    expected = load_file(whole.folder / "saved" / "model.safetensors")
    found = load_file(resumed.folder / "saved" / "model.safetensors")
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("accelerate_config", ["ddp"])
def test_a_world_size_that_does_not_divide_the_generation_batch(launch, accelerate_config):
    run = launch(accelerate_config, config={"per_device_train_batch_size": 2, "generation_batch_size": 6})
    assert run.returncode != 0
    assert (
        "`generation_batch_size` is 6, but has to be divisible by `per_device_train_batch_size` (2) × 2 processes"
        in run.output
    )
    assert "Loading weights" not in run.output


@pytest.mark.parametrize(
    "accelerate_config, right, wrong, message",
    [
        (
            "zero3",
            "zero3_save_16bit_model: true",
            "zero3_save_16bit_model: false",
            "`zero3_save_16bit_model: true` is",
        ),
        ("fsdp2", "FULL_STATE_DICT", "SHARDED_STATE_DICT", "Set `fsdp_state_dict_type: FULL_STATE_DICT`"),
    ],
)
def test_saving_shards_alone_is_refused_at_the_start(launch, tmp_path, accelerate_config, right, wrong, message):
    text = (ROOT / "recipes" / "accelerate" / "cpu" / f"{accelerate_config}.yaml").read_text()
    assert right in text
    (tmp_path / "wrong.yaml").write_text(text.replace(right, wrong))
    config = {"per_device_train_batch_size": 2, "save_strategy": "steps"}
    run = launch(str(tmp_path / "wrong.yaml"), config=config, fsdp=accelerate_config == "fsdp2")
    assert run.returncode != 0
    assert message in run.output and "Loading weights" not in run.output


@pytest.mark.parametrize("accelerate_config", ["fsdp2"])
def test_fsdp_on_cpus_is_refused_instead_of_running_something_else(launch, accelerate_config):
    launch.stop()  # those that pass for accelerators
    run = launch(accelerate_config, config={"per_device_train_batch_size": 2})
    assert run.returncode != 0
    assert "FSDP was asked for on CPUs" in run.output and "Loading weights" not in run.output


@pytest.mark.parametrize("accelerate_config", ["zero3"])
def test_a_sharded_teacher_is_not_offloaded_by_hand(launch, accelerate_config):
    run = launch(accelerate_config, config={"teacher_offload": True, "per_device_train_batch_size": 2})
    assert run.returncode != 0
    assert "`teacher_offload` is True" in run.output and "offload_param_device: cpu" in run.output
