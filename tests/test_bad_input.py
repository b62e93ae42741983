"""What a user can get wrong: one line with cause and remedy, exit code 2, no half-done work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from gemma_mtp_mlx import load
from gemma_mtp_mlx.checkpoint import check_safetensors
from gemma_mtp_mlx.cli import main
from tests.checkpoints import write_assistant, write_checkpoint
from tests.text_model import write_text_model

Capture = pytest.CaptureFixture[str]
Damage = Callable[[Path], None]
GENERATE = ["generate", "--prompt", "x", "--max-tokens", "2"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """Return a copy of a sound model, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def _refused(capsys: Capture, argv: list[str], *words: str) -> None:
    """Check that the command ends in one line on stderr that holds all the words."""
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    *before, line = shown.err.splitlines()
    assert line.startswith("mlx-gemma-mtp: error: ")
    assert not [other for other in before if not other.startswith(("Loaded", "Reading"))]
    for word in words:
        assert word in line


def _edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _corrupt(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype"', b'"dtypo"', 1))


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights at all")


def _not_a_number(folder: Path) -> None:
    """Put a NaN into the last tensor of the file."""
    file = folder / "model.safetensors"
    assert "F32" in {stored.dtype for stored in check_safetensors(file).values()}
    file.write_bytes(file.read_bytes()[:-4] + b"\xff\xff\xff\x7f")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def _wrong_type(folder: Path) -> None:
    _edit(folder / "config.json", model_type="llama")


def _broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "truncated": (_truncate, ("model.safetensors", "incomplete", "again")),
    "corrupt": (_corrupt, ("model.safetensors", "damaged", "again")),
    "garbage": (_garbage, ("model.safetensors", "damaged", "again")),
    "nan": (_not_a_number, ("tensor", "nan", "again")),
    "no weights": (_no_weights, ("model.safetensors", "download")),
    "no config": (_no_config, ("config.json", "give")),
    "broken config": (_broken_config, ("config.json", "JSON", "again")),
    "wrong model_type": (_wrong_type, ("llama", "model_type", "expected")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["", "drafter"])
def test_a_damaged_model(folder: Path, capsys: Capture, damage: str, part: str) -> None:
    apply, words = DAMAGES[damage]
    apply(folder / part)
    if (damage, part) == ("no config", "drafter"):
        words = ("has no drafter folder", "name")
    _refused(capsys, [*GENERATE, "--model", str(folder)], *words)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["", "drafter"])
def test_a_damaged_source_leaves_nothing_behind(
    folder: Path, capsys: Capture, damage: str, part: str
) -> None:
    apply, words = DAMAGES[damage]
    apply(folder / part)
    sources = ["--hf-path", str(folder), "--draft-hf-path", str(folder / "drafter")]
    out = folder.parent / "new" / "out"
    _refused(capsys, ["convert", *sources, "--mlx-path", str(out)], *words)
    assert sorted(path.name for path in folder.parent.rglob("*out*")) == []


def test_a_damaged_tokenizer(folder: Path, capsys: Capture) -> None:
    _broken_tokenizer(folder)
    _refused(capsys, [*GENERATE, "--model", str(folder)], "tokenizer", str(folder))


def test_a_folder_without_a_tokenizer(folder: Path, capsys: Capture) -> None:
    (folder / "tokenizer.json").unlink()
    _refused(capsys, [*GENERATE, "--model", str(folder)], "tokenizer")


