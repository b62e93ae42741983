"""The tokenizer comes back from a GGUF file: the same ids, the same text, the same files."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import tokenizer_utils
from tokenizers import Tokenizer

from gemma_mtp_mlx.convert.gguf import GgufFile
from tests.gguf_files import (
    FILE,
    TEXT,
    Edit,
    add_tokenizer,
    drop_value,
    gemma_tokenizer,
    set_value,
    write,
)

STRING = gguf.GGUFValueType.STRING


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenized")
    write(folder, "12b", edit=add_tokenizer)
    return folder / FILE


TEXTS = [
    TEXT,
    " leading and  double spaces ",
    "<|turn>user\nsmall<turn|>\n<|channel>thought<channel|>",
    "b<b>b <b> <eos></eos>",
    "nothing learned: ÄÖ 漢字 🙂\x00▁",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_is_the_same(tokenized: Path, text: str) -> None:
    made = GgufFile(tokenized).companion_files()["tokenizer.json"]
    tokenizer = Tokenizer.from_str(made.decode())
    original = Tokenizer.from_str(json.dumps(gemma_tokenizer()))
    ids = original.encode(text).ids
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids[1:]
    for skip in (True, False):
        want = original.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == want


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("smal textw\n▁<>bé") | st.characters(codec="utf-8")))
def test_any_text_has_the_same_tokens(tokenized: Path, text: str) -> None:
    made = GgufFile(tokenized).companion_files()["tokenizer.json"]
    tokenizer = Tokenizer.from_str(made.decode())
    original = Tokenizer.from_str(json.dumps(gemma_tokenizer()))
    assert tokenizer.encode(text).ids == original.encode(text).ids


def test_tokenizer_json_is_gemmas(tokenized: Path) -> None:
    made = json.loads(GgufFile(tokenized).companion_files()["tokenizer.json"])
    want = gemma_tokenizer()
    assert made.keys() == want.keys()
    for name in want:
        assert made[name] == want[name], name


def test_mlx_lm_loads_the_companion_files(tokenized: Path, tmp_path: Path) -> None:
    file = GgufFile(tokenized)
    for name, content in file.companion_files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(file.config))
    tokenizer = tokenizer_utils.load(tmp_path)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "small"}])
    original = Tokenizer.from_str(json.dumps(gemma_tokenizer()))
    assert list(ids) == original.encode("<|turn>small<turn|>").ids
    assert tokenizer.bos_token == "<bos>" and tokenizer.eos_token == "<turn|>"
    assert tokenizer.decode(original.encode(TEXT).ids, skip_special_tokens=True) == TEXT
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 2,
        "eos_token_id": [1, 6],
        "pad_token_id": 0,
        "top_p": 0.95,
    }
    assert file.config["eos_token_id"] == [1, 6]


BAD_TOKENIZERS: dict[str, tuple[Edit, str]] = {
    "none": (lambda writer: None, "its tokenizer.ggml.model is 'None', expected 'gemma4'"),
    "another": (set_value("tokenizer.ggml.model", "llama", STRING), "model is 'llama'"),
    "merges": (drop_value("tokenizer.ggml.merges"), "it has no tokenizer.ggml.merges"),
    "kinds": (drop_value("tokenizer.ggml.token_type"), "token_type is not one number per token"),
    "bos": (drop_value("tokenizer.ggml.bos_token_id"), "it names no bos or no unknown token"),
    "far bos": (set_value("tokenizer.ggml.bos_token_id", 10**6), "it names no bos or no unknown"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path, case: str) -> None:
    change, message = BAD_TOKENIZERS[case]

    def edit(writer: gguf.GGUFWriter) -> None:
        if case != "none":
            add_tokenizer(writer)
        change(writer)

    file = GgufFile(write(tmp_path, "31b", edit=edit)[0])
    with pytest.raises(ValueError, match=message) as caught:
        file.companion_files()
    assert "take tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tokens, merges, message",
    [
        (["<bos>", "<unk>", "a", "a"], ["a a"], "names a token twice"),
        (["<bos>", "<unk>", "a", "b"], ["a b"], "its tokens and merges do not fit"),
        (["<bos>", "<unk>", "a", "b"], ["a\nb"], "its tokens and merges do not fit"),
    ],
)
def test_merges_that_do_not_fit_are_refused(
    tmp_path: Path, tokens: list[str], merges: list[str], message: str
) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gemma4")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 2, 1, 1])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_unk_token_id(1)

    path, _ = write(tmp_path, "31b", edit=edit)
    with pytest.raises(ValueError, match=message) as caught:
        GgufFile(path).companion_files()
    assert "\n" not in str(caught.value)
