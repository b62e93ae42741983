"""The verify command: every way a folder can be wrong is found, and a sound one is not accused."""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma_mtp_mlx import Pair, verification
from gemma_mtp_mlx.cli import main
from gemma_mtp_mlx.convert import Quantization, convert
from gemma_mtp_mlx.verification import Comparison, difference
from tests import passes
from tests.checkpoints import write_checkpoint
from tests.conftest import LoadPair
from tests.text_model import write_text_model

Capture = pytest.CaptureFixture[str]
Damage = Callable[[Path], None]
REPOSITORY = "google/gemma"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(str(source), out, draft_source=str(source / "drafter"))
    return out


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """Return a copy of a converted model, to be damaged."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


def verified(capsys: Capture, *argv: str) -> tuple[int, list[str], str]:
    code = main(["verify", *argv])
    shown = capsys.readouterr()
    return code, shown.out.splitlines(), shown.err


def test_a_sound_folder_is_sound(folder: Path, capsys: Capture) -> None:
    code, [line], _ = verified(capsys, str(folder))
    files = [path for path in folder.rglob("*") if path.is_file()]
    checked = [path for path in files if path.name != "conversion.json"]
    size = sum(path.stat().st_size for path in checked) / 1e6
    assert code == 0
    assert line == f"Files: {len(checked)} compared, {size:.1f} MB; all as they should be"


def _flip(file: str) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)

    return damage


def _remove(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def _add(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).write_text("x")

    return damage


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def _record(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        record = folder / "conversion.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), **changes}))

    return damage


@pytest.mark.parametrize(
    "damage, words",
    [
        (_flip("model.safetensors"), "model.safetensors is not what it should be"),
        (_flip("drafter/model.safetensors"), "drafter/model.safetensors is not what it should be"),
        (_flip("tokenizer.json"), "tokenizer.json is not"),
        (_truncate, "model.safetensors is not"),
        (_remove("model.safetensors"), "model.safetensors is missing"),
        (_remove("drafter/config.json"), "drafter/config.json is missing"),
        (_remove("drafter/conversion.json"), "drafter/conversion.json is missing"),
        (_add("model-00002.safetensors"), "model-00002.safetensors is there, but"),
        (_add("drafter/extra.json"), "drafter/extra.json is there, but drafter/conversion.json"),
        (_record(files={"../x": "0" * 64}), "conversion.json is damaged"),
        (_record(files={"config.json": "0"}), "conversion.json is damaged"),
        (_record(files=None), "conversion.json is damaged"),
    ],
)
def test_what_is_wrong_is_found(folder: Path, capsys: Capture, damage: Damage, words: str) -> None:
    damage(folder)
    code, lines, _ = verified(capsys, str(folder))
    assert code == 1
    *problems, verdict = lines
    assert len(problems) == 1 and words in problems[0]
    assert verdict.endswith("1 problem")


def test_every_problem_is_named(folder: Path, capsys: Capture) -> None:
    for damage in (_flip("config.json"), _remove("tokenizer.json"), _add("x.json")):
        damage(folder)
    code, lines, _ = verified(capsys, str(folder), "--source", str(folder))
    assert code == 1
    assert len(lines) == 4 and lines[-1].endswith("3 problems")  # and no logits


def test_hidden_files_belong_to_the_system(folder: Path, capsys: Capture) -> None:
    _add(".DS_Store")(folder)
    assert verified(capsys, str(folder))[0] == 0


def test_a_folder_of_which_nothing_is_known(source: Path, capsys: Capture) -> None:
    code, lines, error = verified(capsys, str(source))
    assert (code, lines) == (2, [])
    assert "no conversion.json" in error and "--source" in error


@pytest.mark.parametrize("name", ["nowhere", "nobody/nothing"])
def test_a_model_that_is_not_here(
    name: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert verified(capsys, name)[:2] == (2, [])


def test_bytes_are_counted_while_files_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_BLOCK", 4096)
    seen: list[tuple[int, int]] = []
    checked = verification.check_files(folder, lambda done, total: seen.append((done, total)))
    assert checked is not None and len(seen) > checked.files
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (checked.nbytes, checked.nbytes)


def test_ctrl_c_ends_it_quietly(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gemma_mtp_mlx.cli_convert.Progress.show", interrupted)
    code, lines, error = verified(capsys, str(folder))
    assert (code, lines) == (130, [])
    assert "interrupted" in error


def cache_repository(cache: Path, folder: Path) -> Path:
    """Put a folder into the hub's cache as huggingface_hub does, and return its snapshot."""
    repository = cache / "models--google--gemma"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        if file.suffix != ".safetensors":
            name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (repository / "blobs" / name).write_bytes(content)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(repository / "blobs" / name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return snapshot


@pytest.mark.parametrize("kind", ["source", "converted"])
def test_a_repository_in_the_cache(
    request: pytest.FixtureRequest,
    kind: str,
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = cache_repository(tmp_path, request.getfixturevalue(kind))
    assert verified(capsys, REPOSITORY)[0] == 0
    (snapshot / "README.md").unlink(missing_ok=True)  # is not downloaded with a model
    assert verified(capsys, REPOSITORY)[0] == 0
    for file in ("drafter/model.safetensors", "config.json"):
        blob = (snapshot / file).resolve()
        sound = blob.read_bytes()
        blob.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        code, lines, _ = verified(capsys, REPOSITORY)
        assert code == 1
        assert len(lines) == 2 and f"{file} is not what it should be" in lines[0]
        assert ("the hub says" in lines[0]) == (kind == "source")
        blob.write_bytes(sound)
    (snapshot / "model.safetensors").unlink()
    assert verified(capsys, REPOSITORY)[:2] == (2, [])


def test_the_same_weights_give_the_same_logits(folder: Path, source: Path, capsys: Capture) -> None:
    code, lines, _ = verified(capsys, str(folder), "--source", str(source))
    assert code == 0
    assert "largest difference 0.00%" in lines[1] and "best token in 100%" in lines[1]
    assert lines[-1] == "Logits: as they should be"


def test_other_weights_of_the_same_format_are_a_failure(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    write_checkpoint(tmp_path / "other", "31b", seed=5)
    code, lines, _ = verified(capsys, str(folder), "--source", str(tmp_path / "other"))
    assert code == 1
    assert "the logits are not the source's" in lines[-1]


def test_quantised_weights_are_reported_and_not_judged(
    source: Path, tmp_path: Path, capsys: Capture
) -> None:
    convert(str(source), tmp_path / "q8", quantization=Quantization("affine", 8, 64))
    code, lines, _ = verified(capsys, str(tmp_path / "q8"), "--source", str(source))
    assert code == 0
    assert lines[-1] == "Logits: reported, not judged"
    assert "largest difference 0.00%" not in lines[1]


def test_a_source_is_enough_without_a_record(source: Path, capsys: Capture) -> None:
    code, lines, _ = verified(capsys, str(source), "--source", str(source))
    assert code == 0
    assert "not checked" in lines[0] and lines[-1] == "Logits: as they should be"


def test_another_vocabulary_is_another_model(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    write_checkpoint(tmp_path / "other", "12b")
    code, _, error = verified(capsys, str(folder), "--source", str(tmp_path / "other"))
    assert code == 2
    assert "another model" in error


def test_one_model_is_in_memory_at_a_time(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Pair]] = []
    load = verification.api.load

    def watched(folder: Path, drafter: None) -> Pair:
        assert [pair() for pair in loaded] == [None] * len(loaded)
        pair = load(folder, drafter)
        loaded.append(weakref.ref(pair))
        return pair

    monkeypatch.setattr(verification.api, "load", watched)
    verification.compare(source, source)
    assert len(loaded) == 2


def test_logits_are_those_of_the_same_passes(tiny_pair: LoadPair) -> None:
    target = tiny_pair("e2b").target
    ids = list(range(3, 35))
    assert np.array_equal(verification.target_logits(target, ids), passes.verify(target, ids, 1)[1])


def test_tokens_are_a_chat_if_there_is_a_tokenizer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def logits(target: object, ids: list[int]) -> np.ndarray:
        asked.append(ids)
        return np.zeros((len(ids), 2), np.float32)

    write_checkpoint(tmp_path / "bare", "31b")
    monkeypatch.setattr(verification, "target_logits", logits)
    monkeypatch.setattr(verification, "difference", lambda *_, **__: None)
    for folder in (source, tmp_path / "bare", tmp_path / "bare"):
        verification.compare(folder, folder)
    for ours, theirs in zip(asked[::2], asked[1::2], strict=True):
        assert ours == theirs and len(ours) == 32
    chat, drawn, again = asked[::2]
    assert chat[:2] == [2, 3]  # <bos><|turn>
    assert drawn == again != chat and max(drawn) < 128


def test_differences_by_hand() -> None:
    want = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32))
    got = np.log(np.array([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7]], np.float32))
    found = difference(got + 3, want, exact=False)  # what is added to all of a row is no matter
    kl = 0.5 * np.log(0.5 / 0.2) + 0.25 * np.log(0.25 / 0.5) + 0.25 * np.log(0.25 / 0.3)
    assert found.divergence == pytest.approx(kl / 2, rel=1e-6)
    assert found.agreement == 0.5
    assert difference(want, want, exact=True).problem is None
    relative = difference(got, want, exact=False).relative
    assert relative == pytest.approx(np.log(0.5 / 0.2) / np.log(10), rel=1e-6)


@pytest.mark.parametrize(
    "relative, agreement, exact, problem, warning",
    [
        (0.009, 1.0, True, False, False),
        (0.01, 1.0, True, True, False),
        (float("nan"), 1.0, True, True, False),
        (0.5, 0.5, False, False, False),
        (0.5, 0.4, False, False, True),
    ],
)
def test_what_is_judged(
    relative: float, agreement: float, exact: bool, problem: bool, warning: bool
) -> None:
    found = Comparison(32, relative, 0.1, agreement, exact)
    assert (found.problem is not None) == problem
    assert (found.warning is not None) == warning
