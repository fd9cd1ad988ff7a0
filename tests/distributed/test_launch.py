"""Real launches: saving, offloading, LoRA; and what is known before one."""

import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ADAMW, CONFIG, FOUR_STEPS, ROOT, environment
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("accelerate_config", ["zero3"])
def test_offloading_to_the_cpu_trains_as_without(launch, accelerate_config):
    """With Adam, which DeepSpeed then runs as an implementation of its own; after two steps they agree closely."""
    config = {**ADAMW, "max_steps": 2, "max_completion_length": 8}
    offloaded = launch(f"{accelerate_config}_offload", config=config)
    assert offloaded.returncode == 0, offloaded.output
    kept = launch(accelerate_config, config=config)  # whose processes stay for the tests that follow
    assert kept.returncode == 0, kept.output
    found = load_file(offloaded.folder / "saved" / "model.safetensors")
    for name, weight in load_file(kept.folder / "saved" / "model.safetensors").items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("accelerate_config", ["ddp", "zero2", "zero3"])
def test_a_run_leaves_checkpoints_of_the_student_alone_and_a_model_that_loads(uninterrupted, accelerate_config):
    run = uninterrupted(accelerate_config)
    checkpoint = run.folder / "out" / "checkpoint-3"
    assert len(list(checkpoint.glob("generation_buffer_*.pt"))) == 2
    assert AutoModelForCausalLM.from_pretrained(run.folder / "saved").num_parameters() > 0
    # No file is larger than the student with its optimizer could be.
    weights = load_file(run.folder / "saved" / "model.safetensors")
    student = sum(weight.numel() for weight in weights.values())
    for path in checkpoint.rglob("*"):
        assert path.stat().st_size < 4 * 4 * student, path


@pytest.mark.parametrize("accelerate_config", ["ddp", "zero2"])
def test_two_processes_go_on_from_the_checkpoint_of_one(launch, accelerate_config):
    """In the middle of a generation batch, whose rest is of no use to them."""
    config = {**FOUR_STEPS, "per_device_train_batch_size": 4}
    one = launch(None, config=config) if accelerate_config == "ddp" else launch("zero2", config=config)
    assert one.returncode == 0
    checkpoint = one.folder / "out" / "checkpoint-3"
    if accelerate_config == "zero2":  # DeepSpeed's own state is of two processes, as is another's batch size
        config["per_device_train_batch_size"] = 2
    run = launch(accelerate_config, config=config, resume=str(checkpoint))
    assert run.returncode == 0, run.output
    assert [report["global_step"] for report in run.reports] == [4, 4]
    assert all(report["has_generated"] for report in run.reports), "a rank waits for the others for good"


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


@pytest.mark.processes
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
        ({}, {"generation_batch_size": 7}, "`generation_batch_size` is 7, but has to be divisible"),
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
