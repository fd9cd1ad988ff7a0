"""Real launches: saving and resuming, LoRA, signals, failures, and mistakes in the launch itself."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import CONFIG, ROOT, WORKERS, environment, launcher
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("accelerate_config", ["ddp", "zero2", "zero3"])
def test_resuming_ends_in_the_weights_of_the_uninterrupted_run(launch, accelerate_config):
    """With sampled completions, and with the checkpoint in the middle of a generation batch."""
    config = {**ADAMW, "max_steps": 4, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    whole = launch(accelerate_config, config=config)
    assert whole.returncode == 0, whole.output
    checkpoint = whole.folder / "out" / "checkpoint-3"
    assert len(list(checkpoint.glob("generation_buffer_*.pt"))) == 2
    resumed = launch(accelerate_config, config=config, resume=str(checkpoint))
    assert resumed.returncode == 0, resumed.output
    assert resumed.reports[0]["global_step"] == 4
    expected = load_file(whole.folder / "saved" / "model.safetensors")
    found = load_file(resumed.folder / "saved" / "model.safetensors")
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert AutoModelForCausalLM.from_pretrained(whole.folder / "saved").num_parameters() > 0
    # Checkpoints hold the student alone: no file is larger than the student with its optimizer could be.
    student = sum(weight.numel() for weight in expected.values())
    for path in checkpoint.rglob("*"):
        assert path.stat().st_size < 4 * 4 * student, path


def test_offloading_to_the_cpu_trains_as_without(launch):
    """With Adam, which DeepSpeed then runs as an implementation of its own; after two steps they agree closely."""
    config = {**ADAMW, "max_steps": 2, "max_completion_length": 8}
    weights = {}
    for name in ("zero3", "zero3_offload"):
        run = launch(name, config=config)
        assert run.returncode == 0, run.output
        weights[name] = load_file(run.folder / "saved" / "model.safetensors")
    for name, weight in weights["zero3"].items():
        torch.testing.assert_close(weights["zero3_offload"][name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("accelerate_config", ["zero2", "zero3"])
@pytest.mark.parametrize("lora", [True, "4bit"])
def test_lora_students(launch, accelerate_config, lora):
    run = launch(accelerate_config, config={**ADAMW, "max_steps": 2, "gradient_checkpointing": True}, lora=lora)
    assert run.returncode == 0, run.output
    assert (run.reports[0]["num_4bit_layers"] > 0) == (lora == "4bit")
    adapter = load_file(run.folder / "saved" / "adapter_model.safetensors")
    assert all("lora" in name for name in adapter)
    assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)
    # The whole adapter, not one rank's shard of it.
    assert all(weight.ndim == 2 and 4 in weight.shape for weight in adapter.values())


@pytest.mark.parametrize("accelerate_config", ["ddp", "zero3"])
@pytest.mark.parametrize(
    "fail, family, message",
    [
        ("teacher", "qwen3", "The teacher gave non-finite log-probs"),
        ("image", "internvl", "cannot identify image file"),
    ],
)
def test_a_rank_that_fails_brings_the_job_down_with_its_message(launch, accelerate_config, fail, family, message):
    start = time.monotonic()
    run = launch(accelerate_config, family, {"per_device_train_batch_size": 2}, fail=fail)
    assert run.returncode != 0
    assert message in run.output
    assert not run.reports  # nobody finished
    assert time.monotonic() - start < 60 + 30  # a minute after a start of less than 30 seconds


@pytest.mark.parametrize("accelerate_config", ["ddp", "zero2"])
def test_sigterm_saves_a_checkpoint_on_all_ranks_and_ends(launch, checkpoints, tmp_path, accelerate_config):
    config = {**CONFIG, **ADAMW, "output_dir": str(tmp_path / "out"), "max_steps": 100_000}
    config.update(enable_jit_checkpoint=True, save_strategy="steps", save_steps=50_000)
    spec = {
        "model": checkpoints["qwen3-student"],
        "teacher": checkpoints["qwen3-teacher"],
        "config": config,
        "report": str(tmp_path),
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = [*launcher(accelerate_config), str(WORKERS / "run_training.py"), str(tmp_path / "spec.json")]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
        deadline = time.monotonic() + 300
        while "score/mean" not in (tmp_path / "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)  # as a scheduler does; the launcher passes it on to its workers
        process.wait(timeout=60)
    output = (tmp_path / "log").read_text()
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert not (checkpoint / "checkpoint-is-incomplete.txt").exists(), output
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    assert len(list(tmp_path.glob("rank*.json"))) == 2, output  # both came to the end of the script
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    resumed = launch(
        accelerate_config,
        config={**config, "max_steps": step + 1, "enable_jit_checkpoint": False},
        resume=str(checkpoint),
    )
    assert resumed.returncode == 0 and resumed.reports[0]["global_step"] == step + 1, resumed.output


def test_the_training_script_under_torchrun_with_a_deepspeed_file(checkpoints, text_dataset, tmp_path):
    text_dataset.to_parquet(tmp_path / "data.parquet")
    options = {
        **{key: CONFIG[key] for key in ("use_cpu", "bf16", "gradient_checkpointing", "max_completion_length")},
        **{"max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 2, "report_to": "none"},
        "model_name_or_path": checkpoints["qwen3-student"],
        "teacher_model_name_or_path": checkpoints["qwen3-teacher"],
        "dataset_name": tmp_path / "data.parquet",
        "output_dir": tmp_path / "out",
        "deepspeed": ROOT / "recipes" / "deepspeed" / "zero3.json",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    result = subprocess.run(
        [*command, str(ROOT / "examples" / "train_gndpo.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        env=environment(),
    )
    # Not the exit code: gloo's threads sometimes abort a process that leaves its group, when all is done.
    assert f"Model saved to {tmp_path / 'out'}." in result.stdout, result.stdout
    expected = load_file(f"{checkpoints['qwen3-student']}/model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: weight.shape for name, weight in found.items()} == {n: w.shape for n, w in expected.items()}


@pytest.mark.parametrize(
    "extra, config, message",
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, r"launched with `mixed_precision: bf16`.*`bf16=False`"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"},
            {"gradient_accumulation_steps": 2},
            r"`gradient_accumulation_steps: 8`.*`gradient_accumulation_steps=2`.*`auto`",
        ),
        ({}, {"ddp_backend": "gloo"}, r"`ddp_backend` is 'gloo'.*single process"),
        ({}, {"generation_batch_size": 7}, r"generation_batch_size \(7\) must be divisible by the global batch size"),
    ],
)
def test_mistakes_in_the_launch_are_named_before_any_model_is_loaded(monkeypatch, make_config, extra, config, message):
    for name, value in extra.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        make_config(**config)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_for_accelerate_are_ones_it_knows(path):
    config = load_config_from_file(str(path))  # raises on a key that accelerate does not know
    assert config.num_processes == (2 if path.parent.name == "cpu" else 1 if path.stem == "single" else 8)
    assert config.mixed_precision == ("no" if path.parent.name == "cpu" else "bf16")


def test_a_world_size_that_does_not_divide_the_generation_batch(launch):
    run = launch("ddp", config={"per_device_train_batch_size": 2, "generation_batch_size": 6})
    assert run.returncode != 0
    assert "generation_batch_size (6) must be divisible by the global batch size (4)" in run.output
    assert "Loading weights" not in run.output


@pytest.mark.parametrize(
    "recipe, right, wrong, message",
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
def test_saving_shards_alone_is_refused_at_the_start(launch, tmp_path, recipe, right, wrong, message):
    text = (ROOT / "recipes" / "accelerate" / "cpu" / f"{recipe}.yaml").read_text()
    assert right in text
    (tmp_path / "wrong.yaml").write_text(text.replace(right, wrong))
    config = {"per_device_train_batch_size": 2, "save_strategy": "steps"}
    run = launch(str(tmp_path / "wrong.yaml"), config=config, fsdp=recipe == "fsdp2")
    assert run.returncode != 0
    assert message in run.output and "Loading weights" not in run.output


def test_fsdp_on_cpus_is_refused_instead_of_running_something_else(launch):
    run = launch("fsdp2", config={"per_device_train_batch_size": 2})
    assert run.returncode != 0
    assert "FSDP was asked for on CPUs" in run.output and "Loading weights" not in run.output


def test_a_sharded_teacher_is_not_offloaded_by_hand(launch):
    run = launch("zero3", config={"teacher_offload": True})
    assert run.returncode != 0
    assert "`teacher_offload` is True" in run.output and "offload_param_device: cpu" in run.output
