"""Two processes that train together, each with its own engine or both with one server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parent


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_every_rank_agrees_with_its_sampler(checkpoints, servers, tmp_path, mode):
    check(checkpoints["qwen25vl-student"], tmp_path, vllm_mode=mode, vllm_server_base_url=servers["qwen25vl"])


def test_every_rank_agrees_with_a_server_that_gets_the_adapter_alone(
    checkpoints, image_server_with_adapters, tmp_path
):
    adapter = {"r": 4, "target_modules": r".*language_model.*(q_proj|v_proj|down_proj)"}
    options = {"vllm_mode": "server", "vllm_server_base_url": image_server_with_adapters, "learning_rate": 0.1}
    check(checkpoints["qwen25vl-student"], tmp_path, adapter=adapter, **options)


def check(model: str, tmp_path: Path, **options) -> None:
    options = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 20.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_vllm": True,
        "vllm_server_timeout": 200.0,
        "vllm_importance_sampling_correction": True,
        **options,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(FOLDER / "two_ranks.py"), model, json.dumps(options)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), str(FOLDER.parent), str(FOLDER)]),
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-5000:]
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert all(len(report["own"]) == 2 and max(report["own"]) < 1e-5 for report in reports)
    assert reports[0]["samples"] != reports[1]["samples"] and max(reports[0]["all"]) < 1e-5
