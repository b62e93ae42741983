"""Folders made to do harm: one line, exit code 2, soon, and nothing changes on the disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_mtp_mlx.checkpoint import INDEX
from gemma_mtp_mlx.cli import main
from tests import hostile_folders as harm
from tests.hostile_folders import WEIGHTS, Harm, Tensor
from tests.text_model import write_text_model

Capture = pytest.CaptureFixture[str]
NORM = "model.norm.weight"
NAN, INF = b"\xff\xff\xff\x7f", b"\x00\x00\x80\x7f"

HEADERS: dict[str, Harm] = {
    "length 2^63": harm.length(2**63),
    "length 2^64 - 1": harm.length(2**64 - 1),
    "length 0": harm.length(0),
    "empty file": harm.file(WEIGHTS, b""),
    "overlap": harm.offsets(lambda a, b: [a - 4, b - 4]),
    "hole": harm.offsets(lambda a, b: [a + 4, b + 4]),
    "out of range": harm.offsets(lambda a, b: [a, b + 2**40]),
    "beyond 64 bits": harm.offsets(lambda a, b: [2**64 + a, 2**64 + b]),
    "negative": harm.offsets(lambda a, b: [-a, b]),
    "float": harm.offsets(lambda a, b: [float(a), b]),
    "infinite": harm.offsets(lambda a, b: [a, float("inf")]),
    "bool": harm.offsets(lambda a, b: [False, b]),
    "string": harm.offsets(lambda a, b: [str(a), str(b)]),
    "reversed": harm.offsets(lambda a, b: [b, a]),
    "three": harm.offsets(lambda a, b: [a, b, b]),
    "an object": harm.offsets(lambda a, b: {"a": a, "b": b}),
    "overflowing shape": harm.entry(shape=[2**31 - 1] * 8),
    "many axes": harm.entry(shape=[2**30] * 50_000),
    "negative shape": harm.entry(shape=[-1, -128]),
    "bool shape": harm.entry(shape=[True]),
    "shape of a text": harm.entry(shape="12"),
    "shape of an object": harm.entry(shape={}),
    "type of a list": harm.entry(dtype=["F32"]),
    "type of a number": harm.entry(dtype=32),
    "no type": harm.entry(dtype=None),
    "unknown type": harm.entry(dtype="F4\n"),
    "no object": harm.header(lambda text: "[" * 8 + "]" * 8),
    "deep": harm.header(lambda text: '{"a":' * 10**5 + "1" + "}" * 10**5),
    "metadata": harm.header(lambda text: text.replace('{"format": "pt"}', "[1]")),
    "a name twice": harm.header(lambda text: text[:-1].rstrip()[:-1] + "," + text[1:]),
    "a key twice": harm.header(lambda text: text.replace('"dtype"', '"dtype": 1, "dtype"', 1)),
    "a name of two lines": harm.header(lambda text: text.replace(NORM, r"a\nb")),
    "a name with NUL": harm.header(lambda text: text.replace(NORM, r"a\u0000")),
    "a name of a megabyte": harm.header(lambda text: text.replace(NORM, "a" * 2**20)),
    "not UTF-8": harm.file(WEIGHTS, (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc"),
    "a tensor of no size": harm.tensors(lambda t: t.update({"model.x": Tensor("F32", [0], b"")})),
    "a norm of no size": harm.tensors(lambda t: t.update({NORM: Tensor("F32", [0, 2], b"")})),
    "nan": harm.spoilt("norm.weight", NAN),
    "inf": harm.spoilt("up_proj.weight", INF),
}

NAMES: tuple[object, ...] = (
    *("../../etc/passwd", "../../etc/x.safetensors", "/etc/passwd", "/x.safetensors"),
    *("a\0.safetensors", "a\nb.safetensors", INDEX, "", "a" * 300 + ".safetensors"),
    *("a" * 200 + "é" * 40 + ".safetensors", "..\\x.safetensors", 5, None, True, [], {}),
)
FILES: dict[str, Harm] = {
    **{f"index names {name!r:.20}": harm.index({NORM: name}) for name in NAMES},
    "index names itself": harm.index({INDEX: INDEX}),
    "index is a list": harm.index(["model.safetensors"]),
    "index is empty": harm.index({}),
    "index has a key twice": harm.file(INDEX, '{"weight_map": {}, "weight_map": {}}'),
    "index names a directory": harm.both(
        harm.instead("d.safetensors", Path.mkdir), harm.index({NORM: "d.safetensors"})
    ),
    "weights are a directory": harm.instead(WEIGHTS, Path.mkdir),
    "weights are a FIFO": harm.instead(WEIGHTS, os.mkfifo),
    "weights are a loop": harm.instead(WEIGHTS, lambda path: path.symlink_to(path.name)),
    "weights are a device": harm.instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
    "config is a FIFO": harm.instead("config.json", os.mkfifo),
    "config is a loop": harm.instead("config.json", lambda path: path.symlink_to(path.name)),
    "config is a directory": harm.instead("config.json", Path.mkdir),
    "config is empty": harm.file("config.json", ""),
    "config is a list": harm.file("config.json", "[]"),
    "config is not UTF-8": harm.file("config.json", b'{"model_type": "\xff"}'),
    "config is UTF-16": harm.file("config.json", "{}".encode("utf-16")),
    "config has a key twice": harm.file("config.json", '{"model_type": 1, "model_type": 1}'),
    "config of 100 MB": harm.sparse("config.json", 100 << 20),
    "config is deep": harm.file("config.json", '{"a":' * 10**5 + "1" + "}" * 10**5),
    "config is a little deep": harm.file("config.json", '{"a":' * 200 + "1" + "}" * 200),
    "config has a long number": harm.file("config.json", f'{{"vocab_size": {"9" * 10**5}}}'),
    "a number of 4000 digits": harm.config(vocab_size=10**4000),
    "a text_config that is none": harm.config(text_config=["x"]),
    "a quantisation that is a list": harm.config(quantization=[4]),
    "a quantisation that is a text": harm.config(quantization_config="awq\nx"),
    "a method that is a list": harm.config(quantization_config={"quant_method": ["x\n"]}),
    "another method": harm.config(quantization_config={"quant_method": "compressed-tensors"}),
}
BLOCK = {"group_size": 64, "bits": 4, "mode": "affine"}
QUANTISED: dict[str, Harm] = {
    "group_size 0": harm.config(quantization={**BLOCK, "group_size": 0}),
    "group_size -64": harm.config(quantization={**BLOCK, "group_size": -64}),
    "bits '4'": harm.config(quantization={**BLOCK, "bits": "4"}),
    "bits 0": harm.config(quantization={**BLOCK, "bits": 0}),
    "bits True": harm.config(quantization={**BLOCK, "bits": True}),
    "bits 2^70": harm.config(quantization={**BLOCK, "bits": 2**70}),
    "mode []": harm.config(quantization={**BLOCK, "mode": []}),
    "mode x": harm.config(quantization={**BLOCK, "mode": "x\ny"}),
    **{
        f"a module's {params}": harm.config(quantization={**BLOCK, "model.embed_tokens": params})
        for params in (
            *({"group_size": 0, "bits": 4}, {"group_size": [64], "bits": 4}),
            *({**BLOCK, "bits": 3}, {**BLOCK, "mode": "nvfp4"}, {**BLOCK, "more": 1}),
        )
    },
    "a module of two lines": harm.config(quantization={**BLOCK, "a\nb": BLOCK}),
    "scales of no size": harm.tensors(
        lambda t: t.update({"model.embed_tokens.scales": Tensor("F32", [128, 0], b"")})
    ),
    "scales of no axis": harm.tensors(
        lambda t: t.update({"model.embed_tokens.scales": Tensor("F32", [], bytes(4))})
    ),
    "scales of a norm": harm.tensors(
        lambda t: t.update({"model.norm.scales": Tensor("F32", [1], bytes(4))})
    ),
    "nan scales": harm.spoilt(".scales", NAN),
    "inf biases": harm.spoilt(".biases", INF),
}
PACKED: dict[str, Harm] = {
    "no scale": harm.part("scale"),
    "no shape": harm.part("shape"),
    "no codes": harm.part("packed"),
    "shape of floats": harm.part("shape", dtype="F32", shape=[4], content=NAN * 4),
    "shape of no size": harm.part("shape", shape=[0], content=b""),
    "shape of no axis": harm.part("shape", shape=[], content=bytes(8)),
    "shape of many": harm.part("shape", shape=[10**5], content=bytes(8 * 10**5)),
    "a negative width": harm.part("shape", content=b"\xff" * 16),
    "a huge width": harm.part("shape", content=b"\xff" * 15 + b"\x7f"),
    "no width": harm.part("shape", content=bytes(16)),
    "scale of no size": harm.part("scale", shape=[192, 0], content=b""),
    "scale of one axis": harm.part("scale", shape=[768]),
    "scale of other rows": harm.part("scale", shape=[96, 8]),
    "scale of integers": harm.part("scale", dtype="I16"),
    "nan scale": harm.part("scale", content=b"\xff\x7f" * 768),
    "inf scale": harm.part("scale", content=b"\x80\x7f" * 768),
    "scale that overflows": harm.part("scale", content=b"\x7f\x7f" * 768),
    "codes of floats": harm.part("packed", dtype="F32"),
    "plain and packed": harm.tensors(
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": Tensor("F32", [1], bytes(4))})
    ),
    "zero points": harm.tensors(
        lambda t: t.update({"model.x.weight_zero_point": Tensor("I32", [1], bytes(4))})
    ),
    "a text_config that is none": harm.config(text_config=["x"]),
}
BESIDE: dict[str, Harm] = {
    **{
        f"eos_token_id {value!r}": harm.file(
            "generation_config.json", f'{{"eos_token_id": {value}}}'
        )
        for value in ('"x"', "[[1]]", "1.5", '{"a": 1}', "[true]", "1e400", "9" * 5000)
    },
    "a skipped tensor's type that MLX has not": harm.tensors(
        lambda t: t.update({"vision_tower.x": Tensor("F8_E5M2", [4], b"1234")})
    ),
    "generation_config is deep": harm.file("generation_config.json", "[" * 10**5),
    "generation_config is a list": harm.file("generation_config.json", "[]"),
    "tokenizer is empty": harm.file("tokenizer.json", ""),
    "tokenizer is deep": harm.file("tokenizer.json", "[" * 10**5),
    "tokenizer is a list": harm.file("tokenizer.json", "[]"),
    "tokenizer is a FIFO": harm.instead("tokenizer.json", os.mkfifo),
    "tokenizer_config is a list": harm.file("tokenizer_config.json", "[1]"),
    "tokenizer of 1 GB": harm.sparse("tokenizer.json", 1 << 30),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_text_model(tmp_path_factory.mktemp("model"))
    shutil.rmtree(folder / "drafter")
    return folder


@pytest.fixture(scope="module")
def quantised(sound: Path) -> Path:
    out = sound.parent / "quantised"
    files = ["--hf-path", str(sound), "--mlx-path", str(out), "--draft-hf-path", "none"]
    assert main(["convert", *files, "-q"]) == 0
    return out


@pytest.fixture(autouse=True)
def impatience() -> Iterator[None]:
    """End a test that hangs."""

    def end(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _seen(folder: Path) -> dict[str, tuple[int, int, int]]:
    facts = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (f.st_mode, f.st_size, f.st_mtime_ns) for name, f in facts.items()}


def _refused(capsys: Capture, command: str, folder: Path) -> None:
    """Check that the command ends in one line and that the disk is as it was."""
    around = folder.parent
    argv = ["generate", "--prompt", "x", "--model", str(folder), "--draft-model", "none"]
    if command == "convert":
        out = around / "out"
        argv = ["convert", "--hf-path", str(folder), "--mlx-path", str(out)]
        argv += ["--draft-hf-path", "none"]
    capsys.readouterr()
    before = _seen(around)
    assert main(argv) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if not line.startswith("Loaded")]
    assert shown.out == "" and line.startswith("mlx-gemma-mtp: error: ")
    assert line.isprintable() and len(line) < 2000
    assert _seen(around) == before


@pytest.mark.parametrize("command", ["generate", "convert"])
@pytest.mark.parametrize("case", [*HEADERS, *FILES])
def test_a_folder(sound: Path, tmp_path: Path, capsys: Capture, case: str, command: str) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    (HEADERS | FILES)[case](folder)
    _refused(capsys, command, folder)


@pytest.mark.parametrize("command", ["generate", "convert"])
@pytest.mark.parametrize("case", QUANTISED)
def test_a_quantised_folder(
    quantised: Path, tmp_path: Path, capsys: Capture, case: str, command: str
) -> None:
    folder = Path(shutil.copytree(quantised, tmp_path / "model"))
    QUANTISED[case](folder)
    _refused(capsys, command, folder)


@pytest.mark.parametrize("case", PACKED)
def test_a_packed_folder(sound: Path, tmp_path: Path, capsys: Capture, case: str) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    harm.packed(folder)
    PACKED[case](folder)
    _refused(capsys, "convert", folder)


def test_a_sound_packed_folder(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    harm.packed(folder)
    files = ["--hf-path", str(folder), "--mlx-path", str(tmp_path / "out")]
    assert main(["convert", *files, "--draft-hf-path", "none"]) == 0


@pytest.mark.parametrize("case", BESIDE)
def test_files_beside(sound: Path, tmp_path: Path, capsys: Capture, case: str) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    BESIDE[case](folder)
    _refused(capsys, "generate", folder)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_must_not_be_read(
    sound: Path, tmp_path: Path, capsys: Capture, name: str
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    (folder / name).chmod(0)
    for command in ("generate", "convert"):
        _refused(capsys, command, folder)


def test_a_tokenizer_that_would_fill_the_memory_is_not_copied(
    sound: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    BESIDE["tokenizer of 1 GB"](folder)
    _refused(capsys, "convert", folder)


def test_a_link_in_the_place_of_what_is_written(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / ".out.partial").symlink_to("mine")
    files = ["--hf-path", str(sound), "--mlx-path", str(tmp_path / "out")]
    assert main(["convert", *files, "--draft-hf-path", "none"]) == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


@pytest.mark.parametrize(
    "noted", ["[]", "{}", '{"key": 1}', '{"key": [], "shards": 5}', "[" * 9999]
)
def test_a_journal_that_is_none(sound: Path, tmp_path: Path, noted: str) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "journal.json").write_text(noted)
    files = ["--hf-path", str(sound), "--mlx-path", str(tmp_path / "out")]
    assert main(["convert", *files, "--draft-hf-path", "none"]) == 0


READ = """
import sys, time
from pathlib import Path
from gemma_mtp_mlx.checkpoint import read_config, stored_tensors
from tests.hostile_folders import peak_bytes
before, began = peak_bytes(), time.perf_counter()
for read in (read_config, stored_tensors):
    try:
        read(Path(sys.argv[1]))
    except ValueError:
        print("refused")
print(peak_bytes() - before)
print(time.perf_counter() - began)
"""


def _lists(length: int) -> bytes:
    """Return the JSON that takes the most memory for its length."""
    return b'{"a":[' + b"[]," * ((length - 9) // 3) + b"0]}"


def _tensors(count: int) -> bytes:
    entry = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(entry % number for number in range(count)) + b"}"


@pytest.mark.parametrize(
    "config, header",
    [
        (bytes(100 << 20), _tensors(10**6)),
        (_lists(4 << 20), _lists(8 << 20)),
        (_lists(100 << 20), _tensors((8 << 20) // 58)),
    ],
    ids=["beyond", "lists", "tensors"],
)
def test_time_and_memory_are_bounded(tmp_path: Path, config: bytes, header: bytes) -> None:
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    command = [sys.executable, "-c", READ, str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    *refused, grown, took = done.stdout.split()
    assert len(refused) == 2 or config == _lists(4 << 20)  # it is a JSON object, if a useless one
    assert "refused" in refused
    assert int(grown) < 400 << 20 and float(took) < 20
