"""How well the cost model meets published measurements, and the constants that are fitted to them.

    python -m bench.calibrate             fits, writes bench/results/calibration.md, .json and .png

The split was chosen before anything was fitted: sources (links) in the order of the SHA-256 of
their link, each to the half with fewer records so far, the fit first. Rows of one source share a
machine, a runtime and often the same plain run, so whole sources are held out; alternate rows would
be predicted from their own neighbours. Curves of matmuls are split with them.

Fitted are five constants, by the mean of the absolute logarithms of predicted over published, a
coordinate search from coarse to fine on the fit half alone. Held-out records are only looked at
to report.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from gemma_mtp_mlx import outline, workload
from gemma_mtp_mlx.chips import Chip, find
from gemma_mtp_mlx.dispatch import Weights
from gemma_mtp_mlx.footprint import distinct
from gemma_mtp_mlx.outline import Outline
from gemma_mtp_mlx.prediction import CONSTANTS, MOST, Constants, seconds
from gemma_mtp_mlx.workload import MLX, Pass, Runtime, Work

PUBLISHED = Path(__file__).parent / "published.json"
RESULTS = Path(__file__).parent / "results"
SHORT = 500  # tokens of a context that is not given: prompts were short
STARTS_WITH = 3  # drafts, of a runtime that draws more only once these agree
Record = dict[str, Any]


def published() -> dict[str, Any]:
    """Return the data file."""
    data: dict[str, Any] = json.loads(PUBLISHED.read_text())
    return data


def fit_sources(records: Sequence[Record]) -> set[str]:
    """Return the sources of the half that constants are fitted to."""
    number = Counter(record["source"] for record in records)
    fit: set[str] = set()
    sizes = [0, 0]
    for source in sorted(number, key=lambda link: hashlib.sha256(link.encode()).hexdigest()):
        side = int(sizes[0] > sizes[1])
        sizes[side] += number[source]
        if side == 0:
            fit.add(source)
    return fit
