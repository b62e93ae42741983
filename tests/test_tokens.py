"""Text appears token by token, never takes anything back, and ends before a stop text."""

import random

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from gemma_mtp_mlx import SamplingParams, hub
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.tokens import TextStream

TEXT = "def façade(x):\n    return '→ naïve 日本 🙂' * x  # stop here, or there\n" * 3
STOPS = [(), ("# stop",), ("🙂", "return"), ("there\n", "her"), ("nowhere",), ("\n    r", "日本 ")]


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return load(hub.builtin())


def _pieces(tokenizer: TokenizerWrapper, ids: list[int], stop: tuple[str, ...]) -> list[str]:
    """What a reader is shown, take by take, at irregular intervals."""
    stream, rng, pieces = TextStream(tokenizer, stop), random.Random(0), []
    for token in ids:
        ended = stream.add(token)
        if rng.random() < 0.5:
            pieces.append(stream.take())
        if ended:
            break
    stream.finish()
    pieces.append(stream.take())
    assert "".join(pieces) == stream.text
    return pieces


@pytest.mark.parametrize("stop", STOPS)
def test_streamed_text_is_the_text_up_to_the_first_stop(
    tokenizer: TokenizerWrapper, stop: tuple[str, ...]
) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    ends = [TEXT.find(s) for s in stop if s in TEXT]
    pieces = _pieces(tokenizer, ids, stop)
    assert "".join(pieces) == TEXT[: min(ends, default=len(TEXT))]
    assert len(pieces) > 3


def test_an_unfinished_character_appears_only_at_the_end(tokenizer: TokenizerWrapper) -> None:
    ids = tokenizer.encode("a🙂", add_special_tokens=False)
    assert len(ids) > 2
    stream = TextStream(tokenizer, ())
    for token in ids[:-1]:
        stream.add(token)
    assert stream.take() == "a"
    stream.finish()
    assert "\ufffd" in stream.take()


def test_a_request_ends_at_the_token_that_ends_it(tokenizer: TokenizerWrapper) -> None:
    ids = tokenizer.encode("one two three four", add_special_tokens=False)

    def finish(params: SamplingParams, eos: int | None = None) -> Request:
        request = Request([1], params, frozenset() if eos is None else frozenset([eos]))
        request.text = TextStream(tokenizer, params.stop)
        for start in range(0, len(ids), 3):
            if request.finish_reason is None:
                request.extend(ids[start : start + 3])
        return request

    by_length = finish(SamplingParams(max_tokens=4))
    assert (by_length.tokens, by_length.finish_reason) == (ids[:4], "length")
    by_eos = finish(SamplingParams(max_tokens=4), eos=ids[3])
    assert (by_eos.tokens, by_eos.finish_reason) == (ids[:4], "stop")
    by_text = finish(SamplingParams(stop=("thr",)))
    assert by_text.finish_reason == "stop"
    assert by_text.text is not None
    assert by_text.text.text == "one two "
    assert by_text.tokens == ids[: len(by_text.tokens)]


def test_statistics_count_what_was_emitted() -> None:
    request = Request([1, 2], SamplingParams(max_tokens=9), frozenset())
    request.extend([5])
    for tokens, accepted in (([1, 2, 3], 2), ([4], 0), ([5, 6, 7, 8], 3)):
        request.record_round(4, min(accepted, len(request.extend(tokens))))
    stats = request.stats
    assert (stats.draft_rounds, stats.draft_n, stats.draft_n_accepted) == (3, 12, 5)
    assert stats.accepted_per_position == [2, 2, 1, 0]
    assert stats.acceptance_rate == pytest.approx(5 / 12)
    assert stats.mean_accept_len == pytest.approx(8 / 3)
