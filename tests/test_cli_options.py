"""The commands and their options, frozen: adding a flag is a decision that shows in this file."""

import typer
from typer.main import get_command

from gemma_mtp_mlx.api import MAX_BATCH
from gemma_mtp_mlx.cli import ROWS, app
from gemma_mtp_mlx.convert.recipe import MODES
from gemma_mtp_mlx.options import MOST_DRAFTS, QMode
from gemma_mtp_mlx.round import MAX_DRAFTS

COMMANDS = {
    "generate": {
        "--model": None,
        "--draft-model": None,
        "--num-draft-tokens": "auto",
        "--fast": False,
        "--prompt -p": None,
        "--prompt-file": None,
        "--max-tokens -m": 256,
        "--temp": 0.0,
        "--top-p": 1.0,
        "--top-k": 0,
        "--min-p": 0.0,
        "--seed": None,
        "--repetition-penalty": 1.0,
        "--presence-penalty": 0.0,
        "--frequency-penalty": 0.0,
        "--penalty-context-size": 20,
        "--system-prompt": None,
        "--ignore-chat-template": False,
        "--thinking": None,
        "--thinking-budget": None,
        "--stop": None,
        "--json-schema": None,
        "--regex": None,
        "--grammar": None,
        "--prompt-cache-file": None,
        "--logprobs": None,
        "--json": False,
        "--verbose": False,
    },
    "batch": {
        "--prompts-file": "required",
        "--output": "required",
        "--model": None,
        "--draft-model": None,
        "--num-draft-tokens": "auto",
        "--fast": False,
        "--batch-size": 8,
        "--kv-budget": None,
        "--max-tokens -m": 256,
    },
    "cache-prompt": {
        "--prompt-cache-file": "required",
        "--model": None,
        "--prompt -p": None,
        "--prompt-file": None,
        "--system-prompt": None,
        "--ignore-chat-template": False,
        "--thinking": None,
    },
    "chat": {
        "--model": None,
        "--draft-model": None,
        "--num-draft-tokens": "auto",
        "--fast": False,
        "--max-tokens -m": None,
        "--context": 32768,
        "--temp": 0.0,
        "--top-p": 1.0,
        "--top-k": 0,
        "--min-p": 0.0,
        "--seed": None,
        "--system-prompt": None,
        "--ignore-chat-template": False,
        "--thinking": None,
        "--thinking-budget": None,
        "--hide-thinking": False,
    },
    "convert": {
        "--hf-path": "required",
        "--mlx-path": "required",
        "--draft-hf-path": "auto",
        "--quantize -q": False,
        "--q-mode": None,
        "--q-bits": None,
        "--q-group-size": None,
        "--q-recipe": None,
        "--dtype": None,
        "--upload-repo": None,
    },
    "pull": {"name": "required", "--no-drafter": False},
    "list": {"--json": False},
    "rm": {"name": "required", "--yes -y": False},
    "inspect": {
        "model": "required",
        "--draft-model": "auto",
        "--memory": None,
        "--json": False,
    },
    "doctor": {
        "--model": None,
        "--draft-model": None,
        "--json": False,
    },
    "verify": {
        "model": "required",
        "--source": None,
    },
    "predict": {
        "--model": "26B-A4B",
        "--draft-model": "auto",
        "--chip": None,
        "--bits": None,
        "--draft-bits": None,
        "--batch": "1,4,8",
        "--context": 1024,
        "--acceptance": None,
        "--prompts": None,
        "--memory": None,
        "--json": False,
        "--plot": None,
    },
    "report": {
        "--model": None,
        "--draft-model": None,
        "--out": None,
        "--batch": None,
        "--kinds": None,
        "--max-tokens -m": 64,
        "--repeats": 3,
    },
    "serve": {
        "--model": None,
        "--draft-model": None,
        "--num-draft-tokens": "auto",
        "--fast": False,
        "--host": "127.0.0.1",
        "--port": 11434,
        "--max-batch": 8,
        "--max-queue": 64,
        "--kv-budget": None,
        "--api-key": None,
        "--speculative-config": None,
        "--allow-host": None,
        "--allow-origin": None,
    },
}
MOST_OPTIONS = 29


def _commands() -> dict[str, object]:
    group = get_command(app)
    return dict(group.commands)


def test_commands_and_options() -> None:
    found = {
        name: {
            " ".join(param.opts): "required" if param.required else param.default
            for param in command.params
        }
        for name, command in _commands().items()
    }
    assert found == COMMANDS


def test_options_of_the_program_itself() -> None:
    assert [" ".join(param.opts) for param in get_command(app).params] == ["--version"]


def test_no_command_grows_without_bound() -> None:
    assert max(len(options) for options in COMMANDS.values()) < MOST_OPTIONS


def test_every_option_has_help() -> None:
    for command in _commands().values():
        assert all(param.help for param in command.params)


def test_bounds_are_the_runtime_s() -> None:
    assert (MOST_DRAFTS, ROWS) == (MAX_DRAFTS, MAX_BATCH)
    assert tuple(QMode) == MODES


def test_rich_output_is_off() -> None:
    assert isinstance(app, typer.Typer)
    assert app.rich_markup_mode is None
    assert not app.pretty_exceptions_enable
