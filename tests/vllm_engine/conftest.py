"""The real vLLM engine on a CPU. What stands in for a GPU's machinery stands here, each with its reason."""

import os


# Read by vLLM when it is imported, here and in the processes of the server.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are shared with other processes
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

import pytest
import torch
import vllm
import vllm._custom_ops
import vllm_models
from datasets import Dataset
from trl.generation import vllm_generation


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Paths of a student and a teacher of each family: `{family}-student`, `{family}-teacher`."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        f"{family}-{role}": vllm_models.save(family, root / f"{family}-{role}", seed)
        for family in ("qwen3", "qwen25vl", "internvl")
        for seed, role in enumerate(("student", "teacher"))
    }


@pytest.fixture(scope="session")
def engines():
    """Colocated engines by model, shared by all tests: each takes tens of seconds to start, and new weights in none."""
    started = {}

    def start(model: str, **options) -> vllm.LLM:
        # oneDNN packs weights into a layout that new ones cannot be loaded into.
        vllm._custom_ops._supports_onednn = False
        if model not in started:
            # bfloat16, which a float32 checkpoint gets otherwise, would hide differences; CPUs compile no graphs.
            fixed = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 16}
            started[model] = vllm.LLM(model, **{**options, **fixed})
        return started[model]

    return start


@pytest.fixture(autouse=True)
def shared_engines(engines, monkeypatch):
    monkeypatch.setattr(vllm_generation, "LLM", engines)
