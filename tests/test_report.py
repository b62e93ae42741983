"""What the command line shows of a batch: whatever the order of the chunks, the texts in order."""

import io
import json
import random
import time

import pytest

from gemma_mtp_mlx import report
from gemma_mtp_mlx.api import Chunk, Result
from gemma_mtp_mlx.depth import DepthState
from gemma_mtp_mlx.report import JsonPrinter, Progress, TextPrinter, as_json, details, summary
from gemma_mtp_mlx.request import Logprob, Request, Stats
from gemma_mtp_mlx.sampling import SamplingParams

TEXTS = [["def ", "f():\n", "    pass\n"], ["import os"], ["", "x", " = 1"], [""]]
SHOWN = (
    "==> prompt 1 <==\ndef f():\n    pass\n\n==> prompt 2 <==\nimport os\n\n"
    "==> prompt 3 <==\nx = 1\n\n==> prompt 4 <==\n"
)


REQUEST = Request([1], SamplingParams(), frozenset())


def _chunk(index: int, text: str, tokens: list[int], result: Result | None = None) -> Chunk:
    return Chunk(index, text, tokens, result, REQUEST)


def _result(index: int) -> Result:
    stats = Stats(seed=7, prompt_tokens=5, prompt_s=0.5, generation_tokens=9, generation_s=2.0)
    stats.draft_rounds, stats.draft_n, stats.draft_n_accepted = 4, 8, 4
    stats.accepted_per_position = [3, 1]
    stats.peak_memory_bytes = 2_000_000_000
    return Result("".join(TEXTS[index]), [1, 2], "length", stats, [])


def _chunks(index: int) -> list[Chunk]:
    last = len(TEXTS[index]) - 1
    return [
        _chunk(index, text, [1], _result(index) if place == last else None)
        for place, text in enumerate(TEXTS[index])
    ]


def _shuffled(seed: int) -> list[Chunk]:
    """Return every prompt's chunks in order, the prompts mixed."""
    waiting = [_chunks(index) for index in range(len(TEXTS))]
    chance, mixed = random.Random(seed), []
    while any(waiting):
        mixed.append(chance.choice([w for w in waiting if w]).pop(0))
    return mixed


@pytest.mark.parametrize("seed", range(20))
def test_texts_do_not_mix(seed: int) -> None:
    out = io.StringIO()
    printer = TextPrinter(len(TEXTS), out)
    for chunk in _shuffled(seed):
        printer.add(chunk)
    assert out.getvalue() == SHOWN
    printer.close()
    assert out.getvalue() == SHOWN


@pytest.mark.parametrize("seed", range(20))
def test_the_first_unfinished_text_is_shown_as_far_as_it_has_come(seed: int) -> None:
    out = io.StringIO()
    printer = TextPrinter(len(TEXTS), out)
    grown = [""] * len(TEXTS)
    unfinished = list(range(len(TEXTS)))
    for chunk in _shuffled(seed):
        printer.add(chunk)
        grown[chunk.index] += chunk.text
        if chunk.result is not None:
            unfinished.remove(chunk.index)
        if unfinished:
            heading = f"==> prompt {unfinished[0] + 1} <==\n"
            assert out.getvalue().partition(heading)[2] == grown[unfinished[0]]


def test_one_text_has_no_heading_and_ends_its_line() -> None:
    out = io.StringIO()
    printer = TextPrinter(1, out)
    printer.add(_chunk(0, "a", [1]))
    assert out.getvalue() == "a"
    printer.add(_chunk(0, "b", [2], _result(0)))
    assert out.getvalue() == "ab\n"


def test_interrupted_texts_are_shown_as_far_as_they_have_come() -> None:
    out = io.StringIO()
    printer = TextPrinter(3, out)
    for index, text in ((1, "one"), (0, "zero"), (2, "two\n")):
        printer.add(_chunk(index, text, [1]))
    printer.close()
    assert out.getvalue() == (
        "==> prompt 1 <==\nzero\n\n==> prompt 2 <==\none\n\n==> prompt 3 <==\ntwo\n"
    )


