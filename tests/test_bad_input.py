"""What a user can get wrong: one line with cause and remedy, exit code 2, no half-done work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from gemma_mtp_mlx import hub, load
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
def builtin() -> str:
    """Return the folder of the built-in pair, whose vocabulary has an end of text."""
    return str(hub.builtin())


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
        (["--num-draft-tokens", "16"], ["--num-draft-tokens is 16", "15"]),
        (["--num-draft-tokens", "four"], ["--num-draft-tokens is four", "auto"]),
        (["--repetition-penalty", "0"], ["repetition_penalty is 0"]),
        (["--presence-penalty", "inf"], ["presence_penalty is inf"]),
        (["--frequency-penalty", "nan"], ["frequency_penalty is nan"]),
        (["--penalty-context-size", "0"], ["context_size is 0", "at least 1"]),
        (["--logprobs", "2"], ["--logprobs", "--json"]),
        (["--logprobs", "21", "--json"], ["logprobs is 21", "at most 20"]),
        (["--thinking"], ["thinking", "turn it off"]),
        (["--thinking-budget", "-1"], ["thinking_budget is -1"]),
        (["--json-schema", "{"], ["--json-schema", "JSON"]),
        (["--json-schema", "/no/such/file"], ["/no/such/file", "No such file"]),
        (["--grammar", "/no/such/file"], ["/no/such/file", "No such file"]),
        (["--regex", "a", "--grammar", "start: x"], ["one of", "regex"]),
        (["--prompt-cache-file", "/no/such/file"], ["/no/such/file", "prompt cache"]),
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
        (["batch"], ["--prompts-file", "--help"]),
        (["batch", "--prompts-file", "x"], ["--output", "--help"]),
        (["cache-prompt"], ["--prompt-cache-file", "--help"]),
        (["cache-prompt", "--prompt-cache-file", "x"], ["no prompt", "--prompt TEXT"]),
        (["convert"], ["--hf-path", "--help"]),
        (["convert", "--hf-path", "x"], ["--mlx-path", "--help"]),
        (["pull"], ["name", "--help"]),
        (["pull", "gemma4:9b"], ["no short name gemma4:9b", "gemma4:e2b"]),
        (["pull", "gemma-4"], ["there is no folder gemma-4", "owner/name", "gemma4:26b"]),
        (["rm"], ["name", "--help"]),
        (["rm", "nobody/no-such-model"], ["nobody/no-such-model is not in"]),
    ],
)
def test_a_wrong_command(capsys: Capture, argv: list[str], words: list[str]) -> None:
    _refused(capsys, argv, *words)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--regex", "(?=a)"], ["regex", "look-around"]),
        (["--regex", "("], ["regex"]),
        (["--grammar", "start: nothing"], ["grammar", "nothing"]),
        (["--json-schema", '{"type": "wizard"}'], ["json_schema", "wizard"]),
    ],
)
def test_rules_that_do_not_compile(
    capsys: Capture, builtin: str, options: list[str], words: list[str]
) -> None:
    _refused(capsys, [*GENERATE, "--model", builtin, *options], *words)


@pytest.mark.parametrize(
    "line, options, words",
    [
        ("", [], ["prompts", "no requests", '{"prompt": "Hello"}']),
        ('{"prompt": "x", "top": 1}', [], ["prompts, line 1", "'top'", "top_p"]),
        ('{"prompt": ""}', [], ["prompts, line 1", "prompt is empty"]),
        ('{"tokens": [5000]}', [], ["prompts, line 1", "token id 5000"]),
        ('{"prompt": "x", "logit_bias": {"5000": 1}}', [], ["prompts, line 1", "token 5000"]),
        ('{"prompt": "x", "num_draft_tokens": 16}', [], ["prompts, line 1", "at most 15"]),
        ('{"prompt": "x", "thinking_budget": 5}', [], ["prompts, line 1", "thinking"]),
        ('{"prompt": "x", "thinking": true}', [], ["prompts, line 1", "thinking"]),
        ('{"messages": [{"role": "wizard"}]}', [], ["prompts, line 1", "wizard"]),
        ('{"prompt": "x", "regex": "("}', [], ["prompts, line 1", "regex"]),
        ('{"prompt": "x"}\n{"prompt": "y", "regex": "("}', [], ["prompts, line 2", "regex"]),
        ('{"prompt": "x"}\nx', [], ["prompts, line 2", "not JSON"]),
        ('{"prompt": "x"}', ["--batch-size", "0"], ["--batch-size", "equal to 1"]),
        ('{"prompt": "x"}', ["--kv-budget", "0"], ["--kv-budget is 0", "above 0"]),
        ('{"prompt": "x"}', ["--kv-budget", "0.000001"], ["0.00 GB", "raise it"]),
        ('{"prompt": "x"}', ["--kv-budget", "1e9"], ["lower the budget"]),
        ('{"prompt": "x"}', ["--max-tokens", "0"], ["prompts, line 1", "max_tokens is 0"]),
        ('{"prompt": "x"}', ["--num-draft-tokens", "-1"], ["--num-draft-tokens is -1"]),
        ('{"prompt": "x"}', ["--output", "/no/such/folder/out"], ["/no/such/folder", "make it"]),
        ('{"prompt": "x"}', ["--output", "/dev/null"], ["/dev/null", "not a file"]),
        ('{"prompt": "x"}', ["--prompts-file", "/no/such/file"], ["/no/such/file", "No such file"]),
    ],
)
def test_a_wrong_batch(
    tmp_path: Path, capsys: Capture, builtin: str, line: str, options: list[str], words: list[str]
) -> None:
    (tmp_path / "prompts").write_text(line + "\n")
    files = ["--prompts-file", str(tmp_path / "prompts"), "--output", str(tmp_path / "out")]
    _refused(capsys, ["batch", "--model", builtin, *files, *options], *words)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]


def test_a_request_that_can_never_fit(tmp_path: Path, capsys: Capture, builtin: str) -> None:
    requests = ['{"prompt": "x"}', '{"prompt": "x", "max_tokens": 4000}']
    (tmp_path / "prompts").write_text("\n".join(requests) + "\n")
    files = ["--prompts-file", str(tmp_path / "prompts"), "--output", str(tmp_path / "out")]
    argv = ["batch", "--model", builtin, *files, "--kv-budget", "0.003"]
    _refused(capsys, argv, "prompts, line 2", "cache positions", "budget")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]


def test_the_prompts_are_not_the_output(tmp_path: Path, capsys: Capture, builtin: str) -> None:
    file = tmp_path / "prompts"
    file.write_text('{"prompt": "x"}')
    argv = ["batch", "--model", builtin, "--prompts-file", str(file), "--output", str(file)]
    _refused(capsys, argv, str(file), "choose another --output")
    assert file.read_text() == '{"prompt": "x"}'


def test_a_prompt_too_short_to_be_cached(sound: Path, tmp_path: Path, capsys: Capture) -> None:
    files = ["--prompt", "x", "--prompt-cache-file", str(tmp_path / "cache")]
    _refused(capsys, ["cache-prompt", "--model", str(sound), *files], "512")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_cache_of_another_model(
    sound: Path, tmp_path: Path, capsys: Capture, builtin: str
) -> None:
    cache = ["--prompt", "x" * 600, "--prompt-cache-file", str(tmp_path / "cache")]
    assert main(["cache-prompt", "--model", str(sound), *cache]) == 0
    capsys.readouterr()
    argv = ["generate", "--model", builtin, "--prompt", "x\n" * 600, *cache[2:]]
    _refused(capsys, argv, str(tmp_path / "cache"), "another model", "make it again")


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
