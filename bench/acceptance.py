"""How often the drafter's first token is the target's own choice, on text neither was trained on.

    python -m bench.acceptance [--model DIR] [--files N] [--tokens 700]

Teacher-forced: the text is fed in blocks of 16 tokens; at every position the drafter gets exactly
what it gets in a round (the token, the target's hidden state before it, the committed keys and
values) and its first draft is compared with the target's argmax there. The text is the part of
the standard library that was held out when the built-in pair was trained.
"""

import argparse
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from gemma_mtp_mlx import Pair, hub, load
from gemma_mtp_mlx.cache import MAX_BLOCK, Cache, Seat, seat_size
from gemma_mtp_mlx.readers import SharedKV, VerifyReader
from gemma_mtp_mlx.sampling import SamplingParams, batch_sampling

SEAT = Seat(start=0, size=0, slot=0)  # of the only row
HELD_OUT = Path(__file__).parents[1] / "training" / "held_out.json"


def held_out_files() -> list[Path]:
    """Return the held-out files that this Python's standard library has."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    names: list[str] = json.loads(HELD_OUT.read_text())
    return [stdlib / name for name in names if (stdlib / name).is_file()]


def first_draft_agreement(pair: Pair, tokens: Sequence[int]) -> list[bool]:
    """Return, for every position but the last block's, whether the first draft is the target's."""
    assert pair.drafter is not None
    cache = Cache(pair.target.config, 1, seat_size(len(tokens)), pair.target.dtype)
    agreement: list[bool] = []
    before = mx.zeros((1, pair.target.config.hidden_size), pair.target.dtype)
    for start in range(0, len(tokens) - MAX_BLOCK + 1, MAX_BLOCK):
        block = mx.array(tokens[start : start + MAX_BLOCK])
        rows = cache.rows([SEAT], mx.array([start]), [start])
        reader = VerifyReader(cache, rows, MAX_BLOCK)
        hidden = pair.target.verify(block[None], reader)[0]
        choices = mx.argmax(pair.target.logits(hidden), axis=-1)
        mx.eval(choices, hidden, reader.blocks)
        cache.commit(reader.blocks, rows)
        if start:  # at position 0 there is nothing to draft from
            states = mx.concatenate([before, hidden[:-1]])
            agreement += (_first_drafts(pair, cache, block, states, start) == choices).tolist()
        before = hidden[-1:]
    return agreement


def _first_drafts(
    pair: Pair, cache: Cache, tokens: mx.array, hidden: mx.array, start: int
) -> mx.array:
    """The first draft after each of the tokens at start, start + 1, ...: positions as rows."""
    assert pair.drafter is not None
    count = tokens.size
    lengths = mx.arange(start, start + count)
    rows = cache.rows([SEAT] * count, lengths, range(start, start + count))

    greedy = batch_sampling([SamplingParams()] * count, [0] * count)

    def draw(h: mx.array, step: int) -> mx.array:
        return pair.drafter.choose(h, greedy, lengths[:, None])

    shared = SharedKV(cache, rows)
    return pair.drafter.draft(tokens, hidden, shared, pair.target.embed, draw, 1)[:, 0]


def main() -> None:
    """Measure and print, file by file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--files", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=700)
    args = parser.parse_args()
    pair = load(args.model or hub.builtin())
    total: list[bool] = []
    for file in held_out_files()[: args.files]:
        tokens = pair.encode(file.read_text(), template=False)[: args.tokens]
        agreement = first_draft_agreement(pair, tokens)
        total += agreement
        print(f"{sum(agreement) / max(len(agreement), 1):.3f} of {len(agreement):5}  {file.name}")
    print(json.dumps({"first_draft_agreement": sum(total) / len(total), "positions": len(total)}))


if __name__ == "__main__":
    main()
