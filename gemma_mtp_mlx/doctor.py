"""Whether a pair works on this machine: checks in order, cheapest first, and one line of verdict.

A drafter that is wired wrongly, or is another target's, changes no token and only costs time, so
nobody notices. Each check passes, warns, fails, or is skipped with the reason why.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_mtp_mlx import prompt_kinds
from gemma_mtp_mlx.api import Pair, load
from gemma_mtp_mlx.checks import (
    FAIL,
    SKIP,
    WARN,
    Check,
    check_acceptance,
    check_kernels,
    check_memory,
    check_model,
    check_pair,
    check_speed,
    check_versions,
    check_wiring,
)

_RUN = {"wiring": check_wiring, "acceptance": check_acceptance, "speed": check_speed}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All checks, in the order they ran."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.status != FAIL for check in self.checks)

    @property
    def verdict(self) -> str:
        """One line, with the remedy of the first check that failed, or else warned."""
        for status, words in ((FAIL, "It does not work: "), (WARN, "It works, but ")):
            for check in self.checks:
                if check.status == status:
                    return words + "; ".join(filter(None, (check.summary, check.remedy)))
        last = [check.summary for check in self.checks if check.name in NAMES[-2:]]
        return f"It works: {'; '.join(last)}"


Say = Callable[[str], None]
NAMES = ("versions", "model", "memory", "pair", "kernels", "wiring", "acceptance", "speed")


def examine(model: str | Path, drafter: str | Path | None, say: Say) -> Diagnosis:
    """Load a model that is there and diagnose it; one that cannot be loaded is diagnosed so."""
    name = "model"
    try:
        pair = load(model, drafter)
    except ValueError as error:
        why = str(error)
    except RuntimeError as error:  # of a kernel
        name, why = "kernels", str(error)
    else:
        return diagnose(pair, say)
    failed = Check(name, FAIL, "the model cannot be loaded", remedy=" ".join(why.split()))
    return _complete([check_versions(), failed])


def diagnose(pair: Pair, say: Say = lambda line: None) -> Diagnosis:
    """Diagnose a loaded pair. say: is told what is being done."""
    checks = [
        check_versions(),
        check_model(pair),
        check_memory(pair),
        check_pair(pair),
        check_kernels(pair),
    ]
    if pair.drafter is None or any(check.status == FAIL for check in checks):
        return _complete(checks)
    try:
        prompts = {
            kind: prompt_kinds.encode(kind, pair.prompts)[0]
            for kind in prompt_kinds.usable(pair.prompts)
        }
    except ValueError as error:  # its chat template refuses them
        checks[1] = Check("model", FAIL, str(error))
        return _complete(checks)
    for name, run in _RUN.items():
        say(f"Checking {name}")
        try:
            checks.append(run(pair, prompts))
        except (ValueError, RuntimeError) as error:  # memory, most of all
            why = " ".join(str(error).split())
            checks.append(Check(name, FAIL, f"it could not be checked: {why}"))
        if checks[-1].status == FAIL:
            break
    return _complete(checks)


def _complete(checks: Sequence[Check]) -> Diagnosis:
    """Put the checks in order, and those that were not run among them with the reason."""
    failed = next((check.name for check in checks if check.status == FAIL), None)
    why = "there is no drafter" if failed is None else f"not run, as the check of {failed} failed"
    found = {check.name: check for check in checks}
    return Diagnosis(tuple(found.get(name, Check(name, SKIP, why)) for name in NAMES))
