"""The commands and their options, frozen: adding a flag is a decision that shows in this file."""

import typer
from typer.main import get_command

from gemma_mtp_mlx.cli import app
from gemma_mtp_mlx.round import MAX_DRAFTS

COMMANDS = {
    "generate": {
        "--model": None,
        "--draft-model": None,
        "--num-draft-tokens": 4,
        "--prompt -p": None,
        "--prompt-file": None,
        "--max-tokens -m": 256,
        "--temp": 0.0,
        "--top-p": 1.0,
        "--top-k": 0,
        "--min-p": 0.0,
        "--seed": None,
        "--system-prompt": None,
        "--ignore-chat-template": False,
        "--stop": None,
        "--json": False,
        "--verbose": False,
    },
    "convert": {
        "--hf-path": "required",
        "--mlx-path": "required",
        "--draft-hf-path": None,
        "--quantize -q": False,
        "--q-bits": None,
        "--q-group-size": None,
        "--dtype": None,
    },
}
MOST_OPTIONS = 17


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


def test_draft_tokens_are_bounded_as_the_runtime_bounds_them() -> None:
    (param,) = (p for p in _commands()["generate"].params if p.name == "num_draft_tokens")
    assert (param.min, param.max) == (0, MAX_DRAFTS)


def test_rich_output_is_off() -> None:
    assert isinstance(app, typer.Typer)
    assert app.rich_markup_mode is None
    assert not app.pretty_exceptions_enable
