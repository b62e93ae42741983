"""A tiny model whose tokenizer has Gemma 4's special tokens and whose template knows tools.

Characters are tokens; one that is not printable ASCII is spelled in bytes, as Gemma 4 spells what
it has no token for. The template has the outline of Gemma 4's: thinking and tools are declared in
the system turn, calls and responses stand in the model's turn, arguments are a mapping.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

from tests.checkpoints import write_pair
from tests.text_model import save_tokenizer

SPECIAL = [
    *("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<unk>", "<|think|>"),
    *("<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", '<|"|>'),
]
ENDS = ["<eos>", "<turn|>", "<|tool_response>"]
SPELLED = "é日🙂"
PRINTABLE = [chr(code) for code in range(32, 127)]
TEMPLATE = """\
{%- macro value(it) -%}
{%- if it is string -%}<|"|>{{ it }}<|"|>
{%- elif it is boolean -%}{{ 'true' if it else 'false' }}
{%- elif it is mapping -%}{ {%- for k, v in it | dictsort -%}
{{ ',' if not loop.first }}{{ k }}:{{ value(v) }}{%- endfor -%} }
{%- elif it is sequence -%}[{%- for v in it -%}{{ ',' if not loop.first }}{{ value(v) }}
{%- endfor -%}]
{%- else -%}{{ it }}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set turns = messages -%}
{%- if enable_thinking or tools or messages[0]['role'] in ('system', 'developer') -%}
{{- '<|turn>system\\n' -}}
{%- if enable_thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
{%- if messages[0]['role'] in ('system', 'developer') -%}
{{- messages[0]['content'] -}}{%- set turns = messages[1:] -%}
{%- endif -%}
{%- for tool in tools or [] -%}
{{- '<|tool>declaration:' ~ tool['function']['name'] ~ '<tool|>' -}}
{%- endfor -%}
{{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in turns -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{%- if role == 'tool' -%}
{{- '<|tool_response>response:' ~ message['tool_call_id'] ~ value(message['content']) -}}
{{- '<tool_response|>' -}}
{%- else -%}
{{- '<|turn>' ~ role ~ '\\n' -}}
{%- for call in message['tool_calls'] -%}
{{- '<|tool_call>call:' ~ call['function']['name'] ~ value(call['function']['arguments']) -}}
{{- '<tool_call|>' -}}
{%- endfor -%}
{{- message['content'] or '' -}}
{%- if not message['tool_calls'] -%}{{- '<turn|>\\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'tool' -%}{{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def write_tokenizer(folder: Path) -> Path:
    """Write the tokenizer's files into a folder, which is returned."""
    spelled = sorted({f"<0x{byte:02X}>" for byte in SPELLED.encode()})
    tokens = [*SPECIAL, "\n", *PRINTABLE, *spelled]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, TEMPLATE, folder)
    return folder


def write_gemma_model(folder: Path, family: str = "31b") -> Path:
    """Write folder/target, with its assistant in folder/target/drafter, and return the target."""
    target, assistant = write_pair(folder, family, seed=1)
    assistant.rename(target / "drafter")
    ends = [SPECIAL.index(token) for token in ENDS]
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return write_tokenizer(target)
