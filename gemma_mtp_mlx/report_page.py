"""A report as a page in Markdown: where it was measured, what the doctor says, the figures."""

from collections.abc import Iterator, Sequence

from gemma_mtp_mlx import doctor_report
from gemma_mtp_mlx.measure import Measured, Speed, Spread, depth_name
from gemma_mtp_mlx.prediction import HELD_OUT_ERROR
from gemma_mtp_mlx.report_record import (
    ACCEPTANCE,
    FILE,
    THROUGHPUT,
    Model,
    Predicted,
    Report,
    deepest,
)

Row = Sequence[str]
NOT_APPLE = (
    "**This is not an Apple GPU**, and what is measured here says nothing about one: a CPU takes "
    "almost M times as long to check M tokens, a GPU that waits for its memory hardly longer than "
    "for one."
)
PREDICTED = (
    "What is marked **predicted** was not measured: it is what the cost model of `mlx-gemma-mtp "
    "predict` says, from published figures of this chip and the share of drafts kept here. Its "
    "speed-ups were off by "
    f"{HELD_OUT_ERROR:.0%} (median) where it was compared with others' measurements."
)


def page(report: Report) -> str:
    """Return the page."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {report.target.name} on {report.machine.processor}, measured"
    yield ""
    if not report.machine.apple_gpu:
        yield NOT_APPLE
        yield ""
    yield f"    {report.command}"
    yield ""
    yield from _table(("what", "here"), list(_setting(report)))
    yield ""
    yield from _doctor(report)
    yield "## Speed, measured"
    yield ""
    yield (
        "Tokens per second of all rows from the moment when every row has its first token. Greedy, "
        "EOS ignored: every row has as many tokens at every depth. Depths ran in turn; ratios are "
        "taken run by run within a repeat. Medians, with the least and the most in brackets."
    )
    if report.predicted:
        yield ""
        yield PREDICTED
    for each in report.measured:
        yield ""
        yield from _speeds(each, report.predicted)
    yield ""
    yield f"![Speed over rows, measured]({THROUGHPUT})"
    if deepest(report.measured):
        yield ""
        yield from _acceptance(report.measured)
    yield ""
    yield "## Not here"
    yield ""
    yield (
        "The kernels' own times: `make metal` in a copy of the repository runs the kernels' tests "
        f"on a Mac's GPU and times each. Everything above is in [{FILE}]({FILE})."
    )


def _setting(report: Report) -> Iterator[Row]:
    machine = report.machine
    gpu = f"{machine.gpu}, {machine.gpu_cores or 'unknown'} cores" if machine.gpu else "not used"
    yield "date", report.date
    yield "processor", f"{machine.processor}, {machine.cores} cores"
    yield "GPU", gpu
    yield "memory", f"{machine.memory_gb:g} GB"
    yield "system", f"{machine.system}, Python {machine.python}"
    yield "versions", ", ".join(f"{name} {number}" for name, number in report.versions.items())
    yield "target", _described(report.target)
    yield "drafter", "none" if report.drafter is None else _described(report.drafter)
    yield "load average", "{:.1f} before, {:.1f} after".format(*report.load_average)


def _described(model: Model) -> str:
    size = f"Gemma 4 {model.size}, " if model.size else ""
    nbytes = model.weights_bytes
    amount = f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
    formats = ", ".join(dict.fromkeys(model.formats.values()))
    revision = f", revision {model.revision[:12]}" if model.revision else ""
    bits = f"{model.bits_per_weight:.2f} bits per weight"
    return f"{model.name}{revision}: {size}{amount}, {bits} ({formats})"


def _doctor(report: Report) -> Iterator[str]:
    """What `doctor` prints, as it prints it, the verdict first."""
    *found, _, verdict = doctor_report.lines(report.doctor)
    yield "## Doctor"
    yield ""
    yield f"**{verdict}**"
    yield ""
    yield from (f"    {line}" for line in found)
    yield ""


def _speeds(each: Measured, predicted: Sequence[Predicted]) -> Iterator[str]:
    lengths = ", ".join(map(str, each.prompt_tokens))
    yield f"### {each.kind}, {each.rows} row{'s' * (each.rows > 1)}"
    yield ""
    yield (
        f"Prompts of {lengths} tokens, {each.max_tokens} tokens generated per row, "
        f"{each.repeats} repeats."
    )
    yield ""
    head = ["per round", "tokens/s", "times plain", "tokens/round", "drafted/round", "kept"]
    head += ["prefill tokens/s", "peak GB", "same tokens"]
    rows = [_speed(speed) for speed in each.speeds]
    if predicted:
        head.insert(2, "**predicted** tokens/s")
        of = {
            p.depth: p.tokens_per_s for p in predicted if (p.kind, p.rows) == (each.kind, each.rows)
        }
        for row, speed in zip(rows, each.speeds, strict=True):
            row.insert(2, f"{of[speed.depth]:.1f}" if speed.depth in of else "-")
    yield from _table(head, rows)


def _speed(speed: Speed) -> list[str]:
    kept = f"{speed.accepted / speed.drafted:.0%}" if speed.drafted else "-"
    differs = speed.first_difference
    return [
        depth_name(speed.depth),
        _spread(speed.tokens_per_s, 1),
        "-" if speed.ratio is None else _spread(speed.ratio, 2),
        f"{speed.tokens_per_round:.2f}",
        f"{speed.drafted / speed.rounds:.2f}",
        kept,
        f"{speed.prefill_per_s.median:.0f}",
        f"{speed.peak_memory_bytes / 1e9:.2f}",
        "yes" if differs is None else f"NO, from token {differs + 1} on",
    ]


def _acceptance(measured: Sequence[Measured]) -> Iterator[str]:
    yield "## Drafts kept by position, measured"
    yield ""
    found = deepest(measured)
    longest = max(len(speed.accepted_per_position) for _, speed in found)
    rows = []
    for each, speed in found:
        shares = [f"{count / speed.rounds:.2f}" for count in speed.accepted_per_position]
        shares += ["-"] * (longest - len(shares))
        rows.append((each.kind, *shares, f"{speed.tokens_per_round:.2f}", str(speed.rounds)))
    drafts = (f"draft {n + 1}" for n in range(longest))
    yield from _table(("prompts", *drafts, "tokens/round", "rounds"), rows)
    yield ""
    yield f"![Drafts kept by position, measured]({ACCEPTANCE})"


def _spread(spread: Spread, digits: int) -> str:
    least, most = f"{spread.least:.{digits}f}", f"{spread.most:.{digits}f}"
    return f"{spread.median:.{digits}f} ({least} to {most})"


def _table(head: Row, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table's lines; the first column is of words, and so is all of a narrow one."""
    right = ["---", *["---:" if len(head) > 3 else "---"] * (len(head) - 1)]
    for row in (head, right, *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
