"""What the command line shows of a batch: whatever the order of the chunks, the texts in order."""

import io
import json
import random

import pytest

from gemma_mtp_mlx.api import Chunk, Result
from gemma_mtp_mlx.report import JsonPrinter, TextPrinter, details, summary
from gemma_mtp_mlx.request import Stats

TEXTS = [["def ", "f():\n", "    pass\n"], ["import os"], ["", "x", " = 1"], [""]]
SHOWN = (
    "==> prompt 1 <==\ndef f():\n    pass\n\n==> prompt 2 <==\nimport os\n\n"
    "==> prompt 3 <==\nx = 1\n\n==> prompt 4 <==\n"
)


def _result(index: int) -> Result:
    stats = Stats(seed=7, prompt_tokens=5, prompt_s=0.5, generation_tokens=9, generation_s=2.0)
    stats.draft_rounds, stats.draft_n, stats.draft_n_accepted = 4, 8, 4
    stats.accepted_per_position = [3, 1]
    stats.peak_memory_bytes = 2_000_000_000
    return Result("".join(TEXTS[index]), [1, 2], "length", stats)


def _chunks(index: int) -> list[Chunk]:
    last = len(TEXTS[index]) - 1
    return [
        Chunk(index, text, [1], _result(index) if place == last else None)
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
    printer.add(Chunk(0, "a", [1], None))
    assert out.getvalue() == "a"
    printer.add(Chunk(0, "b", [2], _result(0)))
    assert out.getvalue() == "ab\n"


def test_interrupted_texts_are_shown_as_far_as_they_have_come() -> None:
    out = io.StringIO()
    printer = TextPrinter(3, out)
    for index, text in ((1, "one"), (0, "zero"), (2, "two\n")):
        printer.add(Chunk(index, text, [1], None))
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
    result = Result("", [1], "stop", Stats(seed=7, prompt_tokens=1, generation_tokens=1))
    assert summary([result])[-3:] == [
        "Generation: 1 tokens, - tokens per second",
        "Peak memory: 0.000 GB",
        "Drafts: none",
    ]
