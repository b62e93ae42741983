"""The Python API: load a pair, generate, stream, batch, or keep a session."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from gemma_mtp_mlx import hub
from gemma_mtp_mlx.cache import seat_size
from gemma_mtp_mlx.checkpoint import Folder, check_companion, read_config, read_json
from gemma_mtp_mlx.config import DrafterConfig, ModelConfig
from gemma_mtp_mlx.costs import prior_for
from gemma_mtp_mlx.depth import AutoDepth, FixedDepth
from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.fields import shown
from gemma_mtp_mlx.kernels.fast import fast as fast_arithmetic
from gemma_mtp_mlx.memory import PREFIX_SHARE, Limits, check_room
from gemma_mtp_mlx.pairing import check_pair, doubts, kind_of
from gemma_mtp_mlx.probe import check_formats, probe
from gemma_mtp_mlx.prompts import Prompt, Prompts
from gemma_mtp_mlx.round import MAX_DRAFTS, Models
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.session import Chunk, Result, Session, collect, per_prompt
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import drafter_names, target_names
from gemma_mtp_mlx.weights import Plan, fill, plan_weights

MAX_BATCH = 8
_TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt")


class Pair:
    """A target with its drafter and tokenizer. Made by `load`.

    skipped: how many stored tensors of the target were not needed, by reason; doubts: what speaks
    against this pair; tried: what trying the kernels on this device has found; a line each. What is
    learnt about how many tokens to draft is kept from call to call.
    """

    def __init__(
        self,
        models: Models,
        prompts: Prompts,
        skipped: dict[str, int],
        doubts: Sequence[str] = (),
        tried: Sequence[str] = (),
    ) -> None:
        self.target, self.drafter, self.arithmetic = models
        self.prompts = prompts
        self.skipped = skipped
        self.doubts, self.tried = list(doubts), list(tried)
        self._depth: AutoDepth | FixedDepth = FixedDepth(0)
        if self.drafter is not None:
            prior = prior_for(self.target.config, self.drafter.config)
            self._depth = AutoDepth(prior, MAX_DRAFTS)

    @property
    def notes(self) -> list[str]:
        """What its user has to know: doubts, and what trying has found."""
        return [*self.doubts, *self.tried]

    @property
    def tokenizer(self) -> TokenizerWrapper | None:
        """The tokenizer, None if the model's folder has none."""
        return self.prompts.tokenizer

    def endless(self) -> "Pair":
        """Return these models with neither tokenizer nor EOS: every text has all of its max_tokens.

        For measuring. Prompts are token ids; what this pair has learnt about depths is not taken
        along, and what the other one learns does not come back.
        """
        models = Models(self.target, self.drafter, self.arithmetic)
        prompts = Prompts(self.target.config, None, frozenset())
        return Pair(models, prompts, self.skipped, self.doubts, self.tried)

    def encode(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        template: bool = True,
        thinking: bool | None = None,
    ) -> list[int]:
        """Return a prompt's token ids; see `Prompts.encode`."""
        return self.prompts.encode(prompt, system=system, template=template, thinking=thinking)

    def session(
        self,
        *,
        max_batch: int = MAX_BATCH,
        num_draft_tokens: int | None = None,
        kv_bytes: int | None = None,
        positions: int | None = None,
        reuse: bool = True,
    ) -> Session:
        """Return a running batch that requests join and leave, and that remembers prompts.

        max_batch: rows at a time; the others queue in order. num_draft_tokens: drafts per round,
        0..15, or None to let costs and acceptance decide; no token depends on it. kv_bytes: memory
        for keys and values, None for what the device has left. positions: tokens, prompts
        included, that full-attention layers hold altogether, None for whole contexts. reuse:
        whether prompts are remembered, for later ones that begin alike.
        Raises: ValueError for a value out of range, or memory that is not there.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1")
        limits = Limits(
            max_batch=max_batch,
            kv_bytes=kv_bytes,
            positions=positions,
            prefix_share=PREFIX_SHARE if reuse else 0,
        )
        return self._session(num_draft_tokens, limits)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        num_draft_tokens: int | None = None,
    ) -> Result:
        """Generate from one prompt."""
        return self.generate_batch([prompt], params, num_draft_tokens=num_draft_tokens)[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        num_draft_tokens: int | None = None,
        max_batch: int = MAX_BATCH,
    ) -> list[Result]:
        """Generate from several prompts at once. params: one for all, or one per prompt."""
        chunks = self.stream_batch(
            prompts, params, num_draft_tokens=num_draft_tokens, max_batch=max_batch
        )
        return collect(chunks, len(prompts))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        num_draft_tokens: int | None = None,
    ) -> Iterator[Chunk]:
        """Yield one prompt's output as it is generated."""
        return self.stream_batch([prompt], params, num_draft_tokens=num_draft_tokens)

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        num_draft_tokens: int | None = None,
        max_batch: int = MAX_BATCH,
    ) -> Iterator[Chunk]:
        """Yield the output of several prompts as it is generated, up to max_batch at a time.

        num_draft_tokens: drafts per round, 0..15, or None to let costs and acceptance decide; 0
        decodes plainly. No token depends on it. The memory reserved is what these prompts need.
        Raises: ValueError for bad input, before anything is generated.
        """
        if not prompts:
            return iter(())
        settings = per_prompt(params, len(prompts))
        requests = [self.prompts.request(p, s) for p, s in zip(prompts, settings, strict=True)]
        sizes = sorted((seat_size(request.positions) for request in requests), reverse=True)
        rows = min(max_batch, len(requests))
        limits = Limits(
            max_batch=rows,
            positions=sum(sizes[:rows]),
            prefix_share=PREFIX_SHARE if len(requests) > 1 else 0,
        )
        return self._session(num_draft_tokens, limits).stream_requests(requests)

    def _session(self, num_draft_tokens: int | None, limits: Limits) -> Session:
        if num_draft_tokens is not None and not 0 <= num_draft_tokens <= MAX_DRAFTS:
            raise ValueError(
                f"num_draft_tokens is {num_draft_tokens}; it must be between 0 and {MAX_DRAFTS}"
            )
        depth = FixedDepth(num_draft_tokens) if num_draft_tokens is not None else self._depth
        models = Models(self.target, self.drafter, self.arithmetic)
        return Session(models, self.prompts, depth, limits)


