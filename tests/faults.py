"""Faults of the wiring, put into the package's own code: what a self-test has to find.

None of them changes a token of the text, but the last.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from gemma_mtp_mlx import readers, round
from gemma_mtp_mlx.attention import Rows
from gemma_mtp_mlx.cache import Cache
from gemma_mtp_mlx.config import LayerConfig, ModelConfig
from gemma_mtp_mlx.drafter import Drafter, Draw, Embed
from gemma_mtp_mlx.readers import SharedKV, Turns
from gemma_mtp_mlx.round import Models, Round, Turn, Verified

Patch = pytest.MonkeyPatch


def _after(patch: Patch, change: Callable[[Verified, Round], mx.array]) -> None:
    """Hand the drafter another hidden state after every round."""
    decide = round.decide

    def wrong(target: Any, verified: Verified, *args: Any) -> Round:
        done = decide(target, verified, *args)
        return done._replace(state=done.state._replace(hidden=change(verified, done)))

    patch.setattr(round, "decide", wrong)


def hidden_of_another_row(patch: Patch) -> None:
    _after(patch, lambda verified, done: done.state.hidden[::-1])


def hidden_of_another_position(patch: Patch) -> None:
    """That of the accepted draft before the last."""

    def before(verified: Verified, done: Round) -> mx.array:
        length = done.block.shape[1]
        place = mx.maximum(done.report[:, length : length + 1] - 1, 0)[..., None]
        place = mx.broadcast_to(place, (*place.shape[:2], verified.hidden.shape[-1]))
        return mx.take_along_axis(verified.hidden, place, axis=1)[:, 0]

    _after(patch, before)


def hidden_of_the_last_draft(patch: Patch) -> None:
    """Whether it was accepted or not."""
    _after(patch, lambda verified, done: verified.hidden[:, -1])


def token_of_another_row(patch: Patch) -> None:
    draft_block = round.draft_block

    def wrong(models: Models, cache: Cache, turn: Turn, k: int) -> mx.array:
        state = turn.state._replace(tokens=turn.state.tokens[::-1])
        block = draft_block(models, cache, turn._replace(state=state), k)
        return mx.concatenate([turn.state.tokens[:, None], block[:, 1:]], axis=1)

    patch.setattr(round, "draft_block", wrong)


def keys_and_values_of_another_layer(patch: Patch) -> None:
    def first(config: ModelConfig, *, sliding: bool) -> LayerConfig:
        return next(layer for layer in config.layers if layer.owns_kv and layer.sliding == sliding)

    patch.setattr(ModelConfig, "last_owner", first)


def _shared(patch: Patch, change: Callable[[SharedKV, Cache, Rows], None]) -> None:
    """Change what a drafter reads after it was made."""
    init = SharedKV.__init__

    def wrong(self: SharedKV, cache: Cache, rows: Rows, *args: Any) -> None:
        init(self, cache, rows, *args)
        change(self, cache, rows)

    patch.setattr(readers.SharedKV, "__init__", wrong)


def keys_and_values_of_another_row(patch: Patch) -> None:
    init = SharedKV.__init__

    def wrong(self: SharedKV, cache: Cache, rows: Rows, *args: Any) -> None:
        swapped = Rows(*(field[::-1] for field in rows))
        init(self, cache, swapped, *args)
        self.turns, self.rows = Turns(rows.lengths, 1), rows

    patch.setattr(readers.SharedKV, "__init__", wrong)


def keys_and_values_of_a_rejected_draft(patch: Patch) -> None:
    """One position too many is visible."""
    init = SharedKV.__init__

    def wrong(self: SharedKV, cache: Cache, rows: Rows, *args: Any) -> None:
        spans = tuple((start, bound + 1) for start, bound in rows.spans)
        init(self, cache, rows._replace(lengths=rows.lengths + 1, spans=spans), *args)
        self.turns, self.rows = Turns(rows.lengths, 1), rows

    patch.setattr(readers.SharedKV, "__init__", wrong)


def position_before(patch: Patch) -> None:
    def change(shared: SharedKV, cache: Cache, rows: Rows) -> None:
        shared.turns = Turns(rows.lengths - 1, 1)

    _shared(patch, change)


def _drafts(patch: Patch, at_step: Callable[[Any, int], None], scale: float = 1.0) -> None:
    """Draft with a loop of one's own."""

    def draft(
        self: Drafter,
        tokens: mx.array,
        hidden: mx.array,
        shared: Any,
        embed: Embed,
        draw: Draw,
        k: int,
    ) -> mx.array:
        drafts = []
        for step in range(k):
            at_step(shared, step)
            fed = embed(tokens[:, None], hidden[:, None])
            width = hidden.shape[-1]
            fed = mx.concatenate([fed[..., :width] * scale, fed[..., width:]], axis=-1)
            h, hidden = self.step(fed, shared)
            tokens = draw(h, step)
            drafts.append(tokens)
        return mx.stack(drafts, axis=1)

    patch.setattr(Drafter, "draft", draft)


def position_advancing(patch: Patch) -> None:
    def advance(shared: Any, step: int) -> None:
        shared.turns = Turns(shared.rows.lengths + step, 1)

    _drafts(patch, advance)


def embedding_not_scaled(patch: Patch) -> None:
    _drafts(patch, lambda shared, step: None, scale=1 / 11.3)


def one_draft_too_many(patch: Patch) -> None:
    """This one does change the text."""
    accept = round.accept

    def wrong(drafts: mx.array, choices: mx.array, limits: mx.array | None = None) -> mx.array:
        return mx.minimum(accept(drafts, choices, limits) + 1, drafts.shape[1])

    patch.setattr(round, "accept", wrong)


# What a diagnosis has to say of each.
FAULTS: dict[Callable[[Patch], None], str] = {
    hidden_of_another_row: "hidden state handed to the drafter is another row's",
    hidden_of_another_position: "handed to the drafter is that of another position, -1",
    hidden_of_the_last_draft: "hidden state handed to the drafter is that of no position",
    token_of_another_row: "token handed to the drafter is not the one",
    keys_and_values_of_another_layer: "layers read keys and values of layer",
    keys_and_values_of_another_row: "layers read another row's keys and values",
    keys_and_values_of_a_rejected_draft: "layers read other keys and values than",
    position_before: "position is off by -1",
    position_advancing: "position is advanced from step to step",
    embedding_not_scaled: "the drafter computes otherwise",
    one_draft_too_many: "the text with drafts is not the text without",
}
