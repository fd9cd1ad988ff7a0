import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent

# The first multi-process run of DeepSpeed on a machine compiles its CPU collectives, which takes two minutes.
TIMEOUT = 300

CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "num_generations": 1,
    "max_completion_length": 24,
    "max_steps": 1,
    # The step of plain gradient descent with rate 1 is the gradient, whatever holds it in pieces.
    "optim": "sgd",
    "learning_rate": 1.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "shuffle_dataset": False,
}


@dataclass
class Run:
    returncode: int
    output: str
    reports: list[dict]  # one for each rank
    folder: Path


def launcher(accelerate_config: str | None) -> list[str]:
    """Command that starts a script: a plain process, or two of them as a recipe for CPUs (or a file) says."""
    if accelerate_config is None:
        return [sys.executable]
    is_recipe = not accelerate_config.endswith(".yaml")
    config_file = ROOT / f"recipes/accelerate/cpu/{accelerate_config}.yaml" if is_recipe else accelerate_config
    options = ["--config_file", str(config_file), "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, for DeepSpeed's compilation
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="session")
def launch(checkpoints, tmp_path_factory):
    """`launch(accelerate_config, family, config=..., worker=..., **spec)` runs a worker and returns what came of it."""

    def run(
        accelerate_config: str | None,
        family: str = "qwen3",
        config: dict | None = None,
        worker: str = "run_training.py",
        **spec,
    ) -> Run:
        folder = tmp_path_factory.mktemp("run")
        spec = {
            "model": checkpoints[f"{family}-student"],
            "teacher": checkpoints[f"{family}-teacher"],
            "images": family != "qwen3",
            "config": {**CONFIG, "output_dir": str(folder / "out"), **(config or {})},
            "report": str(folder),
            "save": str(folder / "saved"),
            **spec,
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        result = subprocess.run(
            [*launcher(accelerate_config), str(WORKERS / worker), str(folder / "spec.json")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            env=environment(),
        )
        reports = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
        return Run(result.returncode, result.stdout, reports, folder)

    return run
