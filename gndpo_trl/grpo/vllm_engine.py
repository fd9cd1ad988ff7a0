"""
A vLLM engine that samples from the prompts that it is given, and is asked whether it did.

TRL hands vLLM prompts whose image placeholders are already expanded. A colocated vLLM expands them once more, and the
model samples from a prompt that nobody scores. Here it looks them up instead, by the rules of its own by which it would
have expanded them, whatever the family of the model.
"""

import copy
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from types import MethodType
from typing import Any
from weakref import WeakSet

import pyarrow.compute as pc
import requests
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from packaging.version import Version
from PIL import Image
from requests.adapters import HTTPAdapter
from trl.generation.vllm_client import VLLMClient, to_openai_messages
from trl.generation.vllm_generation import VLLMGeneration
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from .ranks import raised_on_all_ranks
from .vllm_adapter import AdapterSync


# What TRL 1.16 supports, without 0.31.0, whose bound on transformers excludes the versions that this package needs.
MIN_VLLM, BELOW_VLLM = "0.22.0", "0.31.0"


class ExactVLLMClient(VLLMClient):
    """TRL's client of a vLLM server, which believes the server only what it reports."""

    def _post(self, url: str, **kwargs) -> dict:
        if not url.endswith("/inference/v1/generate"):
            return super()._post(url, **kwargs)
        request = {**kwargs.pop("json"), "return_token_ids": True}
        response = super()._post(url, json=request, **kwargs)
        check_prompt_ids([request["token_ids"]], [response.get("prompt_token_ids")])
        return response

    def reset_encoder_cache(self) -> None:
        """Make the server forget the embeddings of images that it has seen."""
        response = self.session.post(f"{self.base_url}/reset_encoder_cache")
        response.raise_for_status()

    def settings(self) -> dict:
        """What the server runs with, see [`engine_settings`]."""
        info = self.get_server_info()
        model_config = info["model_config"]
        multimodal = model_config.get("multimodal_config") or {}
        limit = (multimodal.get("limit_per_prompt") or {}).get("image")
        lora_config = info.get("lora_config") or {}
        return {
            "version": self._get(f"{self.base_url}/version")["version"],
            "logprobs_mode": model_config["logprobs_mode"],
            "dtype": str(model_config["dtype"]).removeprefix("torch."),
            "max_model_len": model_config["max_model_len"],
            "images_per_prompt": limit.get("count") if isinstance(limit, dict) else limit,
            "max_lora_rank": lora_config.get("max_lora_rank"),
            # It is there where adapters may be loaded, for those who post.
            "loads_adapters": self.session.get(f"{self.base_url}/v1/load_lora_adapter").status_code == 405,
        }

    def try_an_image(self, image_token_id: int) -> int:
        """
        Send an image through everything that training will use.

        Args:
            image_token_id (`int`):
                Token that stands for a part of an image.

        Returns:
            `int`: number of tokens in an image's placeholder, as the server sees it, that stand for no part of it.

        Raises:
            `ValueError`: if the server's chat template takes no message with an image.
        """
        images = [Image.new("RGB", (64, 64))]
        message = {"role": "user", "content": [{"type": "image", "image": images[0]}]}
        body = {"model": self.model, "messages": to_openai_messages([message]), "max_tokens": 1}
        try:
            (features,) = self.image_features([images])
            prompt_ids = self._post(f"{self.base_url}/v1/chat/completions/render", json=body)["token_ids"]
            (placeholder,) = features["mm_placeholders"]["image"]
        except OSError:  # it cannot be reached
            raise
        except Exception as error:  # TRL's client raises nothing else at an answer that is none
            raise ValueError(
                f"The vLLM server at {self.base_url} takes no image: TRL sends images in a user's message, without a system "
                "message, and the server's chat template has to render it, whatever that of the student is. Serve an image-text "
                f"model, with a template that does (`--chat-template`). The answer was: {error!r}"
            ) from error
        length = prompt_ids.count(image_token_id)
        run = {"offset": prompt_ids.index(image_token_id), "length": length}
        self.generate([prompt_ids], features=[{**features, "mm_placeholders": {"image": [run]}}], max_tokens=1)
        return placeholder["length"] - length


