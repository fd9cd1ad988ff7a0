"""The real vLLM engine on a CPU; what stands in for a GPU is in `vllm_stand_ins.py`."""

import os
import signal
import socket
import subprocess
import sys


# Read by vLLM when it is imported, here and in the processes of the server.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are shared with other processes
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

import pytest
import vllm_models
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from vllm_stand_ins import start_engine, update_named_params


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Paths of a student and a teacher of each family: `{family}-student`, `{family}-teacher`."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        f"{family}-{role}": vllm_models.save(family, root / f"{family}-{role}", seed)
        for family in ("qwen3", "qwen25vl", "internvl")
        for seed, role in enumerate(("student", "teacher"))
    }


@pytest.fixture
def make_config(make_config):
    """Configurations under which every step changes the weights, whatever the samples are worth."""
    return lambda config_class, **options: make_config(config_class, **{"weight_decay": 20.0, **options})


@pytest.fixture(scope="session")
def engines():
    """Colocated engines by model, shared by all tests: each takes tens of seconds to start, and new weights in none."""
    started = {}

    def start(model: str, **options):
        if model not in started:
            started[model] = start_engine(model, **options)
        return started[model]

    return start


@pytest.fixture(autouse=True)
def shared_engines(engines, monkeypatch):
    monkeypatch.setattr(vllm_generation, "LLM", engines)


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """Starts a server of a checkpoint, and returns its process and its base URL before it is up."""
    logs = tmp_path_factory.mktemp("servers")
    processes = []

    def start(model: str, max_logprobs: int = -1, max_lora_rank: int | None = None) -> tuple[subprocess.Popen, str]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        options = {
            "model": model,
            "port": port,
            "dtype": "float32",
            "max-model-len": 256,
            "max-num-seqs": 16,
            "max-num-batched-tokens": 2048,
            "logprobs-mode": "processed_logprobs",
            "max-logprobs": max_logprobs,
            "limit-mm-per-prompt": '{"image": 3}',
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-scale-out"]
        if max_lora_rank is not None:
            command.append("--enable-lora")
            options["max-lora-rank"] = max_lora_rank
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with open(logs / f"{port}.log", "w") as log:
            environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            )
        return processes[-1], f"http://localhost:{port}"

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the engine's own processes
            process.wait()


@pytest.fixture(scope="session")
def servers(checkpoints, serve) -> dict[str, str]:
    """Base URLs of servers of the image-text students; they come up while other tests run."""
    return {family: serve(checkpoints[f"{family}-student"])[1] for family in ("qwen25vl", "internvl")}


@pytest.fixture(scope="session")
def spare_server(checkpoints, serve) -> tuple[subprocess.Popen, str]:
    """Process and base URL of another server of Qwen2.5-VL's student, for the test that kills it."""
    return serve(checkpoints["qwen25vl-student"])


@pytest.fixture(scope="session")
def image_server_with_adapters(checkpoints, serve) -> str:
    """Base URL of one of Qwen2.5-VL's student that takes adapters."""
    return serve(checkpoints["qwen25vl-student"], max_lora_rank=8)[1]


@pytest.fixture
def weights_by_file(monkeypatch):
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", update_named_params)


@pytest.fixture(scope="session", autouse=True)
def early_servers(request):
    """Servers start with the session, not with the first test that needs them."""
    for name in ("servers", "spare_server"):
        if any(name in item.fixturenames for item in request.session.items):
            request.getfixturevalue(name)
