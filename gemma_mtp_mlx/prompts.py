"""From what a user says to a request: prompts to token ids, settings to what an engine runs."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from llguidance import LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.constraint import Constraint, Thinking, constraint_for, grammar_tokenizer
from gemma_mtp_mlx.penalties import check_bias
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import MAX_DRAFTS
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.sections import SectionStream
from gemma_mtp_mlx.tokens import TextStream

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]


class Prompts:
    """A model's tokenizer and chat template, and what its requests are checked against.

    eos: token ids that end a text.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: TokenizerWrapper | None, eos: frozenset[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.eos = eos
        self._config = config
        self._prepared: LLTokenizer | None = None

    def encode(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        template: bool = True,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Return a prompt's token ids.

        A string is one user message; a list of messages ({"role": ..., "content": ...}) is a
        conversation; both go through the chat template if there is one. Token ids pass unchanged.
        system: a system message put first. template: False encodes a string as it is. thinking:
        whether the template asks the model to think first; None: if the tokenizer has tokens for
        it, as mlx_lm. tools: functions that the model may call, as OpenAI describes them.
        Raises: ValueError for an empty prompt or one that the template or the vocabulary refuses.
        """
        if not prompt:
            raise ValueError("the prompt is empty; give it at least one token")
        if isinstance(prompt, str):
            return self._encode_text(prompt, system, template, thinking, tools)
        ids = [item for item in prompt if isinstance(item, int)]
        if len(ids) == len(prompt):
            return self._check_ids(ids)
        messages = [dict(item) for item in prompt if isinstance(item, Mapping)]
        if len(messages) != len(prompt):
            raise ValueError("a prompt is a text, a list of messages or a list of token ids")
        return self._apply_template(messages, system, thinking, tools)

    def request(self, prompt: Prompt, params: SamplingParams, *, sections: bool = False) -> Request:
        """Return a request for a prompt.

        sections: whether its text is read by sections, in which case stop texts end text only.
        Raises: ValueError for a prompt longer than the context, or settings that do not fit the
        model or its tokenizer.
        """
        ids = self.encode(prompt, thinking=params.thinking)
        context = self._config.max_position_embeddings
        if len(ids) >= context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the model's context is {context}; shorten it"
            )
        self._check_params(params)
        text, split = None, None
        if sections:
            split = SectionStream(self._text_tokenizer(), params.stop)
        elif self.tokenizer is not None or params.stop:
            text = TextStream(self._text_tokenizer(), params.stop)
        constraint = self._constraint(params, ids)
        left = context - len(ids)
        return Request(ids, params, self.eos, text, constraint, max_tokens=left, sections=split)

    def _check_params(self, params: SamplingParams) -> None:
        depth = params.num_draft_tokens
        if depth is not None and depth > MAX_DRAFTS:
            raise ValueError(f"num_draft_tokens is {depth}; it must be at most {MAX_DRAFTS}")
        check_bias(params, self._config.vocab_size)

    def _constraint(self, params: SamplingParams, ids: list[int]) -> Constraint | None:
        rules = (params.json_schema, params.regex, params.grammar, params.thinking_budget)
        if all(rule is None for rule in rules):
            return None
        thinking = None if params.thinking is False else self._thinking
        return constraint_for(params, ids, self.speller(), thinking)

    def speller(self) -> LLTokenizer:
        """Return what knows the bytes of every token, for grammars; made on first use."""
        if self._prepared is None:
            tokenizer, size = self._text_tokenizer(), self._config.vocab_size
            self._prepared = grammar_tokenizer(tokenizer, size, self.eos)
        return self._prepared

    @cached_property
    def _thinking(self) -> Thinking | None:
        return Thinking.of(self._text_tokenizer())

    def _encode_text(
        self,
        text: str,
        system: str | None,
        template: bool,
        thinking: bool | None,
        tools: Sequence[Mapping[str, Any]],
    ) -> list[int]:
        tokenizer = self._text_tokenizer()
        if template and tokenizer.has_chat_template:
            messages = [{"role": "user", "content": text}]
            return self._apply_template(messages, system, thinking, tools)
        if system is not None:
            raise ValueError("a system prompt needs the chat template")
        if thinking:
            raise ValueError("thinking needs the chat template, which asks the model for it")
        return self._check_ids(tokenizer.encode(text))

    def _apply_template(
        self,
        messages: list[dict[str, Any]],
        system: str | None,
        thinking: bool | None,
        tools: Sequence[Mapping[str, Any]],
    ) -> list[int]:
        tokenizer = self._text_tokenizer()
        if not tokenizer.has_chat_template:
            raise ValueError("this model's tokenizer has no chat template; pass text or token ids")
        if thinking and self._thinking is None:
            raise ValueError("this model's tokenizer has no tokens for thinking; turn it off")
        for message in messages:
            if message.get("role") not in ROLES:
                raise ValueError(
                    f"unknown chat role {message.get('role')!r}; use one of {', '.join(ROLES)}"
                )
            if "content" not in message and "tool_calls" not in message:
                raise ValueError(f"a message of the {message['role']} has no content")
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        if tools and not tokenizer.has_tool_calling:
            raise ValueError("this model's tokenizer has no tokens for tool calls; leave tools out")
        asked: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        if tools:
            asked["tools"] = [dict(tool) for tool in tools]
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, **asked
            )
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
        size = self._config.vocab_size
        outside = [i for i in ids if not 0 <= i < size]
        if outside:
            raise ValueError(f"token id {outside[0]} is not in the vocabulary of {size}")
        return ids