def test_a_drafter_of_another_size(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other"
    write_assistant(other, "12b")
    _edit(other / "config.json", backbone_hidden_size=64)
    argv = [*GENERATE, "--model", str(folder), "--draft-model", str(other)]
    _refused(capsys, argv, "hidden size 64", "128", "vocabulary 192", "--draft-model none")


def test_a_target_as_drafter_and_a_drafter_as_target(folder: Path, capsys: Capture) -> None:
    drafter = str(folder / "drafter")
    _refused(capsys, [*GENERATE, "--model", drafter], "gemma4_assistant", "not a Gemma 4 model")
    argv = [*GENERATE, "--model", str(folder), "--draft-model", str(folder)]
    _refused(capsys, argv, "gemma4_text", "not a Gemma 4 drafter")


def test_no_drafter_in_the_folder(tmp_path: Path, capsys: Capture) -> None:
    write_checkpoint(tmp_path / "target", "31b")
    argv = [*GENERATE, "--model", str(tmp_path / "target")]
    _refused(capsys, argv, "no drafter folder", "none")


@pytest.mark.parametrize("option", ["--model", "--draft-model"])
def test_a_folder_that_is_not_there(sound: Path, capsys: Capture, option: str) -> None:
    argv = ["--model", str(sound), option, "/no/such/folder"]
    _refused(capsys, [*GENERATE, *argv], "there is no folder /no/such/folder", "give")


def test_a_file_instead_of_a_folder(sound: Path, capsys: Capture) -> None:
    file = str(sound / "model.safetensors")
    _refused(capsys, [*GENERATE, "--model", file], file, "is a file", "give the folder")


def test_a_repository_without_a_network(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    argv = [*GENERATE, "--model", "nobody/no-such-model"]
    _refused(capsys, argv, "nobody/no-such-model", "network", "folder")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--num-draft-tokens", "-1"], ["--num-draft-tokens", "0"]),
        (["--num-draft-tokens", "16"], ["--num-draft-tokens", "15"]),
        (["--num-draft-tokens", "four"], ["--num-draft-tokens", "integer"]),
        (["--top-p", "1.5"], ["top_p is 1.5", "at most 1"]),
        (["--top-p", "0"], ["top_p is 0", "above 0"]),
        (["--top-p", "nan"], ["top_p is nan"]),
        (["--min-p", "2"], ["min_p is 2"]),
        (["--top-k", "-3"], ["top_k is -3"]),
        (["--temp", "-1"], ["temperature is -1"]),
        (["--temp", "nan"], ["temperature is nan"]),
        (["--max-tokens", "0"], ["max_tokens is 0", "at least 1"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--stop", ""], ["stop", "empty"]),
        (["--top_p", "1"], ["--top_p", "--help"]),
        (["more"], ["more", "--help"]),
        (["--prompt", ""], ["prompt is empty", "give"]),
        (["--prompt", "x" * 4096], ["4096", "context", "shorten"]),
        (["--prompt", "\udcff"], ["UTF-8"]),
        (["--prompt-file", "/no/such/file"], ["/no/such/file", "No such file"]),
        (["--prompt-file", "/"], ["/", "directory"]),
    ],
)
def test_a_wrong_option(sound: Path, capsys: Capture, options: list[str], words: list[str]) -> None:
    _refused(capsys, [*GENERATE, "--model", str(sound), *options], *words)


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["Missing command", "--help"]),
        (["write"], ["write", "--help"]),
        (["generate"], ["no prompt", "--prompt TEXT", "--prompt-file"]),
        (["convert"], ["--hf-path", "--help"]),
        (["convert", "--hf-path", "x"], ["--mlx-path", "--help"]),
    ],
)
def test_a_wrong_command(capsys: Capture, argv: list[str], words: list[str]) -> None:
    _refused(capsys, argv, *words)


def test_a_prompt_file_that_is_not_text(sound: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"abc\xff")
    argv = ["generate", "--model", str(sound), "--prompt-file", str(file)]
    _refused(capsys, argv, str(file), "byte 3", "UTF-8")


def test_an_unknown_chat_role(sound: Path) -> None:
    with pytest.raises(ValueError, match="unknown chat role 'wizard'; use one of"):
        load(sound).encode([{"role": "wizard", "content": "x"}])


def test_a_template_that_refuses_system_messages(folder: Path, capsys: Capture) -> None:
    file = folder / "tokenizer_config.json"
    template = json.loads(file.read_text())["chat_template"].replace("'system', ", "")
    _edit(file, chat_template=template)
    argv = [*GENERATE, "--model", str(folder), "--system-prompt", "Be brief."]
    _refused(capsys, argv, "chat template refuses", "unknown role system")


def test_a_system_prompt_without_a_template(folder: Path, capsys: Capture) -> None:
    argv = [*GENERATE, "--model", str(folder), "--system-prompt", "Be brief."]
    _refused(capsys, [*argv, "--ignore-chat-template"], "system prompt", "template")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--q-bits", "4"], ["--q-bits", "-q"]),
        (["--q-group-size", "32"], ["--q-group-size", "-q"]),
        (["-q", "--q-bits", "7"], ["bits is 7", "must be"]),
        (["-q", "--q-group-size", "48"], ["group_size is 48", "must be"]),
        (["--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["--draft-hf-path", "/no/such/folder"], ["/no/such/folder", "give"]),
        (["--hf-path", "/no/such/folder"], ["/no/such/folder", "give"]),
    ],
)
def test_a_wrong_conversion(
    sound: Path, tmp_path: Path, capsys: Capture, options: list[str], words: list[str]
) -> None:
    out = tmp_path / "out"
    argv = ["convert", "--hf-path", str(sound), "--mlx-path", str(out), *options]
    _refused(capsys, argv, *words)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(sound: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine").write_text("mine")
    argv = ["convert", "--hf-path", str(sound), "--mlx-path", str(tmp_path)]
    _refused(capsys, argv, str(tmp_path), "not empty", "choose another")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
