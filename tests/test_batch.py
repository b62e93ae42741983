"""Many requests from a file: what is read, what is written, how a run goes on.

However a run ends (Ctrl-C, kill -9, the power), what its output holds is whole, and the same
command adds what is missing and nothing else.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_mtp_mlx import Pair, SamplingParams, hub, load
from gemma_mtp_mlx.batch import Found, Job, Output, positions, read_output, run
from gemma_mtp_mlx.cli import main
from gemma_mtp_mlx.lines import read_lines
from gemma_mtp_mlx.request import Request
from tests.conftest import heed_ctrl_c
from tests.text_model import write_text_model

Capture = pytest.CaptureFixture[str]
REQUESTS = [
    {"prompt": "def f(x):", "max_tokens": 9, "id": "first"},
    {"prompt": "import os\n", "template": False, "temperature": 0.9, "seed": 5, "n": 3},
    {"messages": [{"role": "user", "content": "class A:"}], "stop": "_", "id": 7.5},
    {"tokens": [5, 6, 7, 8], "temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 1},
    {"prompt": "for", "system": "Be brief.", "repetition_penalty": 1.3, "logprobs": 2},
    {"prompt": "x = 1", "template": False, "frequency_penalty": 0.5, "logit_bias": {"9": -2}},
    {"prompt": "with", "temperature": 1, "min_p": 0.05, "seed": 2, "stop": ["\n\n", "zzz"]},
]
TOKENS = 12  # of requests that do not say it


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load(hub.builtin())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("model"))


def _write(file: Path, requests: list[dict]) -> Path:
    file.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return file


def _argv(prompts: Path, output: Path, *options: str) -> list[str]:
    files = ["--prompts-file", str(prompts), "--output", str(output)]
    return ["batch", *files, "--max-tokens", str(TOKENS), *options]


def _results(output: Path) -> list[dict]:
    data = output.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def _by_key(results: list[dict]) -> dict[tuple[int, int], dict]:
    found = {(result["index"], result["choice"]): result for result in results}
    assert len(found) == len(results), "something was run twice"
    return found


def _lines(*requests: dict, max_tokens: int = TOKENS) -> list:
    return read_lines([json.dumps(r).encode() for r in requests], "prompts", max_tokens)


def _job(index: int, choice: int = 0, size: int = 10) -> Job:
    return Job(index, choice, None, SamplingParams(), "digest", array("I", [1]), size)


def test_results_are_what_each_request_gives_alone(pair: Pair, tmp_path: Path) -> None:
    prompts, output = _write(tmp_path / "in.jsonl", REQUESTS), tmp_path / "out.jsonl"
    command = [sys.executable, "-P", "-m", "gemma_mtp_mlx", *_argv(prompts, output)]
    done = subprocess.run(
        [*command, "--batch-size", "3"], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "Requests: 9 of 9 done" in done.stderr
    found = _by_key(_results(output))
    assert sorted(found) == [(0, 0), (1, 0), (1, 1), (1, 2), *((i, 0) for i in range(2, 7))]
    for line in _lines(*REQUESTS):
        ids = pair.encode(line.prompt, system=line.system, template=line.template)
        for choice, params in enumerate(line.params.choices(line.choices)):
            shown = found[line.index, choice]
            alone = pair.generate(ids, params, num_draft_tokens=0)
            assert (shown["text"], shown["tokens"]) == (alone.text, alone.tokens)
            assert shown["finish_reason"] == alone.finish_reason
            assert params.temperature == 0 or shown["seed"] == params.seed
            assert len(shown.get("logprobs", [])) == len(alone.logprobs)
            assert shown.get("id") == REQUESTS[line.index].get("id")
    assert found[0, 0]["generation_tokens"] == 9
    assert found[2, 0]["finish_reason"] == "stop"
    first = found[4, 0]["logprobs"][0]
    assert first["token"] == found[4, 0]["tokens"][0] and len(first["top"]) == 2
    assert len({str(found[1, choice]["tokens"]) for choice in range(3)}) == 3


def _wait_for_lines(run: subprocess.Popen, output: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not output.exists() or output.read_bytes().count(b"\n") < count:
        assert run.poll() is None, "the run was over too soon"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_that_is_killed_and_interrupted_goes_on(tmp_path: Path, capsys: Capture) -> None:
    requests = [
        {"prompt": "x" * i, "temperature": 1, "seed": i, "max_tokens": 20 + 4 * (i % 3), "n": 2}
        for i in range(1, 9)
    ]
    prompts, output = _write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    argv = _argv(prompts, output, "--batch-size", "2")
    kept = b""
    for ending, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "gemma_mtp_mlx", *argv],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_ctrl_c,
        ) as started:
            _wait_for_lines(started, output, kept.count(b"\n") + 2)
            started.send_signal(ending)
            _, shown = started.communicate(timeout=60)
        assert started.returncode == code
        assert "Traceback" not in shown
        data = output.read_bytes()
        assert data.startswith(kept)
        kept = data
        if ending == signal.SIGKILL:  # as if the power had gone while a line was written
            kept = data[: data.rindex(b"\n") + 1]
            output.write_bytes(kept + b'{"index": 7, "cho')
        else:
            assert "Cut an unfinished line of 17 bytes" in shown
            count = kept.count(b"\n")
            assert shown.endswith(
                f"{count} of 16 requests are in {output}; the same command goes on from there\n"
                "interrupted\n"
            )
    assert 4 <= kept.count(b"\n") < 16
    assert main(argv) == 0
    assert f"{kept.count(bytes([10]))} of 16 requests are in {output} already" in (
        capsys.readouterr().err
    )
    assert output.read_bytes().startswith(kept)
    assert main(_argv(prompts, tmp_path / "whole.jsonl")) == 0
    found, whole = _by_key(_results(output)), _by_key(_results(tmp_path / "whole.jsonl"))
    assert len(found) == 16 and found.keys() == whole.keys()
    for key, result in whole.items():
        for name in ("text", "tokens", "finish_reason", "seed", "request", "model"):
            assert found[key][name] == result[name]


def test_a_request_that_fails_does_not_end_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    extend = Request.extend

    def fail(self: Request, *args: object) -> list[int]:
        if self.seed == 13 and len(self.tokens) > 3:
            raise RuntimeError("out of\nluck")
        return extend(self, *args)

    monkeypatch.setattr(Request, "extend", fail)
    requests = [{"prompt": "a", "seed": seed, "id": seed} for seed in (11, 13, 12)]
    prompts, output = _write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    argv = _argv(prompts, output, "--model", str(folder))
    assert main(argv) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"mlx-gemma-mtp: error: requests of {prompts} failed: line 2;")
    found = _by_key(_results(output))
    assert sorted(found) == [(0, 0), (1, 0), (2, 0)]
    failed = found[1, 0]
    assert (failed["error"], failed["id"]) == ("out of luck", 13) and "text" not in failed
    assert all(len(found[index, 0]["tokens"]) == TOKENS for index in (0, 2))
    before = output.read_bytes()
    assert main(argv) == 1
    assert output.read_bytes() == before
    assert "failed: line 2;" in capsys.readouterr().err


def test_nothing_left_to_do(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    prompts, output = _write(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    argv = _argv(prompts, output, "--model", str(folder))
    assert main(argv) == 0
    before = output.read_bytes()
    assert main(argv) == 0
    assert output.read_bytes() == before
    assert f"1 of 1 requests are in {output} already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompts": {"prompt": "b"}}, ("line 1 of", "choose another --output")),
        ({"options": ["--max-tokens", "5"]}, ("line 1 of", "--max-tokens")),
        ({"model": True}, ("another model", "choose another --output")),
    ],
)
def test_results_of_something_else_are_left_alone(
    folder: Path, tmp_path: Path, capsys: Capture, change: dict, words: tuple[str, ...]
) -> None:
    prompts, output = _write(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    argv = _argv(prompts, output, "--model", str(folder))
    assert main(argv) == 0
    before = output.read_bytes()
    if "prompts" in change:
        _write(prompts, [change["prompts"]])
    if "model" in change:
        argv += ["--model", str(write_text_model(tmp_path / "other", seed=2))]
    capsys.readouterr()
    assert main([*argv, *change.get("options", [])]) == 2
    shown = capsys.readouterr().err
    assert all(word in shown for word in words)
    assert output.read_bytes() == before


def test_every_beginning_of_an_output_can_be_taken_up(tmp_path: Path) -> None:
    lines = _lines(*({"prompt": "é"} for _ in range(3)))
    file = tmp_path / "out"
    output = Output(file, Found(), "model")
    ends = [0]
    for line in lines:
        job = Job(line.index, 0, "é", line.params, line.digest, array("I"), 1)
        output.write(job, {"text": "é\n" * line.index})
        ends.append(file.stat().st_size)
    output.close()
    data = file.read_bytes()
    assert data.count(b"\n") == 3
    for length in range(len(data) + 1):
        for zeros in (b"", b"\0" * 5) if length in ends else (b"",):
            file.write_bytes(data[:length] + zeros)
            found = read_output(file, lines, "prompts")
            whole = max(end for end in ends if end <= length)
            assert (found.size, found.size + found.torn) == (whole, file.stat().st_size)
            assert found.done == {(index, 0) for index in range(ends.index(whole))}
            assert found.model == ("model" if whole else "")
            if length % 16 == 0 or zeros:  # it waits for the disk
                Output(file, found, "model").close()
                assert file.read_bytes() == data[:whole]


@pytest.mark.parametrize(
    "content",
    [b"my notes", b"my notes\n", b'{"prompt": "a"}\n', b'{"index": 0}\n', b'[1]\n{"index": 0, "c'],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "notes"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"line 1: not a result .* left alone"):
        read_output(file, _lines({"prompt": "a"}), "prompts")
    assert file.read_bytes() == content


def test_one_run_at_a_time_writes(tmp_path: Path) -> None:
    file = tmp_path / "out"
    output = Output(file, Found(), "model")
    with pytest.raises(ValueError, match="another run is writing to"):
        Output(file, Found(), "model")
    output.write(_job(0), {})
    output.close()
    with pytest.raises(ValueError, match="another run is writing to"):  # since it was read
        Output(file, Found(), "model")
    assert len(_results(file)) == 1


def test_a_full_disk_leaves_no_part_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out"
    output = Output(file, Found(), "model")
    output.write(_job(0), {"text": "a"})
    before, write = file.read_bytes(), os.write
    room = [20, 0]

    def little(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: room.pop(0)])

    monkeypatch.setattr(os, "write", little)
    with pytest.raises(OSError, match="No space left") as caught:
        output.write(_job(1), {"text": "b"})
    assert caught.value.filename == str(file)
    assert file.read_bytes() == before


class _Session:
    """Answers with one token per step; counts what it holds."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.held: list[int] = []
        self.most = 0
        self.seen: list[int] = []

    def submit(self, prompt: list[int], params: SamplingParams, index: int) -> None:
        self.held.append(index)
        self.seen.append(index)
        self.most = max(self.most, len(self.held))

    def step(self) -> Iterator[SimpleNamespace]:
        done, self.held = self.held[: self.rows], self.held[self.rows :]
        return [SimpleNamespace(index=index, result="result") for index in done]


