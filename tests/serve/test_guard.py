"""What is not allowed is refused before it costs anything, with the numbers and the remedy."""

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AuthenticationError, OpenAI, RateLimitError

from tests.serve.process import ServerProcess
from tests.serve.wire import CHAT, NO_END, body, head, open_request, request, wait_until

KEY = {"authorization": "Bearer secret-key"}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = {
        "--api-key": "secret-key",
        "--allow-host": "my.name",
        "--allow-origin": "https://good.example",
        "--max-batch": "1",
        "--max-queue": "1",
        "--kv-budget": "0.0025",
    }
    log = tmp_path_factory.mktemp("strict") / "log"
    running = ServerProcess(log, *(part for option in options.items() for part in option))
    yield running
    running.stop()


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer secret", "Bearer secret-key2", "Basic secret-key"]
)
def test_a_wrong_key_is_refused(strict: ServerProcess, given: str) -> None:
    for path in ("/v1/models", "/metrics", "/nothing", "/openapi.json"):
        status, headers, said = request(strict.port, path, headers={"authorization": given})
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert json.loads(said)["error"]["code"] == "invalid_api_key"
    assert request(strict.port, "/v1/models", headers=KEY)[0] == 200
    assert request(strict.port, "/health")[0] == 200


def test_the_key_is_never_logged(strict: ServerProcess) -> None:
    wrong = OpenAI(base_url=f"{strict.url}/v1", api_key="another-key", max_retries=0)
    with wrong as client, pytest.raises(AuthenticationError):
        client.models.list()
    assert "secret-key" not in strict.said() and "another-key" not in strict.said()


