"""The real vLLM engine on a CPU. What stands in for a GPU's machinery stands here, each with its reason."""

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
import vllm
import vllm._custom_ops
import vllm_models
from safetensors.torch import save_file
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient


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

    engine_class = vllm.LLM

    def start(model: str, **options) -> vllm.LLM:
        # oneDNN packs weights into a layout that new ones cannot be loaded into.
        vllm._custom_ops._supports_onednn = False
        if model not in started:
            # bfloat16, which a float32 checkpoint gets otherwise, would hide differences; CPUs compile no graphs.
            fixed = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 16}
            started[model] = engine_class(model, **{**options, **fixed})
        return started[model]

    return start


@pytest.fixture(autouse=True)
def shared_engines(engines, monkeypatch):
    monkeypatch.setattr(vllm_generation, "LLM", engines)


@pytest.fixture(scope="session")
def servers(checkpoints, tmp_path_factory):
    """Base URLs of servers of the image-text students; they come up while other tests run."""
    logs = tmp_path_factory.mktemp("servers")
    processes, urls = [], {}
    for family in ("qwen25vl", "internvl"):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        options = {
            "model": checkpoints[f"{family}-student"],
            "port": port,
            "dtype": "float32",
            "max-model-len": 256,
            "max-num-seqs": 16,
            "max-num-batched-tokens": 2048,
            "logprobs-mode": "processed_logprobs",
            "max-logprobs": -1,
            "limit-mm-per-prompt": '{"image": 3}',
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-scale-out"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with open(logs / f"{family}.log", "w") as log:
            environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            )
        urls[family] = f"http://localhost:{port}"
    yield urls
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)  # with the engine's own processes
        process.wait()


@pytest.fixture
def weights_by_file(monkeypatch, tmp_path):
    """TRL sends weights to a server by NCCL, which needs GPUs; here they go by a file, at the same moments."""

    def update_named_params(client, metadata, named_params):
        weights = {name: weight.detach().clone().contiguous() for name, weight in named_params}
        save_file(weights, tmp_path / "model.safetensors")
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}
        client.session.post(f"{client.base_url}/collective_rpc", json=body).raise_for_status()

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", update_named_params)


@pytest.fixture(scope="session", autouse=True)
def early_servers(request):
    """Servers start with the session, not with the first test that needs them."""
    if any("servers" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("servers")
