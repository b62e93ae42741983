"""transformers 5.22.2 as the oracle: what Google's published code computes on a checkpoint folder.

Development and live tests only (torch, CPU, float32). 5.22.2 is pinned because 5.23.0 cannot run
the assistant. Everything is taken from transformers' own classes: nothing here repeats their
arithmetic. The one exception in wiring: a drafter step is called directly, with exactly the
prompt's K/V rows, since transformers itself hands over stale rows after a rejection (only drafts
suffer, never the text).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

DRAFTS = 4
FULL, SLIDING = "full_attention", "sliding_attention"
SharedKV = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Prefill(NamedTuple):
    """A pass over a prompt: logits [T, V], hidden [T, E] after the final norm, K/V per type."""

    logits: torch.Tensor
    hidden: torch.Tensor
    shared: SharedKV


class Drafted(NamedTuple):
    """A draft chain: tokens [K], logits [K, V], fed-back states [K, E], smallest deciding gap."""

    tokens: np.ndarray
    logits: np.ndarray
    states: np.ndarray
    gap: float


class Generated(NamedTuple):
    """A continuation: tokens [N], smallest top-2 logit gap, smallest gap in choosing experts."""

    tokens: np.ndarray
    gap: float
    router_gap: float


def load(folder: Path) -> Any:
    """Load a folder with the class its config names; raise on any key out of place."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    unexpected = {key for key in info["unexpected_keys"] if not _is_foreign(key)}
    if unexpected or info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"{folder}: unexpected {unexpected}, {info}")
    for parameter in model.parameters():
        # Loaded tensors lie in the file at any address, and torch's sums depend on alignment.
        parameter.data = parameter.data.clone()
    model.generation_config.eos_token_id = None
    return model.eval()


def _is_foreign(key: str) -> bool:
    """Whether a key belongs to the towers that config.json leaves out."""
    stems = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "vision_embedder.")
    return key.removeprefix("model.").startswith(stems)


@torch.no_grad()
def prefill(target: Any, ids: list[int]) -> Prefill:
    """Run the target over a prompt and return all it would hand to the drafter."""
    out = target(
        torch.tensor([ids]), output_hidden_states=True, return_shared_kv_states=True, use_cache=True
    )
    return Prefill(out.logits[0], out.hidden_states[-1][0], out.shared_kv_states)


def noise(target: Any, ids: list[int]) -> float:
    """Return how far float32 rounding moves the logits, relative to the largest."""
    rounded = prefill(target, ids).logits
    exact = prefill(copy.deepcopy(target).double(), ids).logits
    return float((rounded - exact).abs().max() / exact.abs().max())


@torch.no_grad()
def draft(target: Any, assistant: Any, bonus: int, start: Prefill) -> Drafted:
    """Draft from the end of a prompt: K/V of its T rows, its last hidden state, position T."""
    token, hidden = torch.tensor([[bonus]]), start.hidden[None, -1:]
    position = torch.tensor([[len(start.hidden)]])
    tokens, logits, states, gaps = [], [], [], []
    for _ in range(DRAFTS):
        embedded = target.get_input_embeddings()(token)
        out = assistant(
            inputs_embeds=torch.cat([embedded, hidden], dim=-1),
            position_ids=position,
            shared_kv_states=start.shared,
            output_hidden_states=True,
        )
        token, hidden = out.logits.argmax(dim=-1), out.last_hidden_state
        gaps.append(min(_top_gap(out.logits[0], 1), _centroid_gap(assistant, out)))
        tokens.append(int(token))
        logits.append(out.logits[0, 0].numpy())
        states.append(hidden[0, 0].numpy())
    return Drafted(np.array(tokens), np.stack(logits), np.stack(states), min(gaps))


def _inputs(ids: list[int]) -> dict[str, torch.Tensor]:
    """Return a prompt for generate, which would otherwise take token 0 for padding and hide it."""
    tokens = torch.tensor([ids])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _top_gap(values: torch.Tensor, count: int) -> float:
    """Return the smallest distance over rows between the count-th and the next largest value."""
    top = values.topk(count + 1, dim=-1).values
    return float((top[..., count - 1] - top[..., count]).min())


def _centroid_gap(assistant: Any, out: Any) -> float:
    """Return how clearly the last selected centroid beats the first one left out."""
    if not assistant.config.use_ordered_embeddings:
        return float("inf")
    embedder = assistant.masked_embedding
    return _top_gap(
        embedder.centroids(out.hidden_states[-1][0]), embedder.centroid_intermediate_top_k
    )


@torch.no_grad()
def greedy(target: Any, ids: list[int], count: int) -> Generated:
    """Generate greedily, without an end of sequence, and measure how close the choices were."""
    router_gaps: list[float] = []

    def watch(router: Any, _: Any, output: Any) -> None:
        router_gaps.append(_top_gap(output[0].log(), router.config.top_k_experts))

    routers = [module for name, module in target.named_modules() if name.endswith(".router")]
    hooks = [router.register_forward_hook(watch) for router in routers]
    out = target.generate(
        **_inputs(ids),
        do_sample=False,
        max_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for hook in hooks:
        hook.remove()
    tokens = out.sequences[0, len(ids) :].numpy()
    gap = min(_top_gap(logits, 1) for logits in out.logits)
    return Generated(tokens, gap, min(router_gaps, default=float("inf")))


@torch.no_grad()
def assisted(target: Any, assistant: Any, ids: list[int], count: int) -> tuple[Any, Any, int]:
    """Generate with transformers' own assisted loop: tokens, drafts of the first round, rounds."""
    rounds: list[torch.Tensor] = []
    original = SinglePositionMultiTokenCandidateGenerator.get_candidates

    def watch(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        candidates, logits = original(self, input_ids, **kwargs)
        rounds.append(candidates[0, input_ids.shape[1] :])
        return candidates, logits

    assistant.generation_config.num_assistant_tokens = DRAFTS
    with mock.patch.object(SinglePositionMultiTokenCandidateGenerator, "get_candidates", watch):
        out = target.generate(
            **_inputs(ids), assistant_model=assistant, do_sample=False, max_new_tokens=count
        )
    first = next(drafts for drafts in rounds if len(drafts))
    return out[0, len(ids) :].numpy(), first.numpy(), len(rounds)
