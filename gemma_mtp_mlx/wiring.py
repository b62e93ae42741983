"""Whether rounds hand the drafter what it must read: real rounds, watched, against a recomputation.

A drafter's inputs never change the text, so a wrong one costs nothing but acceptance and nobody
sees it. Here an engine runs two rows of unequal lengths; how many drafts each keeps is scripted,
all numbers from none to K in another order, whatever the drafter is worth. What it was handed is
compared with the same text computed once more without cache and rounds; where they differ, what it
was handed instead is looked for, so that the fault has a name.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from gemma_mtp_mlx import recomputation
from gemma_mtp_mlx.cache import seat_size
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.depth import FixedDepth
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.engine import Engine
from gemma_mtp_mlx.memory import Limits
from gemma_mtp_mlx.recomputation import Text
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import Models
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.witness import Read, Seen, Witness

K = 4
KEPT = ((0, 4, 2, 1, 3), (3, 1, 4, 0, 2))  # drafts that each row keeps, round by round
ROUNDS = len(KEPT[0]) + 1  # the first one follows the prompts
TOKENS = 1 + max(map(sum, KEPT)) + ROUNDS + K + 1  # so that no round is near the end
# How far what was handed may be from what is computed anew, as a share of its length: 4 times as
# far as the text is from itself when computed in another order. Rounding in float32 is far below
# the least; the most is more than one expert chosen otherwise does, and half of what unrelated
# values are apart.
ROUNDINGS, LEAST, MOST = 4.0, 0.01, 0.7
SHIFTS = (-2, -1, 1, 2)  # of positions, that are looked for
HIDDEN = "the target's hidden state and its token"
READ = "keys and values"
DRAFTED = "the drafter's own states, hence its logits, and its position"
SAME = "the text, with and without drafts"
Floats = NDArray[np.float64]
ORDER = (SAME, HIDDEN, READ, DRAFTED)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was compared, how often, and what is wrong with it, None if nothing."""

    name: str
    compared: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class Wiring:
    """What watching has found. past_window: whether the longest row had left the window behind.

    tolerance: how far two computations of the same may be apart here, relative. findings: up to
    the first that makes those after it say nothing.
    """

    lengths: tuple[int, ...]
    past_window: bool
    tolerance: float
    findings: tuple[Finding, ...]

    @property
    def problem(self) -> str | None:
        """The first problem there is."""
        return next((found.problem for found in self.findings if found.problem), None)


class _Case(NamedTuple):
    """One row in one round, and the texts of all rows."""

    seen: Seen
    row: int
    texts: Sequence[Text]

    @property
    def lengths(self) -> list[int]:
        return [int(length) for length in self.seen.lengths]

    @property
    def length(self) -> int:
        return self.lengths[self.row]


def check(models: Models, prompts: Sequence[Sequence[int]]) -> Wiring:
    """Watch rounds over two prompts, token ids of unequal numbers, none of them a single one."""
    target, drafter, _ = models
    assert drafter is not None and len(prompts) == len(KEPT)
    plain = [r.tokens for r in _run(models._replace(drafter=None), prompts, 0, None)]
    witness = Witness(drafter, _script(prompts, plain, target.config.vocab_size))
    watched = models._replace(drafter=cast(Drafter, witness))  # has what a round asks of one
    drafted = [r.tokens for r in _run(watched, prompts, K, witness)]
    texts, tolerance = _compute(target, prompts, plain)
    cases = [_Case(seen, row, texts) for seen in witness.seen for row in range(len(prompts))]
    findings = [_same(plain, drafted)]
    if findings[0].problem is None:
        findings += [_hidden(target, cases, tolerance), _read(target.config, cases, tolerance)]
    if not any(found.problem for found in findings):
        findings.append(_drafted(target, drafter, cases, tolerance))
    lengths = tuple(map(len, prompts))
    window = target.config.sliding_window
    return Wiring(lengths, max(lengths) > window, tolerance, tuple(findings))


def _run(
    models: Models, prompts: Sequence[Sequence[int]], k: int, witness: Witness | None
) -> list[Request]:
    """Run greedy rows that start together: all tokens, or as many rounds as are watched."""
    params = SamplingParams(max_tokens=TOKENS)
    requests = [Request(prompt, params, frozenset()) for prompt in prompts]
    positions = sum(seat_size(request.positions) for request in requests)
    chunk = sum(map(len, prompts))  # all prompts in one step: the rows stay side by side
    limits = Limits(len(requests), positions=positions, prefix_share=0, chunk=chunk)
    engine = Engine(models, FixedDepth(k), limits)
    for request in requests:
        engine.submit(request)
    while engine.busy and (witness is None or len(witness.seen) < ROUNDS):
        engine.step()
    for request in requests:
        if request.error is not None:  # memory, most of all
            raise request.error
    return requests


