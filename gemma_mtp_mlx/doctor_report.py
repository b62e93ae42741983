"""What `doctor` prints: a line per check, what it saw below it, the verdict last."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from gemma_mtp_mlx.checks import PASS
from gemma_mtp_mlx.doctor import Diagnosis


def lines(found: Diagnosis) -> Iterator[str]:
    """Yield what was found."""
    for check in found.checks:
        yield f"{check.status:4}  {check.name:10}  {check.summary}"
        for detail in check.details:
            yield f"{'':18}{detail}"
        if check.remedy and check.status != PASS:
            yield f"{'':18}-> {check.remedy}"
    yield ""
    yield found.verdict


def as_json(found: Diagnosis) -> dict[str, Any]:
    """Return everything that was found, for JSON."""
    return {
        "passed": found.passed,
        "verdict": found.verdict,
        "checks": [asdict(check) for check in found.checks],
    }
