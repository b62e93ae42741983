"""What `bench.serve` asks, counts and says. No peer is needed or run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bench.peers.figures import plain
from bench.serving import contenders, load
from bench.serving.answers import Answer, difference, read_answer
from bench.serving.client import ask
from bench.serving.figures import ALL, ONE, closed_table, failures, figures, gain, open_table
from bench.serving.load import Client, Question, Stream
from bench.serving.processes import Server, free_port
from gemma_mtp_mlx import SamplingParams, hub
from gemma_mtp_mlx import load as load_pair
from tests.scripted_server import ScriptedServer, streamed


def made_stream(asked: float, pieces: list[float], tokens: int) -> Stream:
    return Stream(asked, pieces, Answer(completion_tokens=tokens))


def test_figures_of_time_stamps() -> None:
    streams = [
        made_stream(0.0, [1.0, 1.5, 1.75], 5),  # two tokens came with others
        made_stream(1.0, [1.5, 4.5], 2),
    ]
    found = figures(streams)
    assert found["tokens"] == 7 and found["tokens_per_s"] == 7 / 4.5
    assert found["ttft_p50_s"] == 0.75 and found["ttft_p95_s"] == pytest.approx(0.975)
    assert found["gap_p50_s"] == 0.25  # of 0, 0, .25, .5, 3
    assert found["gap_p95_s"] == pytest.approx(0.5 + 0.8 * 2.5)


def made_run(one: float, every: float) -> dict[str, Any]:
    phase = {"ttft_p95_s": 0.5, "ttft_p50_s": 0.25, "gap_p50_s": 0.0, "gap_p95_s": 0.125}
    return {
        ONE: {"tokens_per_s": one, **phase},
        ALL: {"tokens_per_s": every, **phase},
        "arrivals": {"tokens_per_s": every, **phase},
    }


def test_tables_have_medians_and_who_failed() -> None:
    broken = made_run(9.0, 9.0) | {ALL: "503: no room", "arrivals": "503: no room"}
    runs = {
        "ours-auto": [made_run(10.0, 40.0), made_run(20.0, 60.0), made_run(10.0, 50.0)],
        "mlx_lm": [broken, broken, broken],
        "mlx_vlm": [dict.fromkeys((ONE, ALL, "arrivals"), "it ended")] * 3,
    }
    assert [gain(run) for run in runs["ours-auto"]] == [4.0, 3.0, 5.0] and gain(broken) is None
    closed, opened = closed_table(runs, 8), open_table(runs, "arrivals")
    assert closed[1][1:7] == [
        "10.0",
        "10.0 to 20.0",
        "50.0",
        "40.0 to 60.0",
        "4.00",
        "3.00 to 5.00",
    ]
    assert closed[2][1:7] == ["9.0", "9.0 to 9.0", "failed", "-", "failed", "-"]
    assert opened[1][1:4] == ["250", "250 to 250", "500"] and set(opened[3][1:]) == {"failed", "-"}
    assert len(set(map(len, closed))) == 1 and len(set(map(len, opened))) == 1
    assert len(plain(opened).splitlines()) == 4
    assert failures(runs) == [
        f"mlx_lm: 503: no room [{ALL} (3 of 3), arrivals (3 of 3)]",
        f"mlx_vlm: it ended [{ONE} (3 of 3), {ALL} (3 of 3), arrivals (3 of 3)]",
    ]


def test_tokens_are_those_of_usage_not_pieces() -> None:
    answer = Answer()
    characters = [answer.add(said) for said in streamed(["ab", "c"], 7)]
    assert characters == [0, 2, 1, 0, 0]
    assert answer.texts == {0: "abc"} and answer.finishes == {0: "length"}
    assert (answer.prompt_tokens, answer.completion_tokens) == (5, 7)


def test_a_stream_and_a_whole_answer_are_the_same() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    told = {"content": [{"logprob": -1.5}, {"logprob": -0.25}]}
    whole, parts = Answer(), Answer()
    message = {"index": 1, "message": {"content": "ab"}, "finish_reason": "stop", "logprobs": told}
    whole.add({"choices": [{"index": 0, "text": "x", "finish_reason": "length"}, message]})
    whole.add({"choices": [], "usage": usage})
    for text, logprob in (("a", -1.5), ("b", -0.25)):
        told = {"content": [{"logprob": logprob}]}
        parts.add({"choices": [{"index": 1, "delta": {"content": text}, "logprobs": told}]})
    parts.add({"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}], "usage": usage})
    parts.add({"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]})
    whole.complete = parts.complete = True
    assert difference(parts, whole) is None and whole.logprobs == {1: [-1.5, -0.25]}


def test_ollamas_answers_are_read() -> None:
    said = [
        {"response": "de", "done": False},
        {"response": "f", "done": True, "done_reason": "stop", "eval_count": 3},
    ]
    answer = Answer()
    assert [answer.add(part) for part in said] == [2, 1]
    assert answer == Answer({0: "def"}, {0: "stop"}, completion_tokens=3, complete=True)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\ndata:", "cut short"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{}", "cut short"),
        (b'HTTP/1.0 200 OK\r\n\r\ndata: {"choices": []}\n\n', "ended before it said so"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "no room"}}\n', "no room"),
        (b"HTTP/1.1 503 x\r\nContent-Length: 5\r\n\r\nbusy\n", "503: busy"),
        (b"", "without a reply"),
    ],
)
def test_half_an_answer_is_an_error(reply: bytes, words: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()

    async def visit() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, ask(server.sockets[0].getsockname()[1], "/x") as got:
            async for _ in read_answer(got, Answer()):
                pass

    with pytest.raises((ValueError, ConnectionError), match=words):
        asyncio.run(visit())


def test_so_many_streams_at_a_time() -> None:
    server = ScriptedServer(
        lambda path, body: (200, "text/event-stream", streamed(["a", "b"], 4)), 0.01
    )
    asked = [Question(f"number {n}", 4) for n in range(7)]
    done = server.run(lambda port: Client(port, "m").closed(asked, 3))
    assert server.most == 3 and len(done) == 7
    assert sorted(b["messages"][0]["content"] for b in server.bodies) == [q.content for q in asked]
    assert all(len(stream.pieces) == 2 and stream.asked < stream.pieces[0] for stream in done)


def test_another_number_of_tokens_fails() -> None:
    server = ScriptedServer(lambda path, body: (200, "text/event-stream", streamed(["a", "b"], 2)))
    with pytest.raises(ValueError, match="4 tokens were asked for, 2 came"):
        server.run(lambda port: Client(port, "m").open([Question("x", 4), Question("y", 4)]))


def test_arrivals_are_the_same_for_all_and_wait_from_their_time() -> None:
    asked = load.arrivals(200, "due", 5.0, 64)
    assert asked == load.arrivals(200, "due", 5.0, 64)
    assert 30 < asked[-1].at < 50 and {16, 64} < {q.max_tokens for q in asked}
    first = [question.content.splitlines()[0] for question in asked]
    assert len(set(first)) == len(asked)
    server = ScriptedServer(lambda path, body: (200, "text/event-stream", streamed(["a"], 4)))
    overdue = Question("overdue", 4, at=-2.0)
    done = server.run(lambda port: Client(port, "m").open([overdue]))
    assert 2.0 < figures(done)["ttft_p50_s"] < 4.0


def test_the_folder_that_all_load_never_ends_a_text(tmp_path: Path) -> None:
    contenders.write_endless(hub.builtin(), tmp_path)
    endless, usual = load_pair(tmp_path), load_pair(hub.builtin())
    params, forced = SamplingParams(max_tokens=8), SamplingParams(max_tokens=8, logit_bias={1: 99})
    assert usual.generate("Close the file.", forced).tokens == [1]
    assert endless.generate("Close the file.", forced).tokens == [1] * 8
    alike = [pair.generate("Close the file.", params).tokens for pair in (usual, endless)]
    assert alike[0] == alike[1] and endless.drafter is not None
    for name in ("config", "generation_config"):  # each program looks elsewhere
        assert json.loads((tmp_path / f"{name}.json").read_text())["eos_token_id"] == [0]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<pad>"


def test_a_process_that_does_not_start_says_why() -> None:
    with (
        Server(
            ["-c", "print('one', flush=True); raise SystemExit('no such')"], free_port()
        ) as server,
        pytest.raises(ValueError, match="ended before it was ready: no such"),
    ):
        asyncio.run(server.started())


def test_a_process_ends_with_the_measurement() -> None:
    command = ["-c", "import time; time.sleep(600)"]
    server = Server(command, free_port())
    assert server.alive
    server.__exit__(RuntimeError, RuntimeError("measurement"), None)
    assert not server.alive


def test_contenders_without_a_server_are_refused() -> None:
    assert contenders.contender("mlx_vlm-k0").drafts == 0
    with pytest.raises(ValueError, match="transformers"):
        contenders.contender("transformers")
