"""What stands in for a GPU's machinery, each with its reason."""

import tempfile

import vllm
import vllm._custom_ops
from safetensors.torch import save_file


engine_class = vllm.LLM


def start_engine(model: str, **options) -> vllm.LLM:
    # oneDNN packs weights into a layout that new ones cannot be loaded into.
    vllm._custom_ops._supports_onednn = False
    # bfloat16, which a float32 checkpoint gets otherwise, would hide differences; CPUs compile no graphs.
    fixed = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 16}
    return engine_class(model, **{**options, **fixed})


def update_named_params(client, metadata, named_params) -> None:
    """TRL sends weights to a server by NCCL, which needs GPUs; here they go by a file, at the same moments."""
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: weight.detach().clone().contiguous() for name, weight in named_params}
        save_file(weights, f"{folder}/model.safetensors")
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        client.session.post(f"{client.base_url}/collective_rpc", json=body).raise_for_status()
