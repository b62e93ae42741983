"""The Python API: load a pair, generate, stream, batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from gemma_mtp_mlx import hub
from gemma_mtp_mlx.checkpoint import read_config, read_json
from gemma_mtp_mlx.config import DrafterConfig, ModelConfig
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.engine import Engine
from gemma_mtp_mlx.request import Request, Stats
from gemma_mtp_mlx.round import MAX_DRAFTS, Models
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import drafter_names, target_names
from gemma_mtp_mlx.tokens import TextStream
from gemma_mtp_mlx.weights import load_weights

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]


@dataclass(frozen=True, slots=True)
class Result:
    """What a request produced. tokens: all generated ids, the EOS id included if one ended it."""

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one prompt's output. result: set in the prompt's last chunk only."""

    index: int
    text: str
    tokens: list[int]
    result: Result | None


class Pair:
    """A target with its drafter and tokenizer. Made by `load`.

    skipped: how many stored tensors of the target were not needed, by reason.
    """

    def __init__(
        self,
        models: Models,
        tokenizer: TokenizerWrapper | None,
        eos: frozenset[int],
        skipped: dict[str, int],
    ) -> None:
        self.target, self.drafter = models
        self.skipped = skipped
        self.tokenizer = tokenizer
        self.eos = eos

    def encode(
        self, prompt: Prompt, *, system: str | None = None, template: bool = True
    ) -> list[int]:
        """Return a prompt's token ids.

        A string is one user message; a list of messages ({"role": ..., "content": ...}) is a
        conversation; both go through the chat template if there is one. Token ids pass unchanged.
        system: a system message put first. template: False encodes a string as it is.
        Raises: ValueError for an empty prompt or one that the template or the vocabulary refuses.
        """
        if not prompt:
            raise ValueError("the prompt is empty; give it at least one token")
        if isinstance(prompt, str):
            return self._encode_text(prompt, system, template)
        ids = [item for item in prompt if isinstance(item, int)]
        if len(ids) == len(prompt):
            return self._check_ids(ids)
        messages = [dict(item) for item in prompt if isinstance(item, Mapping)]
        if len(messages) != len(prompt):
            raise ValueError("a prompt is a text, a list of messages or a list of token ids")
        return self._apply_template(messages, system)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        num_draft_tokens: int = 4,
    ) -> Result:
        """Generate from one prompt."""
        return self.generate_batch([prompt], params, num_draft_tokens=num_draft_tokens)[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        num_draft_tokens: int = 4,
    ) -> list[Result]:
        """Generate from several prompts at once. params: one for all, or one per prompt."""
        chunks = self.stream_batch(prompts, params, num_draft_tokens=num_draft_tokens)
        done = {chunk.index: chunk.result for chunk in chunks if chunk.result is not None}
        return [done[index] for index in range(len(prompts))]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        num_draft_tokens: int = 4,
    ) -> Iterator[Chunk]:
        """Yield one prompt's output as it is generated."""
        return self.stream_batch([prompt], params, num_draft_tokens=num_draft_tokens)

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        num_draft_tokens: int = 4,
    ) -> Iterator[Chunk]:
        """Yield the output of several prompts as it is generated, one batch for all.

        num_draft_tokens: drafts per round, 0..15; 0 decodes plainly. No token depends on it.
        Raises: ValueError for bad input, before anything is generated.
        """
        if not 0 <= num_draft_tokens <= MAX_DRAFTS:
            raise ValueError(
                f"num_draft_tokens is {num_draft_tokens}; it must be between 0 and {MAX_DRAFTS}"
            )
        settings = _per_prompt(params, len(prompts))
        requests = [self._request(p, s) for p, s in zip(prompts, settings, strict=True)]
        if not requests:
            return iter(())
        engine = Engine(Models(self.target, self.drafter), requests, num_draft_tokens)
        return _chunks(engine)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self.encode(prompt)
        context = self.target.config.max_position_embeddings
        if len(ids) >= context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the model's context is {context}; shorten it"
            )
        text = None
        if self.tokenizer is not None or params.stop:
            text = TextStream(self._text_tokenizer(), params.stop)
        return Request(ids, params, self.eos, text, max_tokens=context - len(ids))

    def _encode_text(self, text: str, system: str | None, template: bool) -> list[int]:
        tokenizer = self._text_tokenizer()
        if template and tokenizer.has_chat_template:
            return self._apply_template([{"role": "user", "content": text}], system)
        if system is not None:
            raise ValueError("a system prompt needs the chat template")
        return self._check_ids(tokenizer.encode(text))

    def _apply_template(self, messages: list[dict[str, Any]], system: str | None) -> list[int]:
        tokenizer = self._text_tokenizer()
        if not tokenizer.has_chat_template:
            raise ValueError("this model's tokenizer has no chat template; pass text or token ids")
        for message in messages:
            if message.get("role") not in ROLES:
                raise ValueError(
                    f"unknown chat role {message.get('role')!r}; use one of {', '.join(ROLES)}"
                )
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        try:
            ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises is about the messages
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return self._check_ids(ids)

    def _text_tokenizer(self) -> TokenizerWrapper:
        if self.tokenizer is None:
            raise ValueError("this model's folder has no tokenizer; pass token ids")
        return self.tokenizer

    def _check_ids(self, ids: list[int]) -> list[int]:
        if not ids:
            raise ValueError("the prompt is empty; give it at least one token")
        size = self.target.config.vocab_size
        outside = [i for i in ids if not 0 <= i < size]
        if outside:
            raise ValueError(f"token id {outside[0]} is not in the vocabulary of {size}")
        return ids


