"""A tiny random pair with a tokenizer of single characters and a chat template: it speaks nonsense.

Its text never ends by itself (no EOS id is named), so that a test decides how long it is.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from tests.checkpoints import write_pair

SPECIAL = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<unk>"]
PRINTABLE = [chr(code) for code in range(32, 127)]
OTHERS = ["\n", *(chr(code) for code in range(0x3B1, 0x3CA)), "é"]  # alpha to omega
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ('system', 'user', 'assistant', 'model') -%}
{{- raise_exception('unknown role ' ~ message['role']) -}}
{%- endif -%}
{{- '<|turn>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<turn|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def write_text_model(folder: Path, family: str = "31b", seed: int = 1) -> Path:
    """Write folder/target, with its assistant in folder/target/drafter, and return the target."""
    target, assistant = write_pair(folder, family, seed=seed)
    assistant.rename(target / "drafter")
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *PRINTABLE, *OTHERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    save_tokenizer(tokenizer, TEMPLATE, target)
    return target


def save_tokenizer(tokenizer: Tokenizer, template: str, folder: Path) -> None:
    """Write a tokenizer with a chat template into a model's folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
