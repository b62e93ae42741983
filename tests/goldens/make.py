"""Make the goldens: what transformers 5.22.2 computes on this folder's tiny checkpoints.

    python -m tests.goldens.make [family ...]

Development only. For each family, seeds are tried in order until every choice transformers makes
on the recorded paths (greedy token, drafted token, selected centroid, selected expert) is decided
by a margin no float32 rounding can turn; the seed and the margins are recorded in index.json.
Made again, tokens are the same and floats agree to some 1e-6: torch sums in an order of its own
on every CPU. Each npz holds, per prompt length n, under "n/":

    prompt [n] · positions [P] · logits [P, V] · hidden [P, E] (after the final norm)
    full_keys, full_values, sliding_keys, sliding_values [G, n, D] (what the drafter gets)
    bonus [] · draft_tokens [K] · draft_logits [K, V] · draft_states [K, E] (fed back)
    first_drafts [K] (of transformers' own assisted loop) · greedy [200]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests import checkpoints
from tests.goldens import oracle

HERE = Path(__file__).parent
LENGTHS = (5, 16, 17, 40, 80)
TOKENS = 200
GAP, ROUTER_GAP, NOISE = 1e-3, 1e-4, 1e-5
EVERY = 5
Arrays = dict[str, np.ndarray]


def prompts(vocab_size: int) -> list[list[int]]:
    """Return one fixed random prompt per length."""
    state = np.random.RandomState(20)
    return [(state.random_sample(n) * vocab_size).astype(int).tolist() for n in LENGTHS]


def positions(length: int) -> np.ndarray:
    """Return every fifth position and the last."""
    return np.unique([*range(0, length, EVERY), length - 1])


def texts(target: Any, asked: list[list[int]]) -> list[oracle.Generated] | None:
    """Generate from all prompts, or None as soon as a choice was too close."""
    made = []
    for ids in reversed(asked):
        made.append(oracle.greedy(target, ids, TOKENS))
        if made[-1].gap < GAP or made[-1].router_gap < ROUTER_GAP:
            return None
    return made[::-1]


def record(
    target: Any,
    assistant: Any,
    ids: list[int],
    text: oracle.Generated,
) -> tuple[Arrays, dict[str, float]] | None:
    """Record one prompt and its text, or None where a draft was too close."""
    start = oracle.prefill(target, ids)
    drafted = oracle.draft(target, assistant, int(text.tokens[0]), start)
    if drafted.gap < GAP:
        return None
    assisted, first, rounds = oracle.assisted(target, assistant, ids, TOKENS)
    assert np.array_equal(assisted, text.tokens), "assisted generation changed the text"
    assert np.array_equal(first, drafted.tokens), "first round differs from explicit K/V"
    rows = positions(len(ids))
    arrays = {
        "prompt": np.array(ids),
        "positions": rows,
        "logits": start.logits[rows].numpy(),
        "hidden": start.hidden[rows].numpy(),
        "bonus": text.tokens[0],
        "draft_tokens": drafted.tokens,
        "draft_logits": drafted.logits,
        "draft_states": drafted.states,
        "first_drafts": first,
        "greedy": text.tokens,
    }
    for name, kind in (("full", oracle.FULL), ("sliding", oracle.SLIDING)):
        keys, values = start.shared[kind]
        arrays[f"{name}_keys"], arrays[f"{name}_values"] = keys[0].numpy(), values[0].numpy()
    gaps = {"min_gap": text.gap, "draft_gap": drafted.gap, "router_gap": text.router_gap}
    return arrays, {**gaps, "rounds": rounds}


def check_layouts(folder: Path, family: str, seed: int, ids: list[int], want: torch.Tensor) -> None:
    """Check that no tensor layout and no config layout changes a bit of transformers' logits."""
    for layout in checkpoints.layouts(family):
        for config_layout in ("published", "per_layer"):
            where = folder / f"{layout}-{config_layout}"
            checkpoints.write_checkpoint(
                where, family, layout=layout, config_layout=config_layout, seed=seed
            )
            logits = oracle.prefill(oracle.load(where), ids).logits
            assert torch.equal(logits, want), f"{family}: {layout}, {config_layout} differs"


def try_seed(folder: Path, family: str, seed: int) -> tuple[Arrays, dict[str, Any]] | None:
    """Record a family at one seed, or None where a choice was too close."""
    sums = {
        "target_sha256": checkpoints.write_checkpoint(folder / "target", family, seed=seed),
        "assistant_sha256": checkpoints.write_assistant(folder / "assistant", family, seed=seed),
    }
    target, assistant = oracle.load(folder / "target"), oracle.load(folder / "assistant")
    asked = prompts(target.config.vocab_size)
    noise = oracle.noise(target, asked[-1])
    made = texts(target, asked) if noise < NOISE else None
    if made is None:
        return None
    arrays: Arrays = {}
    facts: list[dict[str, float]] = []
    for ids, text in zip(asked, made, strict=True):
        recorded = record(target, assistant, ids, text)
        if recorded is None:
            return None
        arrays.update({f"{len(ids)}/{name}": value for name, value in recorded[0].items()})
        facts.append(recorded[1])
    check_layouts(folder, family, seed, asked[-1], oracle.prefill(target, asked[-1]).logits)
    worst = {name: min(fact[name] for fact in facts) for name in facts[0]}
    worst["noise"] = noise
    if worst["router_gap"] == float("inf"):
        del worst["router_gap"]
    return arrays, {"seed": seed, **sums, **worst}


def compact(value: np.ndarray) -> np.ndarray:
    """Return a float array as float32 and token ids in 16 bits."""
    return value.astype(np.float32 if value.dtype.kind == "f" else np.int16)


def make(family: str) -> dict[str, Any]:
    """Search a seed for a family, write its npz and return its index entry."""
    for seed in range(100):
        with tempfile.TemporaryDirectory() as folder:
            found = try_seed(Path(folder), family, seed)
        if found is not None:
            arrays = {name: compact(np.asarray(value)) for name, value in sorted(found[0].items())}
            np.savez_compressed(HERE / f"{family}.npz", **arrays)
            return found[1]
        print(f"{family}: seed {seed} is too close to a tie", flush=True)
    raise RuntimeError(f"{family}: no seed among 100 keeps the gaps")


def main() -> None:
    """Make the families named on the command line, or all of them."""
    assert transformers.__version__ == "5.22.2", transformers.__version__
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    path = HERE / "index.json"
    for family in sys.argv[1:] or checkpoints.FAMILIES:
        entry = make(family)
        index = json.loads(path.read_text()) if path.exists() else {"families": {}}
        index["versions"] = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        }
        index["lengths"], index["families"][family] = list(LENGTHS), entry
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        print(family, entry, flush=True)


if __name__ == "__main__":
    main()
