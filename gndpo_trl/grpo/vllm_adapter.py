"""A LoRA adapter as all that a vLLM server needs of a student whose other weights stay as they were."""

from pathlib import Path
from typing import Any

import requests
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor


# What the adapter is called on the server, and its folder in `output_dir`.
NAME = "student_adapter"

# Fields of a LoRA configuration that vLLM does not read, or reads as something else, and their values without effect.
PLAIN_LORA = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}


class AdapterSync:
    """
    Sends a vLLM server the student's LoRA adapter, in files that the server reads.

    Args:
        model (`peft.PeftModel`): The student.
        folder (`Path`): Where the files go; the server finds them under the same path.
        accelerator ([`~accelerate.Accelerator`]): Of the run.
    """

    def __init__(self, model: PeftModel, folder: Path, accelerator: Accelerator):
        self.model, self.folder, self.accelerator = model, folder / NAME, accelerator

    def send(self, client: Any, gather_params: Any) -> None:
        """
        Have the server sample from the adapter as it is now. All ranks call this together.

        Args:
            client ([`~trl.generation.vllm_client.VLLMClient`]): Of the server, on the main process.
            gather_params (`Callable`): Context in which parameters that ZeRO-3 shards are whole.

        Raises:
            `ValueError`: on the main process, if the server does not take the adapter.
        """
        name, weights = self.model.active_adapter, {}
        adapter = {key: weight for key, weight in self.model.named_parameters() if f".{name}." in key}
        with gather_params(list(adapter.values())), torch.no_grad():
            for key, weight in adapter.items():
                # On all ranks, of which one keeps it.
                whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
                if self.accelerator.is_main_process:
                    weights[key] = whole.detach().cpu().clone().contiguous()
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        published = get_peft_model_state_dict(
            self.model, state_dict=weights, adapter_name=name, save_embedding_layers=False
        )
        save_file(published, self.folder / SAFETENSORS_WEIGHTS_NAME)
        self.model.peft_config[name].save_pretrained(str(self.folder))
        body = {"lora_name": NAME, "lora_path": str(self.folder), "load_inplace": True}
        answer = client.session.post(f"{client.base_url}/v1/load_lora_adapter", json=body)
        if answer.status_code != requests.codes.ok:
            raise ValueError(
                f"The vLLM server at {client.base_url} did not take the student's adapter from {self.folder}: "
                f"{answer.status_code}, {answer.text[:500]}. It has to find `output_dir` under the same path, and modules that it "
                "can adapt. Without `--enable-lora` on the server, merged weights are sent instead."
            )
        client.model = NAME
        # Its prefixes are those of an adapter of this name, whatever its weights.
        client.reset_prefix_cache()


def why_not_alone(model: Any, max_lora_rank: int) -> str | None:
    """What of a student's adapter vLLM would read wrong, in words; `None` if nothing."""
    (name, *more), configs = model.active_adapters, model.peft_config
    config = configs[name]
    if more:
        return f"{len(more) + 1} adapters are active"
    if config.peft_type != "LORA":
        return f"its type is {config.peft_type}"
    for field, plain in PLAIN_LORA.items():
        if getattr(config, field, plain[0]) not in plain:
            return f"`{field}` is {getattr(config, field)!r}"
    if config.r > max_lora_rank:
        return f"its rank is {config.r}, and the server takes {max_lora_rank} (`--max-lora-rank`)"
    # It leaves the vision tower as it is, and says nothing; a head or an embedding takes options of its own.
    decoder = {id(weight) for weight in model.get_base_model().get_decoder().parameters()}
    adapted = (f".lora_A.{name}.", f".lora_B.{name}.")
    for key, weight in model.named_parameters():
        if weight.requires_grad and not (id(weight) in decoder and any(part in key for part in adapted)):
            return f"{key.removesuffix('.weight')} is trained, and vLLM would leave it as it is"
    return None
