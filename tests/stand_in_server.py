"""A small HTTP server that scores text and pictures as `vllm serve` does, and can be told to misbehave."""

import base64
import io
import json
import math
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor


Answer = tuple[int, Any]  # status and content


class StandInServer(ThreadingHTTPServer):
    """
    Runs a model in this process, at `url`, until `stop`.

    Args:
        path (`str`): Checkpoint of a Qwen3, or of a Qwen2.5-VL.
        max_model_len (`int`, *optional*, defaults to 256): Most tokens of a row, with the one that is generated.
        port (`int`, *optional*): Port; any that is free without it.
        max_logprobs (`int`, *optional*, defaults to 20): Most log-probs of a position, beside that of its own token.
        host (`str`, *optional*, defaults to `"localhost"`): Address that it listens on.

    Attributes:
        misbehave (`Callable`): `misbehave(path, body, answer)` returns the answer that is sent; it may also sleep.
        requests (`list`): Path and body of every request.
        headers (`list`): And its headers.
        cards (`list`): What it says of the models that it serves.
        pictures (`list`): The pictures that it was sent.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self, path: str, max_model_len: int = 256, port: int = 0, max_logprobs: int = 20, host: str = "localhost"
    ):
        self.path, self.max_model_len, self.max_logprobs = path, max_model_len, max_logprobs
        reads_pictures = hasattr(AutoConfig.from_pretrained(path), "vision_config")
        self.model = (AutoModelForImageTextToText if reads_pictures else AutoModelForCausalLM).from_pretrained(path)
        self.processor = AutoProcessor.from_pretrained(path)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.pictures: list[Image.Image] = []
        self.misbehave: Callable[[str, Any, Answer], Answer] = lambda path, body, answer: answer
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[Message] = []
        self.cards = [{"id": "teacher", "root": path, "max_model_len": max_model_len}]
        self.lock = threading.Lock()
        self.connections: list[socket.socket] = []
        super().__init__((host, port), Handler)
        self.url = f"http://{host}:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def stop(self) -> None:
        self.shutdown()
        for connection in self.connections:
            with suppress(OSError):  # closed by the other side
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The rows whose log-probs were asked for, in order."""
        bodies = [body for path, body in self.requests if path == "/v1/completions" and "prompt_logprobs" in body]
        return [tuple(row) for body in bodies for row in body["prompt"]]

    def answer(self, path: str, body: Any) -> Answer:
        if path == "/v1/models":
            return 200, {"data": self.cards}
        if path == "/detokenize":
            return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
        asked = body or {}
        wanted = asked.get("sampling_params", asked).get("prompt_logprobs")
        if wanted is not None and wanted > self.max_logprobs:
            return 400, {
                "error": {"message": f"Requested prompt logprobs of {wanted}, max allowed: {self.max_logprobs}"}
            }
        if path == "/inference/v1/generate" and self.tokenizer is not self.processor:
            ids, features = self.expand(body)
            return 200, {"prompt_token_ids": ids, "prompt_logprobs": self.score(ids, wanted, **features)}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        for row in body["prompt"]:
            if max(row) >= self.model.config.get_text_config().vocab_size:
                return 400, {"error": {"message": f"Token id {max(row)} is out of vocabulary"}}
            if len(row) + body["max_tokens"] > self.max_model_len:
                return 400, {"error": {"message": f"This model's maximum context length is {self.max_model_len}"}}
        return 200, {
            "choices": [
                {"prompt_token_ids": row, "prompt_logprobs": self.score(row, wanted)} for row in body["prompt"]
            ]
        }

    def expand(self, body: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The ids with as many placeholders for each picture as it has features, and what the model is given of it."""
        urls = [part["url"] for part in body["content_parts"]]
        pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
        self.pictures += pictures
        images = self.processor.image_processor
        features = dict(images(images=pictures, return_tensors="pt"))
        counts = iter((features["image_grid_thw"].prod(-1) // images.merge_size**2).tolist())
        placeholder = self.model.config.image_token_id
        ids = [id for given in body["token_ids"] for id in [given] * (next(counts) if given == placeholder else 1)]
        return ids, {**features, "mm_token_type_ids": (torch.tensor([ids]) == placeholder).long()}

    @torch.no_grad()
    def score(self, row: list[int], num_others: int | None, **features: torch.Tensor) -> list[dict | None] | None:
        if num_others is None:
            return None
        with self.lock:
            log_probs = self.model(input_ids=torch.tensor([row]), **features).logits[0].log_softmax(-1)
        positions: list[dict | None] = [None]
        for place, id in enumerate(row[1:]):
            ids = [id, *log_probs[place].topk(num_others).indices.tolist()]
            positions.append({str(id): {"logprob": log_probs[place, id].item()} for id in ids})
        return positions


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null"))

    def reply(self, body):
        self.server.requests.append((self.path, body))
        self.server.headers.append(self.headers)
        status, content = self.server.misbehave(self.path, body, self.server.answer(self.path, body))
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def unknown(answer: Answer, logprob: float | None = math.nan, every: int = 5) -> Answer:
    """The answer with another log-prob, or none, at every fifth position."""
    for choice in answer[1].get("choices", []):
        for position in (choice["prompt_logprobs"] or [])[every::every]:
            for entry in (position or {}).values():
                entry["logprob"] = logprob
    return answer
