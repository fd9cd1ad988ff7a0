import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import CONFIG, environment
from worker import TASKS


ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent

# The first multi-process runs of DeepSpeed in an environment compile its CPU collectives and its Adam for CPUs.
TIMEOUT = 600

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0, "per_device_train_batch_size": 2}


@dataclass
class Run:
    returncode: int
    output: str
    reports: list[dict]  # one for each rank
    folder: Path


@dataclass
class Job:
    """A job that running processes have been given. All they do is in one log, this job's output from `start` on."""

    process: subprocess.Popen
    log: Path
    start: int
    folder: Path

    @property
    def output(self) -> str:
        return self.log.read_bytes()[self.start :].decode(errors="replace")

    def wait(self) -> Run:
        deadline = time.monotonic() + TIMEOUT
        while self.process.poll() is None and not (self.folder / "done").exists():
            if time.monotonic() > deadline:
                self.process.terminate()
                pytest.fail(f"Not done after {TIMEOUT} s: {self.output}")
            time.sleep(0.05)
        reports = [json.loads(path.read_text()) for path in sorted(self.folder.glob("rank*.json"))]
        return Run(self.process.poll() or 0, self.output, reports, self.folder)


def launcher(accelerate_config: str) -> list[str]:
    """Command that starts a script in two processes, as a recipe for CPUs (or a file) says."""
    is_recipe = not accelerate_config.endswith(".yaml")
    config_file = ROOT / f"recipes/accelerate/cpu/{accelerate_config}.yaml" if is_recipe else accelerate_config
    options = ["--config_file", str(config_file), "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


class Processes:
    """Processes that run `worker.py`, as one way of launching starts them."""

    def __init__(self, accelerate_config: str, folder: Path):
        self.accelerate_config, self.folder, self.num_jobs = accelerate_config, folder, 0
        command = [*launcher(accelerate_config), str(WORKERS / "worker.py"), str(folder), str(os.getpid())]
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())

    def begin(self, spec: dict, folder: Path) -> Job:
        log = self.folder / "log"
        job = Job(self.process, log, log.stat().st_size, folder)
        (folder / "spec.json").write_text(json.dumps(spec))
        (folder / "spec.json").rename(self.folder / f"job{self.num_jobs}.json")  # appears with all of its content
        self.num_jobs += 1
        return job


class Launcher:
    """
    `launch(accelerate_config, family, config=..., task=..., **spec)` runs a job and returns what came of it.

    Processes take longer to start than most jobs to do, so they wait for the next job. They are replaced when they have
    ended, and by those of another way of launching. Without an `accelerate_config`, the job runs in the tests' process.
    """

    def __init__(self, checkpoints: dict[str, str], make_folder: Callable[[str], Path]):
        self.checkpoints, self.make_folder = checkpoints, make_folder
        self.processes: Processes | None = None

    def __call__(self, accelerate_config: str | None, *args, **kwargs) -> Run:
        if accelerate_config is not None:
            return self.begin(accelerate_config, *args, **kwargs).wait()
        spec, folder = self.specify(*args, **kwargs)
        report = TASKS[spec["task"]](spec)
        return Run(0, "", [json.loads(json.dumps(report))], folder)

    def begin(self, accelerate_config: str, *args, **kwargs) -> Job:
        spec, folder = self.specify(*args, **kwargs)
        if self.processes is None or self.processes.accelerate_config != accelerate_config:
            self.stop()
        if self.processes is None or self.processes.process.poll() is not None:
            self.processes = Processes(accelerate_config, self.make_folder("processes"))
        return self.processes.begin(spec, folder)

    def specify(
        self, family: str = "qwen3", config: dict | None = None, task: str = "train", **spec
    ) -> tuple[dict, Path]:
        folder = self.make_folder("run")
        return {
            "task": task,
            "model": self.checkpoints[f"{family}-student"],
            "teacher": self.checkpoints[f"{family}-teacher"],
            "images": family != "qwen3",
            "config": {**CONFIG, "output_dir": str(folder / "out"), **(config or {})},
            "report": str(folder),
            "save": str(folder / "saved"),
            **spec,
        }, folder

    def stop(self) -> None:
        """End the processes that wait: the next job is done by new ones."""
        if self.processes is not None and self.processes.process.poll() is None:
            self.processes.process.terminate()
            self.processes.process.wait(timeout=60)
        self.processes = None


@pytest.fixture(scope="session")
def launch(checkpoints, tmp_path_factory):
    launch = Launcher(checkpoints, tmp_path_factory.mktemp)
    yield launch
    launch.stop()


FOUR_STEPS = {**ADAMW, "max_steps": 4, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="session")
def uninterrupted(launch):
    """For each way of launching, one run of four steps with a checkpoint in the middle of a generation batch."""
    runs = {}

    def get(accelerate_config: str) -> Run:
        if accelerate_config not in runs:
            runs[accelerate_config] = launch(accelerate_config, config=FOUR_STEPS)
            assert runs[accelerate_config].returncode == 0, runs[accelerate_config].output
        return runs[accelerate_config]

    return get


def pytest_itemcollected(item: pytest.Item) -> None:
    if "launch" in item.fixturenames:
        item.add_marker(pytest.mark.processes)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that are launched alike follow each other, and share their processes."""
    mine = [index for index, item in enumerate(items) if "launch" in item.fixturenames]
    groups: dict[str | None, list[pytest.Item]] = {}
    for index in mine:
        groups.setdefault(items[index].callspec.params["accelerate_config"], []).append(items[index])
    for index, item in zip(mine, (item for group in groups.values() for item in group), strict=True):
        items[index] = item