def test_requests_are_submitted_as_rows_become_free() -> None:
    session = _Session(3)
    steps = list(run(session, (_job(index) for index in range(20)), 6))
    assert session.most == 6
    assert session.seen == list(range(20))
    assert [job.index for pieces in steps for job, _ in pieces] == list(range(20))


def test_room_for_the_largest_requests_together() -> None:
    jobs = [_job(0, size=size) for size in (100, 10, 300, 20)]
    assert positions(jobs, 2) == (300 + 16) + (100 + 16)
    assert positions(jobs, 9) == 430 + 4 * 16


def test_digests_tell_requests_apart() -> None:
    request = {"prompt": "a", "seed": 1, "json_schema": {"type": "object", "minProperties": 1}}
    (line,) = _lines(request)
    text = json.dumps(dict(reversed(request.items())), indent=None).replace(", ", " ,  ")
    (same,) = read_lines([b"\xef\xbb\xbf" + text.encode()], "other name", TOKENS)
    (spelled,) = _lines({**request, "max_tokens": TOKENS}, max_tokens=99)
    assert line.digest == same.digest == spelled.digest
    others = [*({**request, **change} for change in ({"seed": 2}, {"n": 2}, {"id": 1}))]
    digests = {other.digest for other in _lines(*others)}
    digests |= {_lines(request, max_tokens=5)[0].digest, line.digest}
    assert len(digests) == 5


