"""What commands say on stderr: lines, and how far long work has come, in bytes or tokens."""

import sys
import time
from typing import TextIO

from tqdm import tqdm  # type: ignore[import-untyped]

LINE_S = 10.0  # between two lines of progress where no bar can be drawn


def say(*lines: str) -> None:
    """Print to stderr."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Bytes or tokens done: a bar with the time left on a terminal, else a line now and then."""

    def __init__(self, out: TextIO, unit: str = "B") -> None:
        self._out = out
        self._unit = unit
        self._began = self._shown = time.monotonic()
        self._bar: tqdm | None = None

    def show(self, done: int, total: int) -> None:
        """Show how far it has come."""
        if self._bar is None and self._out.isatty():
            bar = {"unit": self._unit, "unit_scale": True, "dynamic_ncols": True, "leave": False}
            self._bar = tqdm(total=total, initial=done, file=self._out, **bar)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._shown >= LINE_S:
            self._shown = time.monotonic()
            amount = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"
            if self._unit != "B":
                amount = f"{done} of {total}{self._unit}"
            left = (self._shown - self._began) * (total - done) / max(done, 1)
            line = f"{amount}, {done / total:.0%}, about {left / 60:.0f} min left"
            print(line, file=self._out, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
