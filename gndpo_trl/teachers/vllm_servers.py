"""Requests to vLLM servers, which may be away for a while."""

import logging
import os
import threading
import time
from itertools import count
from typing import Any

import requests
from requests.adapters import HTTPAdapter


logger = logging.getLogger(__name__)

# Answers that another try may change: too many requests, a server that is starting, a proxy in front of none.
TRIED_AGAIN = (408, 429, 500, 502, 503, 504)

# Seconds: to be connected, and between tries, doubled from the first to the last.
CONNECT, FIRST_WAIT, LONGEST_WAIT = 10, 0.5, 30

# What vLLM answers where a log-prob is NaN, which JSON does not know.
NAN_IN_ANSWER = "Out of range float values"

# What to do about a refusal, by status and path.
REMEDIES: dict[Any, str] = {
    401: "Put the server's key into the environment variable `VLLM_API_KEY`.",
    (404, "/inference/v1/generate"): "From vLLM 0.30 on, a server that reads images needs `--enable-scale-out`.",
    (404, "/detokenize"): "Pass the teacher's tokenizer as `teacher_processing_class`, or name it in "
    "`teacher_model_name_or_path`, to have that compared with the student's.",
}


class ServerError(RuntimeError):
    """A server that gives no usable answer; the message names its URL."""


class Refusal(ServerError):
    """A server that does not take a request as it is; `status` is that of HTTP."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class NaNInAnswer(Refusal):
    """A server that cannot write down its answer, because there is a NaN in it."""


class VLLMServers:
    """
    Servers of one and the same model.

    Args:
        urls (`list[str]`): Base URLs, as `http://host:8000`.
        timeout (`float`): Seconds after which a request has failed, tries included.
        connections (`int`, *optional*, defaults to 1): Requests to each server at a time.
    """

    def __init__(self, urls: list[str], timeout: float, connections: int = 1):
        self.urls, self.timeout = urls, timeout
        self.is_over = threading.Event()
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_connections=len(urls), pool_maxsize=connections))
        if key := os.environ.get("VLLM_API_KEY"):  # the name under which the server reads it
            self.session.headers["Authorization"] = f"Bearer {key}"

    def ask(self, path: str, body: dict[str, Any] | None = None, first: int = 0) -> dict[str, Any]:
        """
        The answer of a server: of the one at position `first`, or of the next one that is there.

        Servers are tried in turn, with pauses of half a second to half a minute after each round. One that hangs keeps a
        request for its part of the time.

        Args:
            path (`str`): Path after the base URL.
            body (`dict`, *optional*): What to post. Without it the path is read.
            first (`int`, *optional*, defaults to 0): Position of the server to begin with.

        Raises:
            `Refusal`: if a server refuses the request, as a `NaNInAnswer` if that is for a NaN.
            `ServerError`: if none has answered in time, or after `give_up`.
        """
        deadline = time.monotonic() + self.timeout
        for tries in count():
            url = self.urls[(first + tries) % len(self.urls)]
            try:
                return self._try(url, path, body)
            except requests.RequestException as error:
                reason = str(error)[:500]
            if tries == 0:
                logger.warning(
                    "The vLLM server at %s does not answer (%s). It is asked again, for up to %g seconds.",
                    *(url, reason, self.timeout),
                )
            rounds, place = divmod(tries + 1, len(self.urls))
            pause = min(FIRST_WAIT * 2 ** (rounds - 1), LONGEST_WAIT) if place == 0 else 0
            if time.monotonic() + pause > deadline or self.is_over.wait(pause):
                raise ServerError(
                    f"The vLLM server at {' or '.join(self.urls)} has not answered for {self.timeout:g} seconds "
                    f"(`teacher_server_timeout`) and {tries + 1} tries. The last one, at {url}: {reason}"
                )

    def _try(self, url: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        method, seconds = "GET" if body is None else "POST", self.timeout / len(self.urls)
        response = self.session.request(method, url + path, json=body, timeout=(min(CONNECT, seconds), seconds))
        if response.status_code in TRIED_AGAIN:
            raise requests.HTTPError(f"status {response.status_code}: {response.text}")
        if response.status_code == 200:
            try:
                return response.json()
            except requests.JSONDecodeError as error:
                raise Refusal(f"{url} answers {path} with no JSON, so it is no vLLM server.", 200) from error
        if NAN_IN_ANSWER in response.text:
            raise NaNInAnswer(f"The vLLM server at {url} has NaN in its answer.", response.status_code)
        remedy = REMEDIES.get((response.status_code, path)) or REMEDIES.get(response.status_code, "")
        raise Refusal(
            f"The vLLM server at {url} refuses {path} with status {response.status_code}: {response.text[:1000]}. "
            f"{remedy}".rstrip(),
            response.status_code,
        )

    def give_up(self) -> None:
        """Have all requests fail that are being tried again."""
        self.is_over.set()