def _chunks(engine: Engine) -> Iterator[Chunk]:
    for emitted in engine.run():
        for row, tokens in emitted:
            request = engine.requests[row]
            text = "" if request.text is None else request.text.take()
            result = None
            if request.finish_reason is not None:
                whole = "" if request.text is None else request.text.text
                result = Result(whole, request.tokens, request.finish_reason, request.stats)
            yield Chunk(row, text, tokens, result)


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(
            f"{len(params)} sampling settings for {count} prompts; give one or {count}"
        )
    return params


def load(model: str | Path, drafter: str | Path | None = "auto") -> Pair:
    """Load a target and its drafter.

    model, drafter: a folder or a hub repository. drafter "auto" takes model/drafter and raises if
    it is missing; None decodes plainly.
    Raises: ValueError naming the file and the remedy for anything that cannot be loaded, and for a
    drafter that does not belong to the target.
    """
    folder = hub.resolve(str(model))
    config = read_config(folder)
    target = Target(ModelConfig.from_dict(config))
    assistant = None
    if drafter is not None:
        drafter_folder = hub.drafter_for(folder) if drafter == "auto" else hub.resolve(str(drafter))
        if drafter_folder is None:
            raise ValueError(
                f"{folder} has no drafter folder; name its drafter, or none to decode plainly"
            )
        drafter_config = DrafterConfig.from_dict(read_config(drafter_folder))
        drafter_config.check_pairs_with(target.config)
        assistant = Drafter(drafter_config)
        load_weights(assistant, drafter_folder, drafter_names())
    plan = load_weights(target, folder, target_names(target.config))
    return Pair(Models(target, assistant), _tokenizer(folder), _eos(folder, config), plan.skipped)


def _tokenizer(folder: Path) -> TokenizerWrapper | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return load_tokenizer(folder)
    except Exception as error:  # whatever a tokenizer's parser raises is about its files
        raise ValueError(f"{folder}: the tokenizer's files cannot be read: {error}") from error


def _eos(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """Ids that end a text: generation_config.json's, else config.json's."""
    generation = folder / "generation_config.json"
    found = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if found is None:
        found = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    return frozenset([found] if isinstance(found, int) else found or [])
