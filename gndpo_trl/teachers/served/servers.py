"""The connection to vLLM servers, which may be away for a while, hang, or say anything."""

import asyncio
import copy
import json
import logging
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import lru_cache
from itertools import count
from typing import Any

import httpx


logger = logging.getLogger(__name__)

# Answers that another try may change: too many requests, a server that is starting, a proxy in front of none.
TRIED_AGAIN = (408, 429, 500, 502, 503, 504)

# Seconds: to be connected, and between tries, doubled from the first to the last.
CONNECT, FIRST_WAIT, LONGEST_WAIT = 10, 0.5, 30

# Largest answer that is read, in bytes, and what each byte of the request adds to it, times the log-probs at a position. A
# token takes some 6 bytes there, and 80 back for each of them.
LARGEST_ANSWER, LARGER_BY = 2**26, 100

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


class Away(Exception):
    """A server that another try may find."""


@lru_cache(maxsize=1)
def background_loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop of a thread in which requests wait; a forked process, which has no threads, gets another one."""
    loop = asyncio.new_event_loop()
    # A daemon, and no pool of threads, which Python would wait for at its end: a request may hang.
    threading.Thread(target=loop.run_forever, name="requests-to-the-teacher", daemon=True).start()
    return loop


def begin(coroutine: Coroutine) -> Future:
    """Have a request go on in the background."""
    return asyncio.run_coroutine_threadsafe(coroutine, background_loop(os.getpid()))


def finish(coroutine: Coroutine) -> Any:
    """Its answer, waited for; an interrupt ends the waiting and the request."""
    future = begin(coroutine)
    try:
        return future.result()
    finally:
        future.cancel()


class VLLMServers:
    """
    Servers of one and the same model.

    The key in the environment variable `VLLM_API_KEY` goes to them and to nobody else: redirects are not followed, and no
    `.netrc` is read.

    Args:
        urls (`list[str]`): Base URLs, as `http://host:8000`.
        timeout (`float`): Seconds after which a request has failed, tries included.
        connections (`int`, *optional*, defaults to 1): Requests for each server at a time. Further ones wait, which their
            time does not count.

    Raises:
        `ValueError`: if the key is none that HTTP can carry.
    """

    def __init__(self, urls: list[str], timeout: float, connections: int = 1):
        self.urls, self.timeout = urls, timeout
        self.places = asyncio.Semaphore(connections * len(urls))
        headers = {}
        if key := os.environ.get("VLLM_API_KEY", "").strip():  # the name under which the server reads it
            if not (key.isascii() and key.isprintable()):
                raise ValueError("`VLLM_API_KEY` has characters that no key has: only printable ASCII can be sent.")
            headers["Authorization"] = f"Bearer {key}"
        self.client = httpx.AsyncClient(
            headers=headers,
            follow_redirects=False,
            timeout=httpx.Timeout(None, connect=CONNECT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=connections * len(urls)),
        )

    def alone(self) -> "list[VLLMServers]":
        """Each server by itself."""
        servers = [copy.copy(self) for _ in self.urls]
        for server, url in zip(servers, self.urls, strict=True):
            server.urls = [url]
        return servers

    def __str__(self) -> str:
        return " or ".join(self.urls)

    def ask(self, path: str, body: dict[str, Any] | None = None, first: int = 0) -> dict[str, Any]:
        """The answer of a server, as `answer` gives it, waited for."""
        return finish(self.answer(path, body, first))

    async def answer(self, path: str, body: dict[str, Any] | None = None, first: int = 0) -> dict[str, Any]:
        """
        The answer of a server: of the one at position `first`, or of the next one that is there.

        Servers are tried in turn, with pauses of half a second to half a minute after each round. One that hangs keeps a
        request for its part of the time.

        Args:
            path (`str`): Path after the base URL.
            body (`dict`, *optional*): What to post. Without it the path is read.
            first (`int`, *optional*, defaults to 0): Position of the server to begin with.

        Returns:
            `dict`: what the JSON of the answer says.

        Raises:
            `Refusal`: if a server refuses the request, as a `NaNInAnswer` if that is for a NaN.
            `ServerError`: if none has answered in time, or if an answer is too large.
        """
        content = None if body is None else json.dumps(body).encode()
        num_logprobs = 1 if body is None else 1 + (body.get("sampling_params", body).get("prompt_logprobs") or 0)
        limit = LARGEST_ANSWER + LARGER_BY * num_logprobs * len(content or b"")
        async with self.places:
            tries, url, reason = 0, self.urls[0], ""
            try:
                async with asyncio.timeout(self.timeout):
                    for tries in count(1):
                        url = self.urls[(first + tries - 1) % len(self.urls)]
                        reason = "it was asked, and its answer has not come to an end"
                        try:
                            async with asyncio.timeout(self.timeout / len(self.urls)):
                                return await self._try(url, path, content, limit)
                        except TimeoutError:
                            pass
                        except (httpx.RequestError, Away) as error:
                            reason = printable(str(error) or type(error).__name__)[:500]
                        if tries == 1:
                            logger.warning(
                                "The vLLM server at %s does not answer (%s). It is asked again, for up to %g seconds.",
                                *(url, reason, self.timeout),
                            )
                        rounds, place = divmod(tries, len(self.urls))
                        if place == 0:
                            await asyncio.sleep(min(FIRST_WAIT * 2 ** (rounds - 1), LONGEST_WAIT))
            except TimeoutError as error:
                raise ServerError(
                    f"The vLLM server at {self} has not answered for {self.timeout:g} seconds "
                    f"(`teacher_server_timeout`) and {tries} tries. The last one, at {url}: {reason}"
                ) from error

    async def _try(self, url: str, path: str, content: bytes | None, limit: int) -> dict[str, Any]:
        method, headers = ("GET", {}) if content is None else ("POST", {"Content-Type": "application/json"})
        data = bytearray()
        async with self.client.stream(method, url + path, content=content, headers=headers) as response:
            async for part in response.aiter_bytes():
                data += part
                if len(data) > limit:
                    raise ServerError(f"The vLLM server at {url} answers {path} with more than {limit} bytes.")
        status, text = response.status_code, data.decode(errors="replace")
        if status in TRIED_AGAIN:
            raise Away(f"status {status}: {text}")
        if status == 200:
            try:
                answer = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise Refusal(f"{url} answers {path} with no JSON, so it is no vLLM server.", 200) from error
            if not isinstance(answer, dict):
                raise Refusal(f"{url} answers {path} with a {type(answer).__name__}, so it is no vLLM server.", 200)
            return answer
        if NAN_IN_ANSWER in text:
            raise NaNInAnswer(f"The vLLM server at {url} has NaN in its answer.", status)
        if response.has_redirect_location:
            raise Refusal(
                f"The vLLM server at {url} redirects {path} to another place, where neither prompts nor a key are sent. "
                "Give the URL of the server itself.",
                status,
            )
        remedy = REMEDIES.get((status, path)) or REMEDIES.get(status, "")
        raise Refusal(
            f"The vLLM server at {url} refuses {path} with status {status}: {printable(text[:1000])}. {remedy}".rstrip(),
            status,
        )


def printable(text: str) -> str:
    """The text without the characters that a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)
