"""Requests byte by byte, for what no well-behaved client would send."""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

CHAT = "/v1/chat/completions"
NO_END = {"1": -100, "5": -100}  # the built-in pair's EOS tokens: a text as long as it may be


def body(max_tokens: int = 4, **more: Any) -> bytes:
    """A chat request as bytes."""
    messages = [{"role": "user", "content": "def add(a, b):"}]
    said = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}
    return json.dumps(said).encode()


def request(
    port: int,
    path: str,
    data: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    method: str | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Send one request. Returns status, headers in lower case, and body."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        given = {"content-type": "application/json", **(headers or {})}
        chunked = "transfer-encoding" in given
        connection.request(
            method or ("GET" if data is None else "POST"), path, data, given, encode_chunked=chunked
        )
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, response.read()


def head(path: str, length: int, headers: Mapping[str, str] | None = None) -> bytes:
    """The head of a POST request."""
    lines = {"host": "127.0.0.1", "content-type": "application/json", **(headers or {})}
    lines |= {"content-length": str(length)}
    said = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{said}\r\n".encode()


@contextmanager
def open_request(
    port: int, data: bytes, headers: Mapping[str, str] | None = None, path: str = CHAT
) -> Iterator[socket.socket]:
    """Send a request and yield its socket, on which the answer is still to be read."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head(path, len(data), headers) + data)
        yield connection


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    """Read until something has come. Returns all that came, which may lack it at the end."""
    data = b""
    while wanted not in data and (part := connection.recv(65536)):
        data += part
    return data


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait for a condition. Returns whether it came true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