def _script(
    prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], vocab_size: int
) -> Callable[[np.ndarray, int], np.ndarray | None]:
    """Return what to propose so that each row keeps what KEPT says."""
    right: list[dict[int, int]] = []  # by row: how many drafts are to be right at a length
    for prompt, kept in zip(prompts, KEPT, strict=True):
        starts = len(prompt) + np.cumsum([0, *(count + 1 for count in kept)])
        right.append(dict(zip(starts.tolist(), (*kept, 0), strict=True)))

    def propose(lengths: np.ndarray, k: int) -> np.ndarray | None:
        drafts = np.zeros((len(lengths), k), np.int32)
        for row, length in enumerate(lengths.tolist()):
            at = length - len(prompts[row]) + 1
            known = np.array(texts[row][at : at + k], np.int32)
            wrong = np.arange(len(known)) >= right[row].get(length, 0)
            drafts[row, : len(known)] = np.where(wrong, (known + 1) % vocab_size, known)
        return drafts

    return propose


def _compute(
    target: Target, prompts: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]
) -> tuple[list[Text], float]:
    """Compute the rows' texts anew, twice. Returns the first of both and how far to trust it."""
    texts, apart = [], 0.0
    right = [recomputation.right_layer(target.config, sliding=s) for s in (True, False)]
    for prompt, tokens in zip(prompts, plain, strict=True):
        whole = [*prompt, *tokens]
        text = recomputation.compute(target, whole)
        other = recomputation.compute(target, whole, second=True)
        pairs = [(text.hidden, other.hidden)]
        pairs += [(x.swapaxes(0, 1), y.swapaxes(0, 1)) for x, y in _kv(text, other, right)]
        apart = max(apart, *(float(_distance(y, x).max()) for x, y in pairs))
        texts.append(text)
    return texts, min(max(ROUNDINGS * apart, LEAST), MOST)


def _kv(one: Text, two: Text, layers: Iterable[int]) -> list[tuple[mx.array, mx.array]]:
    return [(one.kv[layer], two.kv[layer]) for layer in layers]


def _distance(found: mx.array, right: mx.array) -> Floats:
    """How far found [N, ...] is from right [N, ...], as shares of its length: [N]."""
    found, right = (x.astype(mx.float32).reshape(len(x), -1) for x in (found, right))
    apart = mx.linalg.norm(found - right, axis=1) / (mx.linalg.norm(right, axis=1) + 1e-20)
    return np.array(apart, np.float64)


def _same(plain: Sequence[Sequence[int]], drafted: Sequence[Sequence[int]]) -> Finding:
    """Compare the texts."""
    compared, problem = 0, None
    for row, (right, found) in enumerate(zip(plain, drafted, strict=True), 1):
        compared += len(found)
        if found != right[: len(found)]:
            at = next(i for i, (a, b) in enumerate(zip(right, found, strict=False)) if a != b)
            problem = (
                f"the text with drafts is not the text without: row {row} differs at its token "
                f"{at + 1}"
            )
    return Finding(SAME, compared, problem)


def _hidden(target: Target, cases: Sequence[_Case], tolerance: float) -> Finding:
    """Compare hidden states, and the tokens they give with the tokens handed beside them."""
    faults, tokens = [], 0
    for case in cases:
        handed = case.seen.hidden[case.row : case.row + 1]
        at = case.length - 1
        error = float(_distance(handed, case.texts[case.row].hidden[at : at + 1])[0])
        best = mx.argmax(target.logits(handed), axis=-1)
        if not error <= tolerance:  # or not a number
            faults.append(_nearest_state(case, handed, error))
        elif not mx.array_equal(best, case.seen.tokens[case.row : case.row + 1]):
            tokens += 1
    problem = None
    if faults:
        problem = f"the hidden state handed to the drafter is {_most(faults, len(cases))}"
    elif tokens:
        problem = (
            "the token handed to the drafter is not the one that the hidden state beside it gives "
            f"(in {tokens} of {len(cases)} cases)"
        )
    return Finding(HIDDEN, len(cases), problem)