class Left(Exception):
    """Whoever made a request does not wait for it any more."""


class RequestSession(requests.Session):
    """
    A session whose requests end when it is left, wherever they are; Python waits for the threads that TRL makes them in.

    Args:
        like (`requests.Session`): Whose headers and tries it has.
        url (`str`): What it asks.
    """

    def __init__(self, like: requests.Session, url: str):
        super().__init__()
        self.headers = like.headers
        self.is_left, self.opened = False, WeakSet()
        self.mount(url, _RequestAdapter(self, like.get_adapter(url)))

    def leave(self) -> None:
        self.is_left = True
        for connection in list(self.opened):
            if connection.sock is not None:
                with suppress(OSError):  # it is closed already
                    connection.sock.shutdown(socket.SHUT_RDWR)


class _RequestAdapter(HTTPAdapter):
    """Tells a session of its connections, and opens none for one that is left."""

    def __init__(self, session: RequestSession, like: HTTPAdapter):
        self._session_of = session
        super().__init__(max_retries=like.max_retries, pool_maxsize=like._pool_maxsize)

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, **kwargs)
        session = self._session_of
        pools = {}
        for scheme, pool_class in {"http": HTTPConnectionPool, "https": HTTPSConnectionPool}.items():

            class Connection(pool_class.ConnectionCls):
                def connect(self):
                    if session.is_left:
                        raise Left
                    super().connect()
                    session.opened.add(self)

            pools[scheme] = type(pool_class.__name__, (pool_class,), {"ConnectionCls": Connection})
        self.poolmanager.pool_classes_by_scheme = pools


class NotedRequest:
    """In the place of TRL's client: notes what it is asked for, and answers with nothing."""

    def __init__(self):
        self.images: list | None = None

    def image_features(self, images: list) -> list[None]:
        self.images = images
        return [None] * len(images)

    def generate(self, prompts: list[list[int]], features: list | None = None, **options: Any) -> dict[str, Any]:
        self.prompts, self.options = prompts, options
        return {"prompt_ids": [], "completion_ids": [], "logprobs": None}


class NotedAnswer:
    """In the place of TRL's client: has the answer to one request, and to no other."""

    def __init__(self, noted: NotedRequest, answer: dict[str, Any]):
        self.noted, self.answer = noted, answer

    def generate(self, prompts: list[list[int]], features: list | None = None, **options: Any) -> dict[str, Any]:
        noted = self.noted
        changed = [name for name, value in options.items() if noted.options.get(name) != value]
        if prompts != noted.prompts or changed:
            what = ", ".join(f"`{name}` was {noted.options[name]!r}" for name in changed) or "there were other prompts"
            raise ValueError(
                f"A batch was sampled ahead for something else than what is asked for now: {what}. Change nothing of the sampling "
                "while the student learns, or set `sampling_lead` to 0."
            )
        return self.answer


