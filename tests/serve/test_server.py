"""The command itself: how it starts, what it refuses to start with, how it ends."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_mtp_mlx.cli import main
from gemma_mtp_mlx.cli_serve import read_speculative
from tests.serve.process import ServerProcess
from tests.serve.wire import NO_END, body, open_request, read_until, wait_until


def test_it_says_what_it_serves_and_where(server: ServerProcess) -> None:
    said = server.said()
    assert re.search(
        rf"^Serving builtin with its own drafter on {server.url}: 8 answers at a time, 64 waiting, "
        r"0\.03 GB for keys and values \(32896 positions\)$",
        said,
        re.MULTILINE,
    )
    assert server.health()["status"] == "ok"


def _is_refused(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_a_signal_lets_running_streams_finish(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", "--kv-budget", "0.1") as running:
        data = body(150, logit_bias=NO_END, stream=True)
        with open_request(running.port, data) as connection:
            said = read_until(connection, b"data: ")
            assert b"[DONE]" not in said
            running.process.send_signal(signal.SIGTERM)
            assert wait_until(lambda: _is_refused(running.port))
            said += read_until(connection, b"data: [DONE]")
        assert b'"finish_reason":"length"' in said and b"data: [DONE]" in said
        assert running.process.wait(30) == 0
        assert running.entries()[-1]["completion_tokens"] == 150
        assert "Traceback" not in running.said()


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    data = body(3000, logit_bias=NO_END, stream=True)
    with (
        ServerProcess(tmp_path / "log", "--kv-budget", "0.1") as running,
        open_request(running.port, data) as connection,
    ):
        read_until(connection, b"data: ")
        running.process.send_signal(signal.SIGINT)
        assert wait_until(lambda: "Finishing" in running.said())
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(10) == 130


def _fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line with which a command ends that cannot start."""
    assert main(["serve", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("mlx-gemma-mtp: error: ")
    return lines[-1]


def test_a_port_in_use(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    said = _fails(capsys, "--port", str(server.port))
    assert f"port {server.port} of 127.0.0.1 is in use; give another --port" in said


def test_memory_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    said = _fails(capsys, "--port", "0", "--kv-budget", "0.0001")
    assert "8 rows need at least" in said and "raise it or use fewer rows" in said


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--kv-budget", "nan"], "--kv-budget is nan"),
        (["--num-draft-tokens", "16"], "0 to 15"),
        (["--api-key", ""], "--api-key is empty"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--port", "99999"], "less than or equal to 65535"),
        (
            ["--speculative-config", "{}", "--num-draft-tokens", "3"],
            "give either",
        ),
        (["--speculative-config", "{}", "--draft-model", "none"], "give either"),
        (["--speculative-config", "{"], "is not JSON"),
        (["--speculative-config", "[]"], "is an object"),
        (["--speculative-config", '{"method": "ngram"}'], "no method 'ngram' here; use mtp"),
        (["--speculative-config", '{"num_speculative_tokens": 16}'], "use 0 to 15"),
        (["--speculative-config", '{"num_speculative_tokens": true}'], "num_speculative_tokens is"),
        (["--speculative-config", '{"quantization": "fp8"}'], "'quantization' is not known"),
    ],
)
def test_options_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert says in _fails(capsys, *argv)


def test_speculative_config_is_vllms() -> None:
    found = read_speculative('{"method": "mtp", "model": "a/b", "num_speculative_tokens": 3}')
    assert found == ("a/b", 3)
    assert read_speculative("{}") == (None, None)


def test_without_the_extra_it_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None; "
        "from gemma_mtp_mlx.cli import main; sys.exit(main(['serve', '--port', '0']))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "mlx-gemma-mtp: error: serve needs prometheus_client; install it with: "
        "pip install 'mlx-gemma-mtp[serve]'\n"
    )
