"""The pair's tokenizer: byte-level BPE of 4096 entries, digits single, whitespace runs whole.

Text round trips byte for byte. A line break is its own piece, so a prompt may end after one;
the indentation before a word is one piece without its last space, which joins the word.
"""

import json
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
PAD, EOS, BOS, UNK, TURN_START, TURN_END = range(6)
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+(?!\S)|[^\S\n]+"
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' or message['role'] == 'model' -%}
{%- set role = 'model' -%}
{%- elif message['role'] == 'user' or message['role'] == 'system' -%}
{%- set role = message['role'] -%}
{%- else -%}
{{- raise_exception('unknown role: ' ~ message['role']) -}}
{%- endif -%}
{%- if message['content'] is string -%}
{%- set text = message['content'] -%}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] != 'text' -%}
{{- raise_exception('only text content is supported, got: ' ~ part['type']) -}}
{%- endif -%}
{%- set parts.text = parts.text ~ part['text'] -%}
{%- endfor -%}
{%- set text = parts.text -%}
{%- endif -%}
{{- '<|turn>' ~ role ~ '\\n' ~ (text | trim) ~ '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE trained on the texts, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def chat_text(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """Render a conversation with the pair's own template, as training sees it."""
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    return template.render(
        messages=messages, bos_token="<bos>", add_generation_prompt=add_generation_prompt
    )


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into a checkpoint."""
    (folder / "tokenizer.json").write_bytes(source.read_bytes())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<|turn>", "<turn|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
