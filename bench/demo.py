"""The built-in pair with and without its drafter, one after the other in one process.

`make demo` runs it: the text as it is generated, then what the drafter was worth. Runs with and
without it alternate, so that whatever else the machine does hits both alike; medians are shown.
"""

import sys
from dataclasses import dataclass
from statistics import median

import mlx.core as mx

from gemma_mtp_mlx import Pair, Result, SamplingParams, hub, load

PROMPT = '''\
class Stack:
    """A stack of items."""

    def __init__(self):
        self.items = []

    def push(self, item):
'''
DRAFTS = 4
REPEATS = 5
PARAMS = SamplingParams(max_tokens=256)


@dataclass(frozen=True, slots=True)
class Runs:
    """Repeated runs at one depth. Speeds are tokens per second after the first token."""

    results: list[Result]

    @property
    def speeds(self) -> list[float]:
        """Tokens per second, run by run."""
        return [result.stats.generation_tps for result in self.results]

    def line(self, what: str) -> str:
        """Return the median speed and the spread."""
        low, high = min(self.speeds), max(self.speeds)
        middle = f"{median(self.speeds):8.1f} tokens per second"
        return f"{what:<16}{middle}  ({low:.1f} to {high:.1f} over {len(self.speeds)} runs)"


def show(pair: Pair, ids: list[int]) -> None:
    """Print the prompt and the text that follows as it is generated. Serves as warm-up too."""
    sys.stdout.write(PROMPT)
    for chunk in pair.stream(ids, PARAMS, num_draft_tokens=DRAFTS):
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n\n")


def measure(pair: Pair, ids: list[int]) -> tuple[Runs, Runs]:
    """Generate again and again. Returns the runs with the drafter and those without."""
    drafted, plain = Runs([]), Runs([])
    pair.generate(ids, PARAMS, num_draft_tokens=0)
    for _ in range(REPEATS):
        for runs, depth in ((drafted, DRAFTS), (plain, 0)):
            runs.results.append(pair.generate(ids, PARAMS, num_draft_tokens=depth))
    return drafted, plain


def report(drafted: Runs, plain: Runs) -> None:
    """Print what the drafter was worth. Exits with 1 if it changed the text."""
    stats = drafted.results[0].stats
    pairs = zip(drafted.speeds, plain.speeds, strict=True)
    ratios = sorted(fast / slow for fast, slow in pairs)
    texts = {tuple(result.tokens) for result in drafted.results + plain.results}
    identical = "yes" if len(texts) == 1 else "NO"
    by_position = [f"{count / stats.draft_rounds:.2f}" for count in stats.accepted_per_position]
    print(plain.line("without drafter"))
    print(drafted.line("with drafter"))
    print(f"{'ratio':<16}{median(ratios):8.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f}, run by run)")
    print(f"{'tokens':<16}{stats.generation_tokens:8}  identical: {identical}")
    print(
        f"{'per round':<16}{stats.mean_accept_len:8.2f}  tokens, {DRAFTS} drafted; "
        f"accepted by position: {' '.join(by_position)}"
    )
    if mx.default_device() == mx.Device(mx.cpu):
        print(
            "On a CPU checking five tokens costs far more than one, on a GPU hardly more: "
            "this ratio understates what drafting is worth there."
        )
    if len(texts) > 1:
        sys.exit(1)


def main() -> None:
    """Show the text, measure, report."""
    pair = load(hub.builtin())
    ids = pair.encode(PROMPT, template=False)
    print("The built-in pair (small, trained on Python code) continues:\n")
    show(pair, ids)
    report(*measure(pair, ids))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        sys.exit(f"demo: error: {error}")
