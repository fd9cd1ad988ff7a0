"""The connection to servers that are slow, hang, send too much, or send it elsewhere; sockets say what servers should not."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from gndpo_trl.teachers.served import servers as connection
from gndpo_trl.teachers.served.questions import Question, ServedModel
from gndpo_trl.teachers.served.servers import Refusal, ServerError, VLLMServers, finish
from gndpo_trl.teachers.served.urls import are_one_server, check_urls


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def listen():
    """Starts a server that does with each connection, numbered from 0, what it is told to; its URL and what it received."""
    over, opened = threading.Event(), []

    def start(reply: Callable[[socket.socket, int, threading.Event], None]) -> SimpleNamespace:
        listener = socket.create_server(("localhost", 0))
        opened.append(listener)
        received: list[bytes] = []

        def talk(talker: socket.socket, number: int) -> None:
            try:
                received.append(talker.recv(65536))
                reply(talker, number, over)
            except OSError:
                pass  # the other side has left
            finally:
                talker.close()

        def accept() -> None:
            for number in range(1000):
                try:
                    talker, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(talker, number), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return SimpleNamespace(url=f"http://localhost:{listener.getsockname()[1]}", received=received)

    yield start
    over.set()
    for listener in opened:
        listener.close()


def drip(talker: socket.socket, over: threading.Event, data: bytes) -> None:
    while not over.wait(0.05):
        talker.sendall(data)


def answer(talker: socket.socket, status: bytes, content: bytes = b"{}", headers: bytes = b"") -> None:
    talker.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\n" % len(content) + headers + b"\r\n" + content)


def drip_content(talker, number, over):
    talker.sendall(OK + b"Content-Length: 1000000\r\n\r\n")
    drip(talker, over, b" ")


def drip_chunks(talker, number, over):
    talker.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    drip(talker, over, b"1\r\n \r\n")


def drip_headers(talker, number, over):
    talker.sendall(OK)
    drip(talker, over, b"X: y\r\n")


def refuse_then_hang(talker, number, over):
    if number == 0:
        answer(talker, b"503 Busy")
    else:
        over.wait(30)


@pytest.mark.parametrize("reply", [drip_content, drip_chunks, drip_headers, refuse_then_hang])
def test_a_request_has_failed_after_its_time(listen, reply):
    server = listen(reply)
    begin = time.monotonic()
    with pytest.raises(ServerError, match=f"{server.url} has not answered for 0.8 seconds"):
        VLLMServers([server.url], timeout=0.8).ask("/v1/models")
    assert 0.7 < time.monotonic() - begin < 2.5


def test_one_that_hangs_leaves_time_for_the_other(listen):
    hanging, other = listen(lambda talker, number, over: over.wait(30)), listen(lambda t, n, o: answer(t, b"200 OK"))
    assert VLLMServers([hanging.url, other.url], timeout=2.0).ask("/v1/models") == {}


@pytest.mark.parametrize("framing", [b"", b"Transfer-Encoding: chunked\r\n"])
def test_an_answer_without_an_end_is_not_read(listen, monkeypatch, framing):
    def flood(talker, number, over):
        talker.sendall(OK + framing + b"\r\n")
        while not over.is_set():
            talker.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")

    monkeypatch.setattr(connection, "LARGEST_ANSWER", 10_000)
    server = listen(flood)
    with pytest.raises(ServerError, match=f"{server.url} answers /v1/models with more than 10000 bytes"):
        VLLMServers([server.url], timeout=10.0).ask("/v1/models")


@pytest.mark.parametrize("status", [b"301 Moved", b"307 Temporary", b"308 Permanent"])
def test_redirects_are_not_followed(listen, monkeypatch, status):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    other = listen(lambda talker, number, over: answer(talker, b"200 OK"))
    server = listen(lambda t, n, o: answer(t, status, headers=f"Location: {other.url}/v1/completions\r\n".encode()))
    with pytest.raises(Refusal, match=f"{server.url} redirects /v1/completions.*Give the URL of the server itself"):
        VLLMServers([server.url], timeout=5.0).ask("/v1/completions", {"prompt": [[1, 2]]})
    assert server.received and not other.received


def test_the_key_is_that_of_the_environment_and_no_other(listen, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine localhost login someone password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    server = listen(lambda talker, number, over: answer(talker, b"200 OK"))
    VLLMServers([server.url], timeout=5.0).ask("/v1/models")
    assert b"authorization" not in server.received[0].lower()
    monkeypatch.setenv("VLLM_API_KEY", "secret\n")  # with the line's end that a file of keys has
    VLLMServers([server.url], timeout=5.0).ask("/v1/models")
    assert b"authorization: bearer secret\r\n" in server.received[1].lower()
    monkeypatch.setenv("VLLM_API_KEY", "sec\nret")
    with pytest.raises(ValueError, match="`VLLM_API_KEY` has characters") as error:
        VLLMServers([server.url], timeout=5.0)
    assert "ret" not in str(error.value).replace("characters", "")


def test_what_a_server_says_does_not_reach_the_terminal_as_it_is(listen):
    server = listen(lambda talker, number, over: answer(talker, b"400 Bad", b"\x1b]0;mine\x07 no"))
    with pytest.raises(Refusal, match=r"with status 400:  \]0;mine  no"):
        VLLMServers([server.url], timeout=5.0).ask("/v1/models")


def test_an_interrupt_ends_the_waiting_at_once(listen):
    server = listen(lambda talker, number, over: over.wait(30))
    begin = time.monotonic()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        VLLMServers([server.url], timeout=30.0).ask("/v1/models")
    assert time.monotonic() - begin < 3


QUESTION = Question((1, 2, 3), 2)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"choices": 1' + b"0" * 5000 + b"}",
        b"\xff\xfe",
        b"{}",
        b'{"choices": null}',
        b'{"choices": []}',
        b'{"choices": [null]}',
        b'{"choices": ["text"]}',
        b'{"choices": [{"prompt_logprobs": null}]}',
        b'{"choices": [{"prompt_logprobs": 3}]}',
        b'{"choices": [{"prompt_logprobs": [null, {"2": {"logprob": -1.0}}, {"3": -1.0}]}]}',
        b'{"choices": [{"prompt_logprobs": [null, {"2": {"logprob": -1.0}}, "3"]}]}',
        b'{"choices": [{"prompt_logprobs": [null, {"2": {"logprob": -1.0}}, {"3": {"logprob": "-1"}}]}]}',
        b'{"choices": [{"prompt_logprobs": [null, {"2": {"logprob": -1.0}}, {"3": {"logprob": 1e999}}]}]}',
        b'{"choices": [{"prompt_logprobs": [null, {"2": {"logprob": -1.0}}, {"3": {"logprob": [1]}}]}]}',
        b'{"choices": [{"prompt_token_ids": [9, 2, 3], "prompt_logprobs": [null, {"2": {"logprob": -1.0}}, {"3": {"logprob": -1.0}}]}]}',
    ],
)
def test_an_answer_of_any_other_form_is_an_error_of_the_server(listen, content):
    server = listen(lambda talker, number, over: answer(talker, b"200 OK", content))
    with pytest.raises(ServerError, match=server.url):
        finish(ServedModel("teacher").answers(VLLMServers([server.url], timeout=5.0), [QUESTION]))


def test_placeholders_never_go_out_as_text():
    model = ServedModel("teacher", image_token_id=2, placeholders=frozenset({2, 7}))
    for ids in ((1, 2, 3), (1, 7, 3)):
        with pytest.raises(ServerError, match="has 0 pictures for the teacher, and placeholders for others.*as text"):
            model.request([Question((1, 3), 1), Question(ids, 2)])
    assert model.known([4, 5, 7, 6]) == [4, 5]  # of what was sampled, nothing is asked from there on


# Where servers are


@pytest.mark.parametrize(
    "url, other",
    [
        ("http://localhost:8000", "http://0.0.0.0:8000"),
        ("http://LOCALHOST:8000/", "http://127.0.0.1:8000"),
        ("http://[::1]:8000", "http://127.0.0.1:8000//"),
        ("http://[::]:8000", "http://localhost:8000"),
        ("http://[::ffff:127.0.0.1]:8000", "http://localhost:8000"),
        ("http://localhost", "http://127.0.0.1:80"),
        ("https://localhost/", "https://localhost:443"),
        (f"http://{socket.gethostname()}:8000", "http://localhost:8000"),
        ("http://nobody.invalid:8000/", "http://NOBODY.invalid:8000"),
        ("http://192.0.2.1:8000/teacher", "http://192.0.2.1:8000/teacher/"),
    ],
)
def test_two_names_of_one_server(url, other):
    assert are_one_server(url, other) and are_one_server(other, url)


@pytest.mark.parametrize(
    "url, other",
    [
        ("http://localhost:8000", "http://localhost:8001"),
        ("http://localhost", "https://localhost"),
        ("http://localhost:8000/one", "http://localhost:8000/two"),
        ("http://192.0.2.1:8000", "http://192.0.2.2:8000"),
        ("http://192.0.2.1:8000", "http://localhost:8000"),
        ("http://nobody.invalid:8000", "http://localhost:8000"),
    ],
)
def test_two_servers(url, other):
    assert not are_one_server(url, other)


@pytest.mark.parametrize(
    "urls, message",
    [
        (["http://host:8000", "http://HOST:8000/"], "more than once"),
        (["http://host", "http://host:80"], "more than once"),
        (["http://host:80000"], "no URL of a server"),
        (["ftp://host"], "no URL of a server"),
        (["http://host:8000/v1/"], "Leave out the `/v1`"),
    ],
)
def test_urls_that_cannot_be_meant(urls, message):
    with pytest.raises(ValueError, match=message):
        check_urls(urls)
