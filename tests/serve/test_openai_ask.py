"""What OpenAI's fields become: prompts as Gemma 4's template reads them, settings of the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from mlx_lm.tokenizer_utils import load

from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.constraint import grammar_tokenizer
from gemma_mtp_mlx.prompts import Prompts
from gemma_mtp_mlx.serve.card import Card
from gemma_mtp_mlx.serve.openai_ask import ask_of_chat
from gemma_mtp_mlx.serve.openai_schema import ChatRequest
from gemma_mtp_mlx.serve.served import Served
from gemma_mtp_mlx.serve.tool_grammar import Markers, answer_grammar
from tests.families import target_config
from tests.gemma_text import ENDS, SPECIAL, write_tokenizer

EOS = frozenset(SPECIAL.index(token) for token in ENDS)
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    config = ModelConfig.from_dict(target_config("31b", "text", "published", "float32"))
    return Prompts(config, load(write_tokenizer(folder)), EOS)


@pytest.fixture(scope="module")
def served(prompts: Prompts) -> Served:
    markers = Markers.of(prompts.tokenizer)
    card = Card(1, 2, "BF16", "", {}, None, "", {})
    return Served("m", frozenset(), None, "f", 4096, thinks=True, markers=markers, card=card)


def rendered(prompts: Prompts, served: Served, **body: Any) -> str:
    """Return the text of the prompt that a request becomes."""
    ask = ask_of_chat(ChatRequest.model_validate({"messages": [USER], **body}), served)
    ids = prompts.encode(ask.prompts[0], thinking=ask.params.thinking, tools=ask.tools)
    assert prompts.tokenizer is not None
    return str(prompts.tokenizer.decode(ids, skip_special_tokens=False))


def test_a_conversation_with_calls(prompts: Prompts, served: Served) -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [called], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    text = rendered(prompts, served, messages=messages, tools=tools, reasoning_effort="none")
    assert text == (
        "<bos><|turn>system\nbe brief<|tool>declaration:f<tool|><turn|>\n"
        "<|turn>user\nhi<turn|>\n"
        '<|turn>model\n<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
        '<|tool_response>response:c1<|"|>42<|"|><tool_response|>'
    )


def test_tools_that_may_not_be_called_are_not_told(prompts: Prompts, served: Served) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert "<|tool>" in rendered(prompts, served, tools=tools)
    assert "<|tool>" not in rendered(prompts, served, tools=tools, tool_choice="none")


@pytest.mark.parametrize("effort, thinks", [("none", False), ("minimal", False), ("low", True)])
def test_effort_is_thinking_or_not(
    prompts: Prompts, served: Served, effort: str, thinks: bool
) -> None:
    assert ("<|think|>" in rendered(prompts, served, reasoning_effort=effort)) == thinks
    assert "<|think|>" in rendered(prompts, served)


CALL = '<|tool_call>call:f{a:<|"|>x{,}日<|"|>,b:[1,-2.5e3,{c:true,d:null}]}<tool_call|>'


@pytest.mark.parametrize(
    "text, several, schema, allowed",
    [
        (CALL, True, None, True),
        (CALL + CALL, True, None, True),
        (CALL + CALL, False, None, False),
        ("<|tool_call>call:g-1{}<tool_call|>", True, None, True),
        ("<|tool_call>call:h{}<tool_call|>", True, None, False),
        ("<|tool_call>call:f<tool_call|>", True, None, False),
        ("<|tool_call>call:f{a:x}<tool_call|>", True, None, False),
        ('<|tool_call>call:f{a:"x"}<tool_call|>', True, None, False),
        ("<|tool_call>call:f{a:1,}<tool_call|>", True, None, False),
        ("<|tool_call>call:f{}", True, None, False),
        ("text", True, None, False),
        ("", True, None, False),
        ('{"n": 1}', True, None, False),
        ('{"n": 1}', True, {}, True),
        ('{"n": 1}', True, {"properties": {"n": {"type": "string"}}}, False),
        (CALL, True, {}, True),
    ],
)
def test_the_grammar_of_calls(
    prompts: Prompts, text: str, several: bool, schema: Any, allowed: bool
) -> None:
    tokenizer = prompts.tokenizer
    assert tokenizer is not None
    markers = Markers.of(tokenizer)
    assert markers is not None
    grammar = answer_grammar(["f", "g-1"], markers, several=several, schema=schema)
    lark = LLMatcher.grammar_from_lark(grammar)
    matcher = LLMatcher(grammar_tokenizer(tokenizer, 128, EOS), lark, log_level=0)
    assert not matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False)
    fits = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
    assert fits == allowed


def test_settings_left_out_are_the_protocols(served: Served) -> None:
    params = ask_of_chat(ChatRequest.model_validate({"messages": [USER]}), served).params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (1.0, 1.0, 0, None)


def test_nulls_are_not_there(served: Served) -> None:
    fields = dict.fromkeys([*ChatRequest.model_fields, "functions", "anything"])
    body = json.loads(json.dumps({**fields, "messages": [USER]}))
    assert ask_of_chat(ChatRequest.model_validate(body), served).choices == 1