@pytest.mark.parametrize("seed", range(10))
def test_json_lines_are_in_order(seed: int) -> None:
    out = io.StringIO()
    printer = JsonPrinter(out)
    for chunk in _shuffled(seed):
        printer.add(chunk)
    texts = [json.loads(line)["text"] for line in out.getvalue().splitlines()]
    assert texts == ["".join(parts) for parts in TEXTS]


def test_summary_is_the_batch_s() -> None:
    assert summary([_result(0), _result(1)]) == [
        "Prompt: 10 tokens, 10.0 tokens per second",
        "Generation: 18 tokens, 8.0 tokens per second",
        "Peak memory: 2.000 GB",
        "Drafts: 2.00 tokens per round, 50% of 16 accepted",
        "Accepted by position: 0.75 0.25 of 8 rounds",
    ]
    assert len(details([_result(0), _result(1)])) == 2


def test_summary_without_drafts_or_time() -> None:
    result = Result("", [1], "stop", Stats(seed=7, prompt_tokens=1, generation_tokens=1), [])
    assert summary([result])[-3:] == [
        "Generation: 1 tokens, - tokens per second",
        "Peak memory: 0.000 GB",
        "Drafts: none",
    ]


STATE = DepthState({1: 4, 8: 2}, (0.8, 0.6, 0.5, 0.25, 0.1), {1: {4: 3.0}}, 9, 1, 2, 0.01)


def test_depth_is_told_in_a_line() -> None:
    (line,) = report.depth(STATE)
    assert line == (
        "Depth: 4 with 1 row, 2 with 8 rows; acceptance 0.80 0.60 0.50 0.25; switches: 1, "
        "tries: 2 at 1.0% of the time"
    )
    assert report.depth(DepthState({}, (), {}, 0, 0, 0, 0.0)) == []


def test_progress_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    progress = Progress(10, 3, out)
    for second in range(25):
        now[0] += 1
        progress.add(_chunk(0, "x", [1, 2], _result(0) if second == 4 else None))
        progress.show([_result(1).stats])
    progress.close()
    assert out.getvalue() == ("4 of 10 requests, 2.0 tokens/s, 1 running, 50% accepted\n" * 2)
    assert progress.summary(STATE) == [
        "Requests: 4 of 10 done, 3 of them before",
        "Prompts: 5 tokens, 0 of them taken over from earlier ones",
        "Generation: 50 tokens in 25.0 s, 2.0 tokens per second",
        "Peak memory: 2.000 GB",
        "Drafts: 2.00 tokens per round, 50% of 8 accepted",
        "Accepted by position: 0.75 0.25 of 4 rounds",
        *report.depth(STATE),
    ]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line_that_goes_away() -> None:
    out = _Terminal()
    progress = Progress(10, 3, out)
    progress.add(_chunk(0, "x", [1, 2], _result(0)))
    time.sleep(0.15)  # a bar is drawn ten times a second at most
    progress.show([])
    assert "4/10 requests |" in out.getvalue() and "0 running, 50% accepted" in out.getvalue()
    progress.close()
    assert "\n" not in out.getvalue()
    assert out.getvalue().rpartition("\r")[2] == ""
    assert not out.getvalue().split("\r")[-2].strip()


def test_json_has_no_infinities_and_says_logprobs_only_if_asked() -> None:
    result = _result(0)
    assert "logprobs" not in as_json(result)
    logprobs = [Logprob(-0.5, ((1, -0.5), (3, -float("inf")))), Logprob(0.0, ())]
    shown = as_json(Result("", [1, 2], "stop", result.stats, logprobs))
    assert json.loads(json.dumps(shown, allow_nan=False))["logprobs"] == [
        {"token": 1, "logprob": -0.5, "top": [[1, -0.5]]},
        {"token": 2, "logprob": 0.0, "top": []},
    ]


def test_a_failure_is_told_by_its_prompt() -> None:
    failed = Result("half", [1], "error", _result(0).stats, [], RuntimeError("no\nluck"))
    assert as_json(failed) == {"error": "no luck"}
    assert report.errors([_result(0), failed]) == ["prompt 2 failed: no luck"]
