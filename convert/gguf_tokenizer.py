"""The tokenizer in a GGUF file's metadata, as the files that a model folder has.

Gemma's is BPE over text whose spaces are written as U+2581, with bytes for what the vocabulary
lacks. llama.cpp keeps tokens, merges and kinds; two kinds it changes are changed back. Tokens
around thoughts and tool calls, special in Gemma, are "user defined" there so that its chat parser
sees them; and <eos> is a plain token where <turn|> is the EOS. A prompt begins with <bos> whatever
add_bos_token says, which is wrong in early files and which llama.cpp overrides as well.
Source: llama.cpp, conversion/gemma.py (Gemma4Model.set_vocab) and src/llama-vocab.cpp;
transformers GemmaTokenizer.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

_KEY = "tokenizer.ggml"
_MODEL = "gemma4"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"
_SPECIAL = (
    "<eos>",
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
)
_ENDS = ("<eos>", "<turn|>", "<|tool_response>")  # what ends a turn of a chat
_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "mask": "mask"}
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p"}


def token_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return config.json's token ids. eos_token_id: every token that ends a turn, in order."""
    tokens = metadata.get(f"{_KEY}.tokens")
    listed = tokens if isinstance(tokens, list) else []
    ends = {listed.index(token) for token in _ENDS if token in listed}
    ends |= {id for name in ("eos", "eot") if (id := _id(metadata, name)) is not None}
    ids = {"bos_token_id": _id(metadata, "bos"), "pad_token_id": _id(metadata, "padding")}
    found: dict[str, Any] = {name: id for name, id in ids.items() if id is not None}
    return {**found, "eos_token_id": sorted(ends)} if ends else found


def companion_files(file: Path, metadata: dict[str, Any]) -> dict[str, bytes]:
    """Return the files a tokenizer is loaded from, and generation_config.json, by name.

    Raises: ValueError naming the file if there is no tokenizer, or it is not Gemma's kind.
    """
    model = metadata.get(f"{_KEY}.model")
    if model != _MODEL:
        raise _unreadable(file, f"its {_KEY}.model is {str(model)[:40]!r}, expected {_MODEL!r}")
    tokens, special = _texts(file, metadata, "tokens"), _special(file, metadata)
    tokenizer = _tokenizer(file, metadata, special)
    roles = {role: _id(metadata, key) for role, key in _ROLES.items()}
    named = {f"{role}_token": tokens[id] for role, id in roles.items() if id is not None}
    config = {
        "additional_special_tokens": [token for token in special if token not in named.values()],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    context = metadata.get("gemma4.context_length")
    if isinstance(context, int):
        config["model_max_length"] = context
    generation = token_ids(metadata)
    for key, name in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float):
            generation[name] = value
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": _json(config),
        "generation_config.json": _json(generation),
    }


def _tokenizer(file: Path, metadata: dict[str, Any], special: list[str]) -> Tokenizer:
    tokens, kinds = _texts(file, metadata, "tokens"), metadata[f"{_KEY}.token_type"].tolist()
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise _unreadable(file, f"{_KEY}.tokens names a token twice")
    merges: Any = [tuple(merge.split(" ")) for merge in _texts(file, metadata, "merges")]
    bos, unknown = _id(metadata, "bos"), _id(metadata, "unknown")
    if bos is None or unknown is None:
        raise _unreadable(file, "it names no bos or no unknown token")
    start = tokens[bos]
    added = set(special)
    plain = [t for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED and t not in added]
    try:
        bpe = BPE(vocab, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(bpe)
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[start, "$A"], pair=[start, "$A", "$B"], special_tokens=[(start, bos)]
        )
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    except Exception as error:  # tokenizers raises nothing narrower
        why = " ".join(str(error).split())[:200]
        raise _unreadable(file, f"its tokens and merges do not fit: {why}") from error
    return tokenizer


def _special(file: Path, metadata: dict[str, Any]) -> list[str]:
    """Return the tokens that are no text, in the order of their ids."""
    tokens, kinds = _texts(file, metadata, "tokens"), metadata.get(f"{_KEY}.token_type")
    if not isinstance(kinds, np.ndarray) or kinds.shape != (len(tokens),):
        raise _unreadable(file, f"{_KEY}.token_type is not one number per token")
    return [
        token
        for token, kind in zip(tokens, kinds.tolist(), strict=True)
        if kind in (_UNKNOWN, _CONTROL) or token in _SPECIAL
    ]


def _id(metadata: dict[str, Any], name: str) -> int | None:
    """Return the id of a token that the metadata names, if it is one."""
    id, tokens = metadata.get(f"{_KEY}.{name}_token_id"), metadata.get(f"{_KEY}.tokens")
    known = len(tokens) if isinstance(tokens, list) else 0
    return id if type(id) is int and 0 <= id < known else None


def _texts(file: Path, metadata: dict[str, Any], name: str) -> list[str]:
    texts = metadata.get(f"{_KEY}.{name}")
    if not isinstance(texts, list) or not texts:
        raise _unreadable(file, f"it has no {_KEY}.{name}")
    return texts


def _unreadable(file: Path, why: str) -> ValueError:
    return ValueError(
        f"{file}: its tokenizer cannot be read: {why}; take tokenizer.json and "
        "tokenizer_config.json of the published model"
    )


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
