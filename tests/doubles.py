"""Drafters whose quality a test chooses, and an engine that keeps what its rounds computed."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.drafter import Draw, Embed
from gemma_mtp_mlx.engine import Engine
from gemma_mtp_mlx.readers import SharedKV
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import Models, Round
from gemma_mtp_mlx.sampling import SamplingParams

NO_EOS: frozenset[int] = frozenset()


class ScriptedDrafter:
    """Knows each row's tokens and proposes the right one with probability p, else a wrong one."""

    def __init__(self, texts: Sequence[Sequence[int]], p: float, vocab_size: int) -> None:
        longest = max(map(len, texts)) + 64
        table = np.zeros((len(texts), longest), np.int32)
        for row, tokens in enumerate(texts):
            table[row, : len(tokens)] = tokens
        right = np.random.RandomState(len(texts)).random_sample(table.shape) < p
        self._table = mx.array(np.where(right, table, (table + 1) % vocab_size))

    def draft(
        self, tokens: mx.array, hidden: mx.array, shared: SharedKV, embed: Embed, draw: Draw, k: int
    ) -> mx.array:
        positions = shared.rows.lengths[:, None] + 1 + mx.arange(k)
        return self._table[shared.rows.slots[:, None], positions]


class RecordingEngine(Engine):
    """An engine that remembers the logits behind every emitted token, by (row, position)."""

    def __init__(self, models: Models, requests: Sequence[Request], k: int) -> None:
        super().__init__(models, requests, k)
        self.rounds: list[Round] = []

    def _launch(self, built: Round | None) -> Round | None:
        if built is not None:
            self.rounds.append(built)
        return super()._launch(built)

    def logits(self) -> dict[tuple[int, int], np.ndarray]:
        found = {}
        for done in self.rounds:
            logits, report = np.array(done.logits), np.array(done.report)
            slots, lengths = np.array(done.rows.slots), np.array(done.rows.lengths)
            for b, row in enumerate(slots):
                for offset in range(report[b, -1] + 1):
                    found[int(row), int(lengths[b]) + 1 + offset] = logits[b, offset]
        return found


def run(
    models: Models, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], k: int
) -> RecordingEngine:
    """Generate to the end and return the engine."""
    requests = [Request(p, s, NO_EOS) for p, s in zip(prompts, params, strict=True)]
    engine = RecordingEngine(models, requests, k)
    for _ in engine.run():
        pass
    return engine
