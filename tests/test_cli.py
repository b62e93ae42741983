"""The command line: what goes to stdout and stderr, what options do, how a run ends."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gemma_mtp_mlx import Pair, SamplingParams, hub, load
from gemma_mtp_mlx.cli import main
from gemma_mtp_mlx.prompts import Prompt, Prompts
from gemma_mtp_mlx.request import Request
from tests.conftest import heed_ctrl_c
from tests.text_model import write_text_model

PROMPT = "def f(x):"
TOKENS = 12
JSON_NAMES = [
    *("text", "tokens", "finish_reason", "prompt_tokens", "cached_tokens", "prompt_tps"),
    *(
        "generation_tokens",
        "generation_tps",
        "peak_memory",
        "seed",
        "draft_rounds",
        "draft_n",
        "draft_n_accepted",
    ),
    *("accepted_per_position", "acceptance_rate", "mean_accept_len"),
]
FOUR = ["--num-draft-tokens", "4"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return load(folder)


def _generate(folder: Path, *options: str) -> int:
    return main(["generate", "--model", str(folder), "--max-tokens", str(TOKENS), *options])


def _objects(folder: Path, capsys: Capture, *options: str) -> list[dict]:
    assert _generate(folder, "--json", *options) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def _run(*argv: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "gemma_mtp_mlx", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_text_on_stdout_and_the_rest_on_stderr(folder: Path, pair: Pair, capsys: Capture) -> None:
    assert _generate(folder, "--prompt", PROMPT) == 0
    shown = capsys.readouterr()
    assert shown.out == pair.generate(PROMPT, SamplingParams(TOKENS)).text + "\n"
    for words in ("Loaded", "Reading 1 prompt", "Generation: 12 tokens", "Peak memory", "Drafts: "):
        assert words in shown.err


def test_several_prompts_run_as_one_batch(folder: Path, pair: Pair, capsys: Capture) -> None:
    prompts = [PROMPT, "import os", "x"]
    assert _generate(folder, *(word for p in prompts for word in ("--prompt", p))) == 0
    shown = capsys.readouterr()
    results = pair.generate_batch(prompts, SamplingParams(TOKENS))
    texts = [f"==> prompt {n} <==\n{r.text}\n" for n, r in enumerate(results, 1)]
    assert shown.out == "\n".join(texts)
    assert "Generation: 36 tokens" in shown.err


def test_json_is_one_object_per_prompt_and_nothing_else(
    folder: Path, pair: Pair, capsys: Capture
) -> None:
    found = _objects(folder, capsys, "--prompt", PROMPT, "-p", "import os", "--seed", "3", *FOUR)
    results = pair.generate_batch([PROMPT, "import os"], SamplingParams(TOKENS, seed=3))
    for shown, result in zip(found, results, strict=True):
        assert list(shown) == JSON_NAMES
        assert (shown["text"], shown["tokens"]) == (result.text, result.tokens)
        assert (shown["finish_reason"], shown["seed"]) == ("length", 3)
        assert shown["prompt_tokens"] == result.stats.prompt_tokens
        assert shown["generation_tokens"] == TOKENS
        assert shown["draft_rounds"] < shown["draft_n"] <= 4 * shown["draft_rounds"]
        assert shown["draft_n_accepted"] == sum(shown["accepted_per_position"])
        assert shown["mean_accept_len"] == (TOKENS - 1) / shown["draft_rounds"]
        assert 0 < shown["peak_memory"] < 100


@pytest.mark.parametrize("options", [["--num-draft-tokens", "0"], ["--draft-model", "none"]])
def test_without_drafts_the_text_is_the_same(
    folder: Path, capsys: Capture, options: list[str]
) -> None:
    (plain,) = _objects(folder, capsys, "--prompt", PROMPT, *options)
    (drafted,) = _objects(folder, capsys, "--prompt", PROMPT, "--num-draft-tokens", "7")
    assert plain["tokens"] == drafted["tokens"]
    assert (plain["draft_n"], plain["draft_rounds"]) == (0, TOKENS - 1)
    assert len(drafted["accepted_per_position"]) == 7


def test_draft_model_names_a_folder(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    moved = tmp_path / "target"
    moved.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (moved / file.name).symlink_to(file)
    drafter = str(folder / "drafter")
    (found,) = _objects(moved, capsys, "--prompt", PROMPT, "--draft-model", drafter)
    assert found["draft_n"] > 0


def test_sampling_options_reach_the_sampler(folder: Path, pair: Pair, capsys: Capture) -> None:
    options = ["--temp", "1.5", "--top-p", "0.9", "--top-k", "20", "--min-p", "0.05", "--seed", "5"]
    (found,) = _objects(folder, capsys, "--prompt", PROMPT, *options)
    params = SamplingParams(TOKENS, 1.5, top_k=20, top_p=0.9, min_p=0.05, seed=5)
    assert found["tokens"] == pair.generate(PROMPT, params).tokens
    assert found["tokens"] != pair.generate(PROMPT, SamplingParams(TOKENS)).tokens


def test_penalties_reach_the_sampler(folder: Path, pair: Pair, capsys: Capture) -> None:
    names = ("repetition", "presence", "frequency")
    values = {f"{name}_penalty": value for name, value in zip(names, (1.5, 0.5, 0.25), strict=True)}
    sizes = {f"{name}_context_size": 7 for name in names}
    for given in (values, *({name: value} for name, value in values.items())):
        options = [word for n, v in given.items() for word in (f"--{n.replace('_', '-')}", str(v))]
        options += ["--penalty-context-size", "7"]
        (found,) = _objects(folder, capsys, "--prompt", PROMPT, *options)
        expected = pair.generate(PROMPT, SamplingParams(TOKENS, **given, **sizes)).tokens
        assert found["tokens"] == expected != pair.generate(PROMPT, SamplingParams(TOKENS)).tokens


def test_logprobs_are_in_the_json(folder: Path, pair: Pair, capsys: Capture) -> None:
    (found,) = _objects(folder, capsys, "--prompt", PROMPT, "--logprobs", "3")
    expected = pair.generate(PROMPT, SamplingParams(TOKENS, logprobs=3))
    assert [entry["token"] for entry in found["logprobs"]] == expected.tokens
    for entry, (own, top) in zip(found["logprobs"], expected.logprobs, strict=True):
        assert entry["logprob"] == pytest.approx(own, abs=1e-4)
        assert [token for token, _ in entry["top"]] == [token for token, _ in top]
        assert entry["top"][0][0] == entry["token"]


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
GRAMMAR = 'start: "yes" | "no"\n'


@pytest.mark.parametrize(
    "option, given, pattern",
    [
        (
            "--json-schema",
            json.dumps({**SCHEMA, "additionalProperties": False}),
            r'\{\s*"a"\s*:.*\}',
        ),
        ("--regex", "[0-9]{3}-[a-c]{1,3};", r"[0-9]{3}-[a-c]{1,3};"),
        ("--grammar", GRAMMAR, "yes|no"),
        ("--grammar", 'root ::= "yes" | "no"', "yes|no"),
    ],
)
def test_what_the_text_must_match(
    tmp_path: Path, capsys: Capture, option: str, given: str, pattern: str
) -> None:
    (tmp_path / "rules").write_text(given)
    shown = []
    for value in [given, str(tmp_path / "rules")][: 1 if option == "--regex" else 2]:
        options = ["--prompt", "a", option, value, "--max-tokens", "40", "--temp", "1"]
        assert main(["generate", *options, "--seed", "1"]) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    assert re.fullmatch(pattern, shown[0].strip(), re.DOTALL)


@pytest.mark.parametrize(
    "options, thinking", [([], None), (["--thinking"], True), (["--no-thinking"], False)]
)
def test_thinking_is_asked_of_the_template(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], thinking: bool | None
) -> None:
    encode, seen = Prompts.encode, []

    def record(self: Prompts, prompt: Prompt, **how: object) -> list[int]:
        seen.append(how.get("thinking"))
        return encode(self, prompt)

    monkeypatch.setattr(Prompts, "encode", record)
    assert _generate(folder, "--prompt", PROMPT, *options) == 0
    assert seen == [thinking, thinking]  # of the text, and of the request made of its tokens


@pytest.mark.parametrize("options", [[], ["--system-prompt", "Be brief."]])
def test_a_prompt_cache_is_taken_over(
    folder: Path, tmp_path: Path, capsys: Capture, options: list[str]
) -> None:
    text, cache = "def f(x): return x\n" * 40, str(tmp_path / "cache")
    (tmp_path / "text").write_text(text)
    files = ["--prompt-file", str(tmp_path / "text"), "--prompt-cache-file", cache]
    assert main(["cache-prompt", "--model", str(folder), *files, *options]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"{cache}: 512 of 7" in shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text"]
    prompts = ["--prompt", text + "def g(", "--prompt", text + "import os", *options]
    plain = _objects(folder, capsys, *prompts)
    reused = _objects(folder, capsys, *prompts, "--prompt-cache-file", cache)
    assert [found["cached_tokens"] for found in reused] == [512, 512]
    assert [found["tokens"] for found in reused] == [found["tokens"] for found in plain]
    assert plain[0]["cached_tokens"] == 0
    other = ["--prompt", "o" * 700, "--prompt-cache-file", cache]
    assert _generate(folder, *other) == 0
    assert f"{cache}: no prompt begins with what it holds" in capsys.readouterr().err


def test_a_prompt_cache_ends_where_longer_prompts_differ(
    folder: Path, pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    text, cache = "a" * 1020, str(tmp_path / "cache")
    assert len(pair.encode(text)) > 1024 > len(pair.encode(text, template=False))
    files = ["--prompt", text, "--prompt-cache-file", cache]
    assert main(["cache-prompt", "--model", str(folder), *files]) == 0
    head = pair.encode(text).index(pair.encode("a", template=False)[0])
    assert f"{cache}: {(head + 1020) // 512 * 512} of 10" in capsys.readouterr().err
    (found,) = _objects(folder, capsys, "--prompt", text + "b", "--prompt-cache-file", cache)
    assert found["cached_tokens"] == (head + 1020) // 512 * 512


def test_a_prompt_that_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    extend = Request.extend

    def fail(self: Request, *args: object) -> list[int]:
        if len(self.prompt) > 20 and len(self.tokens) > 3:
            raise RuntimeError("out of luck")
        return extend(self, *args)

    monkeypatch.setattr(Request, "extend", fail)
    assert _generate(folder, "--prompt", "a", "--prompt", "b" * 30, "--json") == 1
    shown = capsys.readouterr()
    whole, failed = map(json.loads, shown.out.splitlines())
    assert (len(whole["tokens"]), failed) == (TOKENS, {"error": "out of luck"})
    assert shown.err.endswith("mlx-gemma-mtp: error: prompt 2 failed: out of luck\n")


def test_a_fresh_seed_is_reported_and_repeats_the_text(folder: Path, capsys: Capture) -> None:
    options = ["--prompt", PROMPT, "--temp", "2"]
    (first,) = _objects(folder, capsys, *options)
    (second,) = _objects(folder, capsys, *options, "--seed", str(first["seed"]))
    (third,) = _objects(folder, capsys, *options)
    assert first["tokens"] == second["tokens"] != third["tokens"]


def test_stop_texts_end_the_output(folder: Path, pair: Pair, capsys: Capture) -> None:
    text = pair.generate(PROMPT, SamplingParams(TOKENS)).text
    options = ["--stop", "no such text", "--stop", text[6:8]]
    (found,) = _objects(folder, capsys, "--prompt", PROMPT, *options)
    assert found["text"] == text[: text.index(text[6:8])]
    assert found["finish_reason"] == "stop"


def test_templates(folder: Path, pair: Pair, capsys: Capture) -> None:
    counts = []
    for options in ([], ["--ignore-chat-template"], ["--system-prompt", "Be brief."]):
        (found,) = _objects(folder, capsys, "--prompt", PROMPT, *options)
        counts.append(found["prompt_tokens"])
    assert counts == [
        len(pair.encode(PROMPT)),
        len(pair.encode(PROMPT, template=False)),
        len(pair.encode(PROMPT, system="Be brief.")),
    ]
    assert counts[1] < counts[0] < counts[2]


def test_prompt_files_are_taken_as_they_are(
    folder: Path, pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("αβγ\r\n  x\n".encode())
    options = ["--prompt", PROMPT, "--prompt-file", str(file), "--ignore-chat-template"]
    found = _objects(folder, capsys, *options)
    lengths = [len(pair.encode(p, template=False)) for p in (PROMPT, "αβγ\r\n  x\n")]
    assert [f["prompt_tokens"] for f in found] == lengths


def test_standard_input_is_a_prompt_file(folder: Path, pair: Pair) -> None:
    options = ["--prompt-file", "-", "--max-tokens", "8"]
    done = _run("generate", "--model", str(folder), *options, input=PROMPT)
    assert done.returncode == 0
    assert done.stdout == pair.generate(PROMPT, SamplingParams(8)).text + "\n"
    assert "Generation: 8 tokens" in done.stderr


def test_verbose_says_more(folder: Path, capsys: Capture) -> None:
    assert _generate(folder, "--prompt", PROMPT, "--verbose", "--seed", "9") == 0
    shown = capsys.readouterr().err
    for words in ("Target: 8 layers", "Drafter: 4 layers", "Prompt 1: ", "seed 9", "Depth: "):
        assert words in shown


def test_without_a_model_the_built_in_pair_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(hub, "builtin", lambda: folder)
    assert main(["generate", "--prompt", PROMPT, "--max-tokens", "3"]) == 0
    notices = [line for line in capsys.readouterr().err.splitlines() if "built-in" in line]
    assert len(notices) == 1
    assert main(["generate", "--model", str(folder), "--prompt", PROMPT, "--max-tokens", "3"]) == 0
    assert "built-in" not in capsys.readouterr().err


def test_the_built_in_pair_writes_code() -> None:
    done = _run("generate", "--prompt", "def read(path):", "--max-tokens", "32")
    assert done.returncode == 0
    assert len(done.stdout.split()) > 5
    assert "built-in" in done.stderr


@pytest.mark.parametrize("options", [[], ["-q", "--q-bits", "4", "--q-group-size", "32"]])
def test_a_converted_folder_generates(
    folder: Path, pair: Pair, tmp_path: Path, capsys: Capture, options: list[str]
) -> None:
    out = tmp_path / "out"
    source = ["--hf-path", str(folder), "--draft-hf-path", str(folder / "drafter")]
    assert main(["convert", *source, "--mlx-path", str(out), *options]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"{out / 'drafter'}: " in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (found,) = _objects(out, capsys, "--prompt", PROMPT)
    assert found["draft_n"] > 0
    if not options:
        assert found["tokens"] == pair.generate(PROMPT, SamplingParams(TOKENS)).tokens


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_do_not_wait_for_mlx_lm(option: str) -> None:
    code = (
        "import sys\nfrom gemma_mtp_mlx.cli import main\n"
        f"code = main([{option!r}])\n"
        "sys.exit(code or sum(name in sys.modules for name in ('mlx_lm', 'transformers', 'mlx')))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mlx-gemma-mtp" in done.stdout


@contextmanager
def _started(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a run that takes long, and wait until some of its text is there."""
    command = [sys.executable, "-P", "-m", "gemma_mtp_mlx", "generate", "--model", str(folder)]
    with subprocess.Popen(
        [*command, "--prompt", PROMPT, "--max-tokens", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    ) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.read(5)
            yield run
        finally:
            run.kill()


def test_ctrl_c_keeps_what_was_generated(folder: Path) -> None:
    with _started(folder) as run:
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert out.endswith("\n")
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err


def test_a_broken_pipe_is_quiet(folder: Path) -> None:
    with _started(folder) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        err = run.stderr.read()
        assert run.wait(timeout=60) == 1
    assert err.splitlines()[-1].startswith("Reading 1 prompt")


def test_what_stdout_cannot_show_is_replaced(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    options = ["--prompt", PROMPT, "--max-tokens", "40", "--temp", "5", "--seed", "1"]
    done = _run("generate", "--model", str(folder), *options, env=environment)
    assert done.returncode == 0
    assert "?" in done.stdout
