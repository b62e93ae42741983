"""The built-in prompts: eight of each of five kinds, for any model that has a tokenizer."""

import json
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from bench.peers.prompts import encode_prompts
from gemma_mtp_mlx import Pair, hub, load, prompt_kinds
from tests.conftest import LoadPair
from tests.text_model import write_text_model


@pytest.fixture(scope="module")
def builtin() -> Pair:
    return load(hub.builtin())


@pytest.mark.parametrize("kind", prompt_kinds.KINDS)
def test_a_kind_has_eight_prompts_of_mixed_lengths(kind: str, builtin: Pair) -> None:
    encoded = prompt_kinds.encode(kind, builtin.prompts)
    lengths = [len(ids) for ids in encoded]
    assert len(lengths) == len(prompt_kinds.read(kind)) == prompt_kinds.COUNT
    assert min(lengths) >= 20 and max(lengths) <= 900
    assert max(lengths[:4]) > 2 * min(lengths[:4])
    assert encode_prompts(hub.builtin(), kind) == encoded


def test_texts_are_continued_and_conversations_go_through_the_template(builtin: Pair) -> None:
    tokenizer = load_tokenizer(hub.builtin())
    (text, *_), (messages, *_) = prompt_kinds.read("prose"), prompt_kinds.read("chat")
    assert prompt_kinds.encode("prose", builtin.prompts)[0] == tokenizer.encode(text)
    templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt_kinds.encode("chat", builtin.prompts)[0] == templated


def test_a_model_without_a_chat_template_is_given_texts(tmp_path: Path) -> None:
    folder = write_text_model(tmp_path)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": None}))
    pair = load(folder, None)
    assert pair.tokenizer is not None and not pair.tokenizer.has_chat_template
    assert prompt_kinds.usable(pair.prompts) == ["code", "prose", "json", "repeat"]
    assert len(prompt_kinds.encode("json", pair.prompts)) == prompt_kinds.COUNT
    with pytest.raises(ValueError, match=r"no chat template.*'chat'.*code, prose, json, repeat"):
        prompt_kinds.encode("chat", pair.prompts)


def test_what_cannot_be_encoded_is_said(builtin: Pair, tiny_pair: LoadPair) -> None:
    with pytest.raises(ValueError, match="no prompts 'poems'; take one of code, prose"):
        prompt_kinds.encode("poems", builtin.prompts)
    bare = tiny_pair("31b").prompts
    for asked in (lambda: prompt_kinds.encode("code", bare), lambda: prompt_kinds.usable(bare)):
        with pytest.raises(ValueError, match=r"no tokenizer\.json"):
            asked()
