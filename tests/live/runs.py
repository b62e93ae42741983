"""What transformers computes on one prompt, and what this project, mlx_lm and mlx_vlm do there.

A comparison of tokens means something where no choice hangs on rounding, so the prompt is the first
at which none does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model as load_mlx_lm

from gemma_mtp_mlx import SamplingParams, load
from gemma_mtp_mlx.checkpoint import read_config
from tests import formats, passes
from tests.goldens import oracle

TOKENS = 24
GAP, ROUTER_GAP = 1e-3, 1e-4  # between logits; float32 rounding moves them by some 1e-5


class Run(NamedTuple):
    """A prompt, and what transformers makes of it. drafted: None without an assistant."""

    ids: list[int]
    prefill: oracle.Prefill
    text: oracle.Generated
    drafted: oracle.Drafted | None

    @property
    def bonus(self) -> int:
        """The first token of the text, from which is drafted."""
        return int(self.text.tokens[0])


def clear_run(model: Any, assistant: Any | None = None, tokens: int = TOKENS) -> Run:
    """Run transformers on the first prompt at which no choice hangs on rounding."""
    size = model.get_input_embeddings().weight.shape[0]
    for seed in range(40):
        draws = np.random.RandomState(seed).random_sample(45)
        ids = (draws * size).astype(int).tolist()
        text = oracle.greedy(model, ids, tokens)
        if text.gap < GAP or text.router_gap < ROUTER_GAP:
            continue
        prefill = oracle.prefill(model, ids)
        run = Run(ids, prefill, text, None)
        if assistant is None:
            return run
        drafted = oracle.draft(model, assistant, run.bonus, prefill)
        if drafted.gap >= GAP:
            return run._replace(drafted=drafted)
    raise AssertionError("no prompt among 40 keeps the gaps")


@contextmanager
def replaced(model: Any, folder: Path) -> Iterator[int]:
    """Give transformers' model a folder's packed weights, for a while. Yields how many."""
    decoded = formats.as_transformers(formats.packed_weights(folder, read_config(folder)))
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].data for name in decoded}
    try:
        for name, value in decoded.items():
            assert value.shape == tuple(parameters[name].shape), name
            parameters[name].data = torch.tensor(value)
        yield sum(value.size for value in decoded.values())
    finally:
        for name, value in before.items():
            parameters[name].data = value


class Difference(NamedTuple):
    """How far our logits are from transformers', of the largest. drafter: 0 without one."""

    target: float
    drafter: float = 0.0


def difference(
    folder: Path, run: Run, measure: Callable[..., float] = passes.relative
) -> Difference:
    """Load a converted folder, and the drafter in it if the run has drafted, and compare."""
    pair = load(folder, drafter=folder / "drafter" if run.drafted else None)
    hidden, logits = passes.verify(pair.target, run.ids, 5)
    found = measure(logits, run.prefill.logits.numpy())
    found = max(found, measure(hidden, run.prefill.hidden.numpy()))
    if run.drafted is None:
        return Difference(found)
    assert pair.drafter is not None
    kinds = (oracle.FULL, oracle.SLIDING)
    shared = passes.Shared(*(x[0].numpy() for kind in kinds for x in run.prefill.shared[kind]))
    fed = [run.bonus, *run.drafted.tokens[:-1].tolist()]
    state = run.prefill.hidden[-1].numpy()
    logits, states = passes.draft(pair.target, pair.drafter, shared, state, fed)
    return Difference(
        found,
        max(measure(logits, run.drafted.logits), measure(states, run.drafted.states)),
    )


def our_text(folder: Path, run: Run, num_draft_tokens: int = 4) -> list[int]:
    """Continue the run's prompt greedily, with the folder's drafter if the run has drafted."""
    pair = load(folder, drafter=folder / "drafter" if run.drafted else None)
    pair.prompts.eos = frozenset()
    drafts = num_draft_tokens if run.drafted else 0
    params = SamplingParams(max_tokens=len(run.text.tokens))
    return pair.generate(run.ids, params, num_draft_tokens=drafts).tokens


def mlx_lm_text(folder: Path, run: Run) -> list[int]:
    """Continue the run's prompt greedily in mlx_lm."""
    model, _ = load_mlx_lm(folder)
    step = generate_step(mx.array(run.ids), model, max_tokens=len(run.text.tokens))
    return [int(token) for token, _ in step]


def mlx_vlm_text(folder: Path, run: Run) -> list[int]:
    """Continue the run's prompt greedily in mlx_vlm, with its cache."""
    from mlx_vlm.utils import load_model as load_mlx_vlm

    model = load_mlx_vlm(folder)
    cache = model.language_model.make_cache()
    fed, tokens = list(run.ids), []
    for _ in run.text.tokens:
        logits = model.language_model(mx.array([fed]), cache=cache).logits
        fed = [int(mx.argmax(logits[0, -1]).item())]
        tokens += fed
    return tokens