def test_empty_lines_and_nulls_are_passed_over() -> None:
    data = [
        b"\n",
        b'{"prompt": "a", "seed": null, "messages": null}\n',
        b"  \n",
        b'{"tokens": [1]}',
    ]
    lines = read_lines(data, "prompts", TOKENS)
    assert [line.index for line in lines] == [1, 3]
    assert lines[0].params == SamplingParams(max_tokens=TOKENS)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"prompt": "a", "top": 1}', ("unknown key 'top'", "top_p")),
        ('{"prompt": "a", "logits_processors": []}', ("unknown key 'logits_processors'",)),
        ('{"prompt": "a", "top_p": 1.5}', ("top_p is 1.5",)),
        ('{"prompt": "a", "max_tokens": "5"}', ('max_tokens is "5"', "whole number")),
        ('{"prompt": "a", "max_tokens": true}', ("max_tokens is true",)),
        ('{"prompt": "a", "temperature": NaN}', ("temperature is nan",)),
        ('{"prompt": "a", "stop": [1]}', ("stop is [1]", "text")),
        ('{"prompt": "a", "stop": ""}', ("stop", "empty")),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', ("logit_bias is", "token ids")),
        ('{"prompt": "a", "n": 0}', ("n is 0", "at least 1")),
        ('{"prompt": "a", "id": [1]}', ("id is [1]",)),
        ('{"prompt": "a", "seed": 1, "seed": 2}', ("'seed' is given twice",)),
        ('{"prompt": "a", "regex": "a", "grammar": "b"}', ("one of json_schema, regex",)),
        ('{"prompt": "a \\ud800"}', ("prompt is", "a text")),
        ('{"prompt": ["a"]}', ("prompt is", "a text")),
        ('{"prompt": "a", "tokens": [1]}', ("prompt and tokens are given",)),
        ('{"seed": 1}', ("there is no prompt", "messages")),
        ('{"tokens": [1.5]}', ("tokens is [1.5]", "token ids")),
        ('{"tokens": [1], "system": "a"}', ("system",)),
        ('{"messages": [{}], "template": false}', ("template",)),
        ('{"messages": ["a"]}', ("messages is", "role")),
        ('{"prompt": "a"', ("not JSON", "column 15")),
        ("[1]", ("a request is an object",)),
        ("[" * 100_000, ("nested",)),
    ],
)
def test_a_line_that_is_not_understood(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"^prompts, line 3: ") as caught:
        read_lines([b'{"prompt": "a"}\n', b"\n", text.encode() + b"\n"], "prompts", TOKENS)
    assert all(word in str(caught.value) for word in words)