def load(model: str | Path, drafter: str | Path | None = "auto", *, fast: bool = False) -> Pair:
    """Load a target and its drafter and, on a GPU, try the kernels they need.

    model, drafter: a folder, a hub repository or a short name, as `hub.resolve` takes them. drafter
    "auto" is the target's own, found by `hub.drafter_for`, and raises if there is none; None means
    plain decoding. fast: on a GPU, use MLX's own kernels where they are known to be faster; what is
    generated is then the same up to numerical ties.
    Raises: ValueError naming the file and the remedy for anything that cannot be loaded, and for a
    drafter that does not belong to the target; RuntimeError for a kernel the device refuses.
    """
    folder = hub.resolve(str(model))
    config = read_config(folder)
    target = Target(ModelConfig.from_dict(config))
    plan = plan_weights(target, Folder(folder), target_names(target.config))
    assistant, kind = None, None
    planned: list[tuple[nn.Module, Plan]] = [(target, plan)]
    if drafter is not None:
        drafter_folder = hub.drafter_for(folder) if drafter == "auto" else hub.resolve(str(drafter))
        if drafter_folder is None:
            raise ValueError(
                f"{folder} has no drafter folder and no published drafter is known for it; name "
                "one with --draft-model, or none to decode plainly"
            )
        drafter_config = DrafterConfig.from_dict(read_config(drafter_folder))
        check_pair(target.config, drafter_config)
        assistant = Drafter(drafter_config)
        drafter_plan = plan_weights(assistant, Folder(drafter_folder), drafter_names())
        kind = kind_of(drafter_plan, hub.known_as(drafter_folder))
        planned.append((assistant, drafter_plan))
    notes = doubts(kind_of(plan, hub.known_as(folder)), kind)
    check_room(sum(each.nbytes for _, each in planned))
    for module, each in planned:
        fill(module, each)
    prompts = Prompts(target.config, _tokenizer(folder), _eos(folder, config))
    models = Models(target, assistant)
    if not on_gpu():
        return Pair(models, prompts, plan.skipped, notes)
    if fast:
        arithmetic = fast_arithmetic(str(mx.device_info()["architecture"]))
        return Pair(models._replace(arithmetic=arithmetic), prompts, plan.skipped, notes)
    check_formats(target)
    if assistant is not None:
        check_formats(assistant)
    return Pair(models, prompts, plan.skipped, notes, probe(models))


def _tokenizer(folder: Path) -> TokenizerWrapper | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    for file in folder.iterdir():
        if file.suffix in _TOKENIZER_FILES and file.is_file():
            check_companion(file)
    try:
        return load_tokenizer(folder, {"trust_remote_code": False})
    except Exception as error:  # whatever a tokenizer's parser raises is about its files
        why = " ".join(str(error).split())[:500]
        raise ValueError(f"{folder}: the tokenizer's files cannot be read: {why}") from error


def _eos(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """Ids that end a text: generation_config.json's, else config.json's."""
    generation = folder / "generation_config.json"
    found = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if found is None:
        found = config.get("eos_token_id")
    if found is None:
        found = config.get("text_config", {}).get("eos_token_id")
    ids = [found] if isinstance(found, int) else found or []
    if not isinstance(ids, list) or not all(type(i) is int and abs(i) < 1 << 31 for i in ids):
        raise ValueError(
            f"{folder}: eos_token_id is {shown(found)}; it must be a token id or a list"
        )
    return frozenset(ids)