class ExactVLLMGeneration(VLLMGeneration):
    """
    TRL's sampler, which samples from the prompts that it is given and from no others. A server's can be asked ahead.

    Raises:
        `ValueError`: before sampling, if a prompt leaves no room for a completion, or if a server sees another number
            of tokens in an image; after sampling, on every rank, if vLLM reports another prompt than it was given.
    """

    settings: dict
    adapter: AdapterSync | None = None  # where a server gets it in the place of all weights
    between_requests: Callable[[], Any] = staticmethod(nullcontext)  # lasts while weights are sent
    _answer: tuple | None = None  # to what is asked next; empty where another rank has it
    _session: RequestSession | None = None  # of the requests that were made ahead

    @cached_property
    def extra_image_tokens(self) -> int:
        """Of a server, which the main process alone can ask."""
        return self.vllm_client.try_an_image(self.processing_class.image_token_id)

    def sync_weights(self):
        with self.between_requests():
            if self.adapter is None:
                super().sync_weights()
            else:
                with raised_on_all_ranks():
                    self.adapter.send(getattr(self, "vllm_client", None), self._dist.gather_params)
            # vLLM keeps what the vision tower made of images that it has seen, and TRL has it forget only the text.
            if self.mode == "colocate":
                self.llm.llm_engine.reset_encoder_cache()
            elif self.accelerator.is_main_process:
                self.vllm_client.reset_encoder_cache()

    def request(self, prompts: list[list[int]], images: list | None, num_generations: int) -> Callable[[], Any]:
        """
        What `generate` would ask a server for; the arguments are those of `generate`, on all ranks together.

        Returns:
            `Callable`: asks the server, in any thread, and returns what `answered` takes. It does nothing on other ranks than
                the one that asks.
        """
        noted = NotedRequest()
        with self._client_is(noted):
            self._sample(prompts, images, num_generations)
        if not self.accelerator.is_main_process:
            return lambda: None
        if self._session is None:
            self._session = RequestSession(self.vllm_client.session, self.vllm_client.base_url)
        client = copy.copy(self.vllm_client)
        client.session = self._session

        def ask() -> tuple[NotedRequest, dict[str, Any]]:
            features = None
            if noted.images is not None:
                pairs = zip(client.image_features(noted.images), noted.prompts, strict=True)
                features = [self._place_features(*pair) for pair in pairs]
            answer = client.generate(noted.prompts, features=features, **noted.options)
            noted.images = None
            return noted, answer

        return ask

    @contextmanager
    def answered(self, answer: Any) -> Iterator[None]:
        """Have `generate` return what a request made ahead has got; on all ranks."""
        self._answer = answer or ()
        try:
            yield
        finally:
            self._answer = None

    def why_away(self) -> Exception | None:
        """What is wrong where a server does not answer; asked on the main process."""
        try:
            self.vllm_client.session.get(f"{self.vllm_client.base_url}/health").raise_for_status()
        except requests.RequestException as error:
            return error
        return None

    def leave_requests(self) -> None:
        """End those that are under way."""
        if self._session is not None:
            self._session.leave()
            self._session = None

    @contextmanager
    def _client_is(self, client: Any) -> Iterator[None]:
        own = getattr(self, "vllm_client", None)
        self.vllm_client = client
        try:
            yield
        finally:
            self.vllm_client = own

    def _sample(self, prompts, images, num_generations, profiler=None):
        """TRL's `generate`, of prompts that leave room for a completion. Rows without images are None to it."""
        for row, prompt in enumerate(prompts):
            check_prompt_length(f"The prompt of row {row} of a batch", len(prompt), self.settings["max_model_len"])
        images = images and [of_row or None for of_row in images]
        return super().generate(prompts, images, num_generations, profiler)

    def generate(self, prompts, images, num_generations, profiler=None):
        client = nullcontext()
        if self.mode == "colocate":
            client = expanded_prompts(self.llm)
        elif self._answer:
            client = self._client_is(NotedAnswer(*self._answer))
        if self._answer is not None:
            images = None  # they went with the request
        with client:
            prompt_ids, *completions = self._sample(prompts, images, num_generations, profiler)
        check_prompt_ids(prompts, prompt_ids)
        return prompt_ids, *completions

    def _place_features(self, features, prompt_ids):
        placed = super()._place_features(features, prompt_ids)
        if placed is None:
            return None
        extra = self.extra_image_tokens
        pairs = zip(features["mm_placeholders"]["image"], placed["mm_placeholders"]["image"], strict=True)
        for number, (theirs, ours) in enumerate(pairs):
            if theirs["length"] - extra != ours["length"]:
                raise ValueError(
                    f"The vLLM server makes {theirs['length'] - extra} tokens of image {number} of a prompt and the "
                    f"student's processor {ours['length']}, so they process images differently. Start the server with "
                    "the student's processor files, and with no `--mm-processor-kwargs` of its own."
                )
        return placed


