"""A server that samples text as `vllm serve` does and takes new weights, from a file in the place of NCCL; no vLLM is needed."""

import itertools
import tempfile
import threading
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from stand_in_server import Answer, StandInServer
from trl.generation import vllm_client, vllm_generation
from trl.generation.vllm_client import VLLMClient

from gndpo_trl.grpo.vllm_engine import MIN_VLLM


class StandInSampler(StandInServer):
    """
    Samples from the weights that it has when a request comes.

    Attributes:
        asked (`list`): Prompts of every request, in order.
        num_running (`int`): Requests that have not been answered.
        interrupted (`list`): Number of requests that were running when weights came.
    """

    def __init__(self, path: str):
        self.asked: list[list[list[int]]] = []
        self.interrupted: list[int] = []
        self.num_running = 0
        self.counter = itertools.count()
        super().__init__(path)

    def handle_error(self, request, client_address):
        pass  # the other side has left

    def answer(self, path: str, body: Any) -> Answer:
        path = path.partition("?")[0]
        if path == "/v1/completions":
            return 200, {"choices": self.sample(body)}
        if path == "/collective_rpc":
            self.interrupted.append(self.num_running)
            self.model.load_state_dict(load_file(f"{body['kwargs']['weights_path']}/model.safetensors"), strict=False)
        model_config = {"logprobs_mode": "processed_logprobs", "dtype": "float32", "max_model_len": self.max_model_len}
        answers = {"/version": {"version": MIN_VLLM}, "/server_info": {"vllm_config": {"model_config": model_config}}}
        if path == "/v1/load_lora_adapter":
            return 404, {}
        return (200, answers[path]) if path in answers else (200, super().answer(path, body)[1])

    @torch.no_grad()
    def sample(self, body: Any) -> list[dict]:
        generator = torch.Generator().manual_seed(next(self.counter))
        self.asked.append(body["prompt"])
        choices = []
        for prompt in body["prompt"]:
            rows = torch.tensor([prompt] * body["n"])
            logps = []
            for _ in range(body["max_tokens"]):
                with self.lock:
                    log_probs = self.model(input_ids=rows).logits[:, -1].log_softmax(-1)
                ids = log_probs.exp().multinomial(1, generator=generator)
                logps.append(log_probs.gather(-1, ids))
                rows = torch.cat([rows, ids], dim=1)
            for row, of_row in zip(rows[:, len(prompt) :].tolist(), torch.cat(logps, dim=1).tolist(), strict=True):
                tokens = [f"token_id:{id}" for id in row]
                logprobs = {"tokens": tokens, "token_logprobs": of_row, "top_logprobs": [None] * len(row)}
                choices.append({"prompt_token_ids": prompt, "token_ids": row, "logprobs": logprobs})
        return choices


def stand_in(monkeypatch) -> None:
    """Have TRL believe that there is a vLLM, and send weights by files."""
    for module in (vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda: True)
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", send_by_file)


def send_by_file(client: VLLMClient, metadata: list, named_params: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: weight.detach().clone().contiguous() for name, weight in named_params}
        save_file(weights, f"{folder}/model.safetensors")
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        client.session.post(f"{client.base_url}/collective_rpc", json=body).raise_for_status()


def watched(server: StandInSampler) -> threading.Event:
    """Counts what is running, and holds the answers to requests while the event that it returns is not set."""
    goes_on = threading.Event()
    goes_on.set()
    answer = server.answer

    def counted(path: str, body: Any) -> Answer:
        if path != "/v1/completions":
            return answer(path, body)
        with server.lock:
            server.num_running += 1
        try:
            content = answer(path, body)
            goes_on.wait(60)
            return content
        finally:
            with server.lock:
                server.num_running -= 1

    server.answer = counted
    return goes_on
