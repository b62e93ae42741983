"""The doctor passes pairs that work, and names what is wrong with those that do not."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from gemma_mtp_mlx import (
    Pair,
    checks,
    doctor,
    doctor_report,
    expected,
    hub,
    load,
    measure,
    memory,
    prompt_kinds,
)
from gemma_mtp_mlx.agreement import Agreement, Kept
from gemma_mtp_mlx.checks import FAIL, PASS, SKIP, WARN, Check
from gemma_mtp_mlx.cli import main
from gemma_mtp_mlx.doctor import Diagnosis, diagnose
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.kernels import kernel
from gemma_mtp_mlx.measure import Measured, Speed, Spread
from gemma_mtp_mlx.prompts import Prompts
from tests import faults, trained
from tests.checkpoints import FAMILIES
from tests.text_model import write_text_model

PROMPT = 30  # tokens of a prompt, here
LoadText = Callable[..., Pair]
Patch = pytest.MonkeyPatch
ENCODE = prompt_kinds.encode


def beginnings(kind: str, prompts: Prompts) -> list[list[int]]:
    return [ids[:PROMPT] for ids in ENCODE(kind, prompts)]


def speed(depth: int | None, ratios: tuple[float, float, float], tokens: float = 3.0) -> Speed:
    least, median, most = ratios
    spread = Spread(median, least, most)
    plain = Spread(10 * median, 10 * least, 10 * most)
    return Speed(depth, plain, spread, plain, 20, 80, 40, (20, 10, 6, 4), tokens, 0, None)


def measured(auto: tuple[float, float, float], fixed: tuple[float, float, float]) -> Measured:
    speeds = (speed(0, (1, 1, 1), 1.0), speed(4, fixed), speed(None, auto))
    return Measured("code", 1, (PROMPT,), 64, 3, speeds)


@pytest.fixture(autouse=True)
def quick(monkeypatch: Patch) -> None:
    """Take the beginnings of the prompts, and speeds from nowhere: they decide nothing here."""
    monkeypatch.setattr(prompt_kinds, "encode", beginnings)
    given = measured((1.1, 1.2, 1.3), (1.0, 1.1, 1.2))
    monkeypatch.setattr(measure, "measure", lambda *args, **settings: given)


@pytest.fixture(scope="session")
def text_pair(tmp_path_factory: pytest.TempPathFactory) -> LoadText:
    """Return a function: (family, seed=1) -> a tiny pair with a tokenizer."""

    def get(family: str, seed: int = 1) -> Pair:
        return load(write_text_model(tmp_path_factory.mktemp(family), family, seed))

    return get


@pytest.fixture(scope="session")
def trained_pair(text_pair: LoadText) -> LoadText:
    """Return a function: family -> a tiny pair whose drafter was trained."""

    @cache
    def get(family: str) -> Pair:
        pair = text_pair(family)
        prompts = [beginnings(kind, pair.prompts)[0] for kind in prompt_kinds.KINDS]
        trained.learn(pair, prompts, 32)
        return pair

    return get


def never_trained(drafter: Drafter) -> None:
    """Give a drafter the weights that transformers begins with."""
    for number, (name, weight) in enumerate(tree_flatten(drafter.parameters())):
        if weight.ndim == 1:
            new = weight if weight.dtype == mx.int32 else mx.ones_like(weight)
        else:
            new = 0.02 * mx.random.normal(weight.shape, key=mx.random.key(number))
        drafter.load_weights([(name, new.astype(weight.dtype))], strict=False)


def statuses(found: Diagnosis) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


def the_failure(found: Diagnosis) -> Check:
    """Return the only check that failed; those that need it are skipped and say why."""
    failed = [check for check in found.checks if check.status == FAIL]
    assert len(failed) == 1 and not found.passed
    for check in found.checks[max(found.checks.index(failed[0]) + 1, 5) :]:
        assert check.status == SKIP and failed[0].name in check.summary
    assert failed[0].summary in found.verdict and "\n" not in found.verdict
    assert found.verdict.startswith("It does not work")
    return failed[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_that_works_passes(trained_pair: LoadText, family: str) -> None:
    found = diagnose(trained_pair(family))
    assert found.passed and found.verdict.startswith("It works: ")
    wanted = {name: SKIP if name == "kernels" else PASS for name in doctor.NAMES}
    assert statuses(found) == wanted


def test_the_built_in_pair_passes() -> None:
    """With its acceptance near what was measured: this is what its table of figures stands on."""
    pair = load(hub.builtin())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_kinds, "encode", ENCODE)
        found = diagnose(pair)
    assert found.passed
    acceptance = found.checks[-2]
    assert acceptance.status == PASS
    assert 0.8 < acceptance.data["share_of_published"] < 1.25
    assert len(acceptance.data["kinds"]) == len(prompt_kinds.KINDS)


FAULTS = [
    faults.hidden_of_another_row,
    faults.hidden_of_another_position,
    faults.keys_and_values_of_another_layer,
    faults.position_before,
    faults.position_advancing,
]


@pytest.mark.parametrize("fault, family", list(zip(FAULTS, cycle(FAMILIES), strict=False)))
def test_a_wrong_input_is_the_diagnosis(
    trained_pair: LoadText, monkeypatch: Patch, fault: Callable[[Patch], None], family: str
) -> None:
    pair = trained_pair(family)
    fault(monkeypatch)
    failed = the_failure(diagnose(pair))
    assert failed.name == "wiring" and faults.FAULTS[fault] in failed.summary


@pytest.mark.parametrize("family", ["e2b", "26b"])
def test_another_target_s_drafter_is_the_diagnosis(
    text_pair: LoadText, trained_pair: LoadText, family: str
) -> None:
    pair = text_pair(family, seed=2)
    pair.drafter = trained_pair(family).drafter
    failed = the_failure(diagnose(pair))
    assert failed.name == "acceptance" and "another target's" in failed.summary
    assert "target's own assistant" in failed.remedy


@pytest.mark.parametrize("family", ["e4b", "31b"])
def test_an_untrained_drafter_is_the_diagnosis(text_pair: LoadText, family: str) -> None:
    pair = text_pair(family)
    assert pair.drafter is not None
    never_trained(pair.drafter)
    failed = the_failure(diagnose(pair))
    assert failed.name == "acceptance" and "not trained" in failed.summary


def agreement(first: float, sure: float, entropy: float = 0.3, same: float = 0.1) -> Agreement:
    """100 rounds of each kind; half of the drafts after the first are kept."""
    counts = tuple(round(100 * first * 0.5**place) for place in range(4))
    kinds = tuple(Kept(kind, 100, counts) for kind in prompt_kinds.KINDS)
    return Agreement(kinds, 0.03, sure, entropy, same)


@pytest.mark.parametrize(
    "found, status, says",
    [
        (agreement(0.9, 0.85), PASS, "90%"),
        (agreement(0.31, 0.4), PASS, "31%"),  # the worst that was published
        (agreement(0.05, 0.6), FAIL, "another target's"),
        (agreement(0.0, 0.95), FAIL, "no more than by chance"),
        (agreement(0.09, 0.1, entropy=0.99), FAIL, "any token is as likely"),
        (agreement(0.09, 0.9, same=0.95), FAIL, "one and the same token"),
        (agreement(0.15, 0.3), FAIL, "of no use"),
        (agreement(0.4, 0.9), WARN, "expects 90%"),
    ],
)
def test_what_drafts_are_worth_is_judged(
    text_pair: LoadText, found: Agreement, status: str, says: str
) -> None:
    got, summary, remedy = checks.judge(text_pair("12b"), found)
    assert got == status and says in summary
    assert bool(remedy) == (status != PASS)


def test_little_of_what_is_published_is_worth_a_warning(
    text_pair: LoadText, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(expected, "size_of", lambda config: "31B")
    pair = text_pair("31b")
    assert checks.judge(pair, agreement(1.0, 0.9))[0] == PASS
    status, summary, _ = checks.judge(pair, agreement(0.6, 0.7))
    assert status == WARN and "of what this size has shown" in summary


def test_a_qat_target_with_the_plain_drafter_is_a_warning(
    tmp_path: Path, trained_pair: LoadText
) -> None:
    folder = write_text_model(tmp_path).rename(tmp_path / "tiny-it-qat-q4_0-unquantized")
    drafter = (folder / "drafter").rename(tmp_path / "tiny-it-assistant")
    pair = load(folder, drafter)
    pair.drafter = trained_pair("31b").drafter  # of the same target, so it works
    found = diagnose(pair)
    assert found.passed and statuses(found)["pair"] == WARN
    assert found.verdict.startswith("It works, but the target is a QAT model")
    assert "-qat-q4_0-unquantized-assistant" in found.verdict


@pytest.mark.parametrize(
    "found, status, says",
    [
        (measured((1.1, 1.2, 1.3), (1.0, 1.1, 1.2)), PASS, "auto 1.20 (1.10 to 1.30) x"),
        (measured((0.9, 0.98, 1.0), (0.6, 0.7, 0.8)), WARN, "does not pay"),
        (measured((0.9, 0.98, 1.0), (1.0, 1.1, 1.2)), PASS, "auto 0.98"),
        (measured((0.5, 0.6, 0.99), (0.5, 0.6, 0.7)), WARN, "does not pay"),  # noise
        (measured((0.5, 0.6, 0.8), (0.5, 0.6, 0.7)), FAIL, "auto is slower"),
    ],
)
def test_speeds_are_judged(found: Measured, status: str, says: str) -> None:
    check = checks.judge_speed(found)
    assert check.status == status and says in check.summary
    assert bool(check.remedy) == (status != PASS)


def test_a_text_that_drafting_changes_is_a_failure() -> None:
    plain, fixed, auto = measured((1.1, 1.2, 1.3), (1.0, 1.1, 1.2)).speeds
    changed = replace(auto, first_difference=3)
    given = Measured("code", 1, (PROMPT,), 64, 3, (plain, fixed, changed))
    check = checks.judge_speed(given)
    assert check.status == FAIL and "changes the text" in check.summary


def test_break_even_is_where_a_round_gives_what_it_costs() -> None:
    for k in (1, 4, 15):
        for a in (0.0, 0.3, 0.9):
            found = checks.break_even(sum(a**i for i in range(k + 1)), k)
            assert found == pytest.approx(a, abs=1e-6)
    assert checks.break_even(0.9, 4) == pytest.approx(0, abs=1e-6)
    assert checks.break_even(5.1, 4) is None


def test_a_device_too_small_for_a_context_is_found(text_pair: LoadText, monkeypatch: Patch) -> None:
    pair = text_pair("31b")
    assert checks.check_memory(pair).data["largest_context"] == {1: 4096, 4: 4096, 8: 4096}
    held = sum(checks.check_memory(pair).data["weights_bytes"]) + memory.RESERVED
    for spare, status in ((-1, FAIL), (600_000, WARN), (100_000_000, PASS)):
        monkeypatch.setattr(checks, "device_bytes", lambda: held + spare)  # noqa: B023
        assert checks.check_memory(pair).status == status


def test_what_trying_the_kernels_has_found_is_told(text_pair: LoadText, monkeypatch: Patch) -> None:
    pair = text_pair("31b")
    monkeypatch.setattr(checks, "on_gpu", lambda: True)
    monkeypatch.setattr(kernel, "limited", {"verify_matmul": 128})
    check = checks.check_kernels(pair)
    assert check.status == PASS and "verify_matmul runs with 128 threads" in check.details[0]
    monkeypatch.setattr(pair, "tried", ["this GPU gives other bits"])
    check = checks.check_kernels(pair)
    assert check.status == WARN and check.summary == "this GPU gives other bits"


def test_a_kernel_with_fewer_threads_is_noted(monkeypatch: Patch) -> None:
    def refuse(arrays: object) -> None:
        raise RuntimeError("too many threads per threadgroup")

    small = kernel.Kernel("small", ["x"], ["out"], "out[0] = x[0];", [])
    monkeypatch.setattr(kernel, "limited", {})
    monkeypatch.setattr(mx, "eval", refuse)
    with pytest.raises(kernel.Refused):
        small._try([])
    assert kernel.limited == {"small": 128}


def test_a_model_without_a_tokenizer_does_not_work(tmp_path: Path) -> None:
    folder = write_text_model(tmp_path)
    (folder / "tokenizer.json").unlink()
    failed = the_failure(diagnose(load(folder)))
    assert failed.name == "model" and "tokenizer" in failed.remedy


def test_without_a_drafter_there_is_little_to_check(tmp_path: Path) -> None:
    found = diagnose(load(write_text_model(tmp_path), None))
    assert found.passed and statuses(found)["pair"] == WARN
    assert {statuses(found)[name] for name in doctor.NAMES[-3:]} == {SKIP}


@pytest.mark.parametrize("damage", ["drafter", "weights"])
def test_what_cannot_be_loaded_is_a_diagnosis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = write_text_model(tmp_path)
    if damage == "drafter":
        config = json.loads((folder / "drafter" / "config.json").read_text())
        config["backbone_hidden_size"] = 64
        (folder / "drafter" / "config.json").write_text(json.dumps(config))
    else:
        (folder / "model.safetensors").unlink()
    assert main(["doctor", "--model", str(folder)]) == 1
    *_, verdict = capsys.readouterr().out.splitlines()
    says = "this drafter does not belong" if damage == "drafter" else "has no model.safetensors"
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        load(folder)
    assert " ".join(str(refused.value).split()) in verdict


def test_what_is_not_there_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "./nowhere"]) == 2
    assert main(["doctor", "--draft-model", "./nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_command_prints_and_ends_as_it_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_text_model(tmp_path)  # whose drafter is random
    assert main(["doctor", "--model", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"] and found["verdict"].startswith("It does not work")
    assert [check["name"] for check in found["checks"]] == list(doctor.NAMES)


def test_a_line_a_check_and_the_verdict_last(trained_pair: LoadText) -> None:
    found = diagnose(trained_pair("12b"))
    lines = list(doctor_report.lines(found))
    assert lines[-1] == found.verdict
    heads = [line.split()[:2] for line in lines if line and not line.startswith(" ")][:-1]
    assert heads == [[check.status, check.name] for check in found.checks]
    table = next(i for i, line in enumerate(lines) if "drafts kept" in line)
    assert [line.split()[0] for line in lines[table + 1 : table + 7]] == [
        *prompt_kinds.KINDS,
        "all",
    ]