@contextmanager
def expanded_prompts(llm) -> Iterator[None]:
    """Have a vLLM engine look up the image placeholders of its prompts, which are already expanded."""
    processor = llm.llm_engine.renderer.mm_processor
    if processor is None:  # a text model
        yield
        return

    def look_up(self, token_ids, mm_prompt_updates):
        return token_ids, self._find_mm_placeholders(token_ids, mm_prompt_updates)

    processor._apply_prompt_updates = MethodType(look_up, processor)
    try:
        yield
    finally:
        del processor._apply_prompt_updates


def engine_settings(generation: VLLMGeneration) -> dict:
    """
    What a vLLM engine runs with, the same on all ranks.

    Returns:
        `dict` with keys `version`, `logprobs_mode`, `dtype`, `max_model_len` (tokens of prompt and completion),
        `images_per_prompt` (`None` without a limit), and of a server `max_lora_rank` (`None`: it takes no adapters) and
        `loads_adapters` (while it runs).
    """
    if generation.mode == "server":
        settings = None
        if generation.accelerator.is_main_process:
            settings = generation.vllm_client.settings()
        return broadcast_object_list([settings], from_process=0)[0]
    import vllm

    model_config = generation.llm.llm_engine.model_config
    multimodal = model_config.multimodal_config
    return {
        "version": vllm.__version__,
        "logprobs_mode": model_config.logprobs_mode,
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "max_model_len": model_config.max_model_len,
        "images_per_prompt": None if multimodal is None else multimodal.get_limit_per_prompt("image"),
    }


def check_version(version: str, where: str) -> None:
    if not Version(MIN_VLLM) <= Version(Version(version).base_version) < Version(BELOW_VLLM):
        raise ValueError(
            f"{where} is vLLM {version}, which TRL's sampler or transformers cannot work with. Install a version from "
            f'{MIN_VLLM} to below {BELOW_VLLM}, as `pip install "gndpo-trl[vllm]"` does.'
        )


def check_prompt_ids(given: list[list[int]], reported: list[list[int] | None]) -> None:
    """Raise `ValueError` if vLLM reports prompts other than those that it was given, naming the first difference."""
    for row, (ours, theirs) in enumerate(zip(given, reported, strict=True)):
        if theirs is None:
            raise ValueError(
                "vLLM does not report which prompt it sampled from, so nothing vouches for its image tokens. Use a "
                "newer vLLM for the server, or `vllm_mode: colocate`."
            )
        ours, theirs = list(ours), list(theirs)
        if ours != theirs:
            same = (one == other for one, other in zip(ours, theirs, strict=False))
            position = next((i for i, is_same in enumerate(same) if not is_same), min(len(ours), len(theirs)))
            raise ValueError(
                f"vLLM sampled row {row} from another prompt than the one that is trained on: {len(theirs)} tokens "
                f"instead of {len(ours)}, different from position {position} on. If there are images, vLLM expands "
                "their placeholders differently for this model; if not, look for `truncate_prompt_tokens` in "
                "`generation_kwargs`."
            )


def check_prompt_length(which: str, length: int, max_model_len: int) -> None:
    if length >= max_model_len:
        raise ValueError(
            f"{which} has {length} tokens, but vLLM holds {max_model_len} of prompt and completion together. Raise "
            "`vllm_max_model_length` (`--max-model-len` of a server), or drop longer prompts from the data."
        )


def check_image_limit(dataset: Dataset, limit: int | None) -> None:
    """Raise `ValueError` if rows of a dataset's column `images` hold more images than vLLM takes in a prompt."""
    if limit is None or "images" not in (getattr(dataset, "column_names", None) or ()):
        return
    if not isinstance(dataset, Dataset):  # a stream is not read ahead
        return
    batches = dataset.select_columns("images").with_format("arrow").iter(batch_size=256)
    most = max((pc.max(pc.list_value_length(batch["images"])).as_py() or 0 for batch in batches), default=0)
    if most > limit:
        raise ValueError(
            f"The data have prompts with {most} images, but vLLM takes {limit}. Raise the server's "
            "`--limit-mm-per-prompt`, or drop these rows."
        )