def _nearest_state(case: _Case, handed: mx.array, error: float) -> str:
    """Say whose hidden state it is."""
    for row, text in enumerate(case.texts):
        errors = _distance(mx.broadcast_to(handed, text.hidden.shape), text.hidden)
        at = int(errors.argmin())
        if errors[at] < error / 2:
            if row != case.row:
                return "another row's"
            return f"that of another position, {at - case.length + 1:+d} from the right one"
    return "that of no position of the text: a rejected draft's, or not after the final norm"


def _read(config: ModelConfig, cases: Sequence[_Case], tolerance: float) -> Finding:
    """Compare what the drafter's layers were told with attention over the right keys and values."""
    right = {s: recomputation.right_layer(config, sliding=s) for s in (True, False)}
    reads = [(case, read) for case in cases for read in case.seen.reads]
    faults = []
    for case, read in reads:
        layer = right[read.layer.sliding]
        error = _read_error(config, case, read, case.row, layer)
        if not error <= tolerance:  # or not a number
            faults.append(_nearest_read(config, case, read, layer, error))
    return Finding(READ, len(reads), _most(faults, len(reads)) if faults else None)


def _read_error(config: ModelConfig, case: _Case, read: Read, row: int, layer: int) -> float:
    """How far what a layer was told is from what it should be, were these a row's and a layer's."""
    window = config.sliding_window if read.layer.sliding else None
    kv = recomputation.visible(case.texts[row], layer, case.lengths[row], window)
    own = slice(case.row, case.row + 1)
    return float(_distance(read.told[own], recomputation.attend(read.queries[own], kv))[0])


def _nearest_read(config: ModelConfig, case: _Case, read: Read, right: int, error: float) -> str:
    """Say whose keys and values they are."""
    sliding = read.layer.sliding
    errors = {
        (row, layer): _read_error(config, case, read, row, layer)
        for row in range(len(case.texts))
        for layer in recomputation.layers_of(config, sliding=sliding)
    }
    row, layer = min(errors, key=lambda at: errors[at])
    what = f"the drafter's {'sliding' if sliding else 'full'} layers read "
    if errors[row, layer] > error / 2:
        return what + f"other keys and values than those of the text in layer {right}"
    if row != case.row:
        return what + "another row's keys and values"
    return what + f"keys and values of layer {layer}, it must be layer {right}"


def _drafted(target: Target, drafter: Drafter, cases: Sequence[_Case], tolerance: float) -> Finding:
    """Compare what the drafter computed with drafting anew from what it was handed."""
    faults = []
    for case in cases:
        errors = _draft_errors(target, drafter, case)
        right = errors.pop("")
        nearest = min(errors, key=lambda name: errors[name])
        if errors[nearest] < right / 2:  # a small difference, in half precision within tolerance
            faults.append(f"the drafter's position is {nearest}")
        elif not right <= tolerance:
            faults.append("from what it is handed, which is right, the drafter computes otherwise")
    return Finding(DRAFTED, len(cases), _most(faults, len(cases)) if faults else None)


def _draft_errors(target: Target, drafter: Drafter, case: _Case) -> dict[str, float]:
    """How far the drafter's states are from those at the right position, "", and at others."""
    seen, row, config = case.seen, case.row, target.config
    kv = {}
    for sliding in (True, False):
        window = config.sliding_window if sliding else None
        layer = recomputation.right_layer(config, sliding=sliding)
        kv[sliding] = recomputation.visible(case.texts[row], layer, case.length, window)
    tokens = [seen.tokens[row : row + 1], *seen.drafts[row, :-1].split(K - 1)]
    at = {"": [case.length] * K}
    at |= {f"off by {shift:+d}": [case.length + shift] * K for shift in SHIFTS}
    at["advanced from step to step, it must stay"] = [case.length + step for step in range(K)]
    fed = seen.hidden[row : row + 1], tokens
    positions = list(zip(*at.values(), strict=True))
    anew = mx.stack(recomputation.draft_states(drafter, target, fed, kv, positions), axis=1)
    found = mx.stack([state[row] for state in seen.states])[None]
    errors = _distance(mx.broadcast_to(found, anew.shape), anew)
    return dict(zip(at, map(float, errors), strict=True))


def _most(faults: Sequence[str], cases: int) -> str:
    """Return the most frequent fault, and in how many cases there was any."""
    most = max(dict.fromkeys(faults), key=faults.count)
    return f"{most} (in {len(faults)} of {cases} cases)"