@pytest.mark.parametrize(
    "host, allowed",
    [
        ("127.0.0.1", True),
        ("localhost:1234", True),
        ("LOCALHOST", True),
        ("[::1]:80", True),
        ("my.name:8080", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("192.168.1.7", False),
        ("[::1", False),
        ("", False),
        ("user@localhost", True),
        ("evil.example#localhost", False),
    ],
)
def test_host(strict: ServerProcess, host: str, allowed: bool) -> None:
    status, _, said = request(strict.port, "/health", headers={"host": host})
    assert status == (200 if allowed else 403)
    assert allowed or "--allow-host" in json.loads(said)["error"]["message"]


@pytest.mark.parametrize(
    "origin, allowed",
    [
        ("https://good.example", True),
        ("http://good.example", False),
        ("https://evil.example", False),
        ("null", False),
        ("http://localhost:3000", False),
    ],
)
def test_origin(strict: ServerProcess, origin: str, allowed: bool) -> None:
    headers = {**KEY, "origin": origin}
    status, found, _ = request(strict.port, CHAT, body(1), headers)
    assert status == (200 if allowed else 403)
    assert found.get("access-control-allow-origin") == (origin if allowed else None)
    ask = {"origin": origin, "access-control-request-method": "POST"}
    status, found, _ = request(strict.port, CHAT, headers=ask, method="OPTIONS")
    assert (status == 200) == allowed
    assert found.get("access-control-allow-origin") == (origin if allowed else None)


def test_a_page_served_from_here_may_ask(server: ServerProcess) -> None:
    assert request(server.port, "/v1/models", headers={"origin": server.url})[0] == 200
    status, headers, _ = request(server.port, "/v1/models", headers={"origin": "http://other"})
    assert status == 403 and "access-control-allow-origin" not in headers


def test_a_body_that_is_too_large(strict: ServerProcess) -> None:
    with open_request(strict.port, b"", KEY) as connection:
        connection.sendall(head(CHAT, 9_000_000, KEY))
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")  # the first, empty one
    data = body()[:-1] + b" " * 9_000_000 + b"}"
    status, _, said = request(strict.port, CHAT, data, KEY)
    assert status == 413 and "8388608" in json.loads(said)["error"]["message"]
    chunks: Any = (data[at : at + 65536] for at in range(0, len(data), 65536))
    status, _, said = request(strict.port, CHAT, chunks, {**KEY, "transfer-encoding": "chunked"})
    assert status == 413 and "8388608" in json.loads(said)["error"]["message"]


def test_what_can_never_fit_is_told_with_numbers(strict: ServerProcess) -> None:
    status, _, said = request(strict.port, CHAT, body(4000), KEY)
    message = json.loads(said)["error"]["message"]
    assert status == 400
    assert re.search(
        r"a prompt of 16 tokens and 4000 new ones need \d+ cache positions and the", message
    )
    # Without a limit a row's share of the memory is one.
    data = json.loads(body(logit_bias=NO_END, stream=True))
    del data["max_tokens"]
    with open_request(strict.port, json.dumps(data).encode(), KEY) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_full_queue_says_when_to_come_back(strict: ServerProcess) -> None:
    assert wait_until(lambda: strict.health()["running"] == 0)
    long = body(700, logit_bias=NO_END, stream=True)
    with open_request(strict.port, long, KEY) as first, open_request(strict.port, long, KEY):
        first.recv(4096)
        assert wait_until(lambda: strict.health()["waiting"] == 1)
        with (
            OpenAI(base_url=f"{strict.url}/v1", api_key="secret-key", max_retries=0) as client,
            pytest.raises(RateLimitError) as caught,
        ):
            client.completions.create(model="builtin", prompt="a")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert "2 answers are running or waiting, of 2" in str(caught.value)
        status, _, said = request(strict.port, CHAT, body(n=2, stream=True), KEY)
        assert status == 429 and json.loads(said)["error"]["type"] == "rate_limit_error"
    assert wait_until(lambda: strict.health()["running"] + strict.health()["waiting"] == 0)
    assert request(strict.port, CHAT, body(), KEY)[0] == 200
    status, _, said = request(strict.port, CHAT, body(n=3), KEY)
    assert status == 400 and "takes 2 at a time" in json.loads(said)["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_row(server: ServerProcess, stream: bool) -> None:
    before = len(server.entries())
    with open_request(server.port, body(3000, logit_bias=NO_END, stream=stream)) as connection:
        if stream:
            connection.recv(4096)
        assert wait_until(lambda: server.health()["running"] == 1)
        assert server.health()["kv_bytes_used"] > 0
    assert wait_until(lambda: server.health()["running"] == 0, seconds=5)
    assert wait_until(lambda: server.health()["kv_bytes_used"] == 0, seconds=5)
    assert server.health()["waiting"] == 0
    assert wait_until(lambda: len(server.entries()) > before)
    entry = server.entries()[-1]
    assert entry["client_disconnected"] and entry["finish_reasons"] == ["abort"]
    assert entry["completion_tokens"] < 3000


BAD = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe{}",
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}',
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1e400}',
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": "many"}',
    b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"99999999": 1}}',
    b'{"messages": [{"role": "user", "content": "a"}], "stop": [""]}',
    b'{"messages": [{"role": "user", "content": "a"}], "stream": {}}',
    b'{"messages": [{"role": "user", "content": "a"}], "n": 1.5}',
    b'{"messages": [{"role": "user", "content": "a"}], "metadata": '
    + b"[" * 100
    + b"]" * 100
    + b"}",
    b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"messages": []}',
    b'{"messages": "text"}',
    b'{"messages": [[]]}',
    b'{"messages": [{}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema", '
    b'"json_schema": {"schema": {"type": "nothing"}}}}',
    b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '
    b'"[1]"}}]}]}',
]


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_a_bad_body_is_a_400(server: ServerProcess, data: bytes) -> None:
    status, _, said = request(server.port, CHAT, data)
    assert status == 400
    error = json.loads(said)["error"]
    assert error["type"] == "invalid_request_error" and 5 < len(error["message"]) < 500
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "data",
    [
        *(b'{"prompt": ""}', b'{"prompt": []}', b'{"prompt": [[]]}', b'{"prompt": [99999999]}'),
        *(b'{"prompt": [-1]}', b'{"prompt": 7}', b'{"prompt": {}}', b"{}"),
        *(b'{"prompt": ["a", 1]}', b'{"prompt": "a", "best_of": 3}'),
        b'{"prompt": "a", "suffix": "b"}',
    ],
)
def test_a_bad_prompt_is_a_400(server: ServerProcess, data: bytes) -> None:
    status, _, said = request(server.port, "/v1/completions", data)
    assert status == 400 and len(json.loads(said)["error"]["message"]) < 500


def test_numbers_as_large_as_they_come(server: ServerProcess) -> None:
    data = body(1, seed=10**400, top_k=10**40, max_completion_tokens=1)
    assert request(server.port, CHAT, data)[0] == 200
    assert request(server.port, CHAT, body(10**30, stop=["get"]))[0] == 200
    data = body(1, temperature=5e-324, top_p=5e-324, seed=1)
    assert request(server.port, CHAT, data)[0] == 200


def test_methods_and_places_that_are_none(server: ServerProcess) -> None:
    assert request(server.port, CHAT)[0] == 405
    assert request(server.port, "/v1/nothing")[0] == 404
    assert request(server.port, "/v1/models/%ff%00")[0] == 404
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /" + b"a" * 70_000)  # a line that does not end
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


def test_curl_needs_no_content_type(server: ServerProcess) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert request(server.port, CHAT, body(1), form)[0] == 200
    assert request(server.port, CHAT, body(1), {"content-type": "text/plain"})[0] == 400
