"""Residual connections and norms: the values, and rows that do not see each other."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.residual_norm import (
    RESIDUAL_NORMS,
    residual_norm,
    residual_norm_metal,
    residual_norm_reference,
)
from tests.kernels.exact import DTYPES, EPS, check_errors, draw, exact, norm
from tests.metal.executor import Executor


class Form(NamedTuple):
    """How many rows are added, whether their sum is scaled, how many norms follow."""

    added: int
    scaled: bool
    nexts: int


AFTER_ATTENTION = Form(1, False, 1)
BEFORE_PER_LAYER_INPUT = Form(1, False, 0)
BEFORE_EXPERTS = Form(1, False, 2)
LAST = Form(1, True, 1)
LAST_OF_EXPERTS = Form(2, True, 1)
EMBEDDED = Form(0, True, 1)
FIRST = Form(0, False, 1)
FORMS = [
    AFTER_ATTENTION,
    BEFORE_PER_LAYER_INPUT,
    BEFORE_EXPERTS,
    LAST,
    LAST_OF_EXPERTS,
    EMBEDDED,
    FIRST,
]
# E2B, E4B, 12B, 26B, 31B, their drafters, the tiny families and theirs, the built-in pair, and
# widths that leave lanes without elements.
WIDTHS = {
    1536: [AFTER_ATTENTION, BEFORE_PER_LAYER_INPUT, LAST],
    2560: [LAST],
    3840: [AFTER_ATTENTION],
    2816: [BEFORE_EXPERTS, LAST_OF_EXPERTS, EMBEDDED],
    5376: [AFTER_ATTENTION, LAST],
    256: [LAST],
    1024: [AFTER_ATTENTION],
    128: FORMS,
    64: [LAST],
    192: [AFTER_ATTENTION, LAST],
    160: [LAST],
    8: [LAST],
    1032: [AFTER_ATTENTION],
}


class Case(NamedTuple):
    """The arguments of a call but eps."""

    h: mx.array
    added: list[mx.array]
    weights: list[mx.array]
    scalar: mx.array | None
    nexts: list[mx.array]

    def rows(self, *index: slice) -> "Case":
        return self._replace(h=self.h[index], added=[x[index] for x in self.added])


def _case(form: Form, shape: tuple[int, ...], dtype: mx.Dtype) -> Case:
    width = shape[-1]
    return Case(
        draw(0, *shape, dtype=dtype, scale=3),
        [draw(1 + i, *shape, dtype=dtype, scale=10.0**i) for i in range(form.added)],
        [draw(10 + i, width, dtype=dtype) for i in range((0, 1, 3)[form.added])],
        mx.array([0.3], dtype) if form.scaled else None,
        [draw(20 + i, width, dtype=dtype) for i in range(form.nexts)],
    )


def _flat(result: tuple[mx.array, list[mx.array]]) -> list[mx.array]:
    return [result[0], *result[1]]


def _metal(case: Case) -> list[mx.array]:
    return _flat(residual_norm_metal(*case, EPS))


def _truth(case: Case) -> list[np.ndarray]:
    h, weights = exact(case.h), [exact(w) for w in case.weights]
    if case.added:
        x = exact(case.added[0])
        if len(case.added) == 2:
            x = norm(x) * weights[1] + norm(exact(case.added[1])) * weights[2]
        h = h + norm(x) * weights[0]
    if case.scalar is not None:
        h = h * exact(case.scalar)
    return [h, *(norm(h) * exact(w) for w in case.nexts)]


def _equal(found: list[mx.array], expected: list[mx.array]) -> bool:
    return all(mx.array_equal(a, b).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "width, form, dtype",
    [(width, form, mx.bfloat16) for width, forms in WIDTHS.items() for form in forms]
    + [(128, form, mx.float32) for form in FORMS]
    + [(5376, LAST, dtype) for dtype in DTYPES[1:]],
)
def test_values(metal: object, width: int, form: Form, dtype: mx.Dtype) -> None:
    case = _case(form, (2, 3, width), dtype)
    reference = _flat(residual_norm_reference(*case, EPS))
    check_errors(_metal(case), reference, _truth(case))


@pytest.mark.parametrize(
    "width, form, dtype",
    [(1536, LAST, mx.bfloat16), (2816, LAST_OF_EXPERTS, mx.float32), (128, EMBEDDED, mx.float32)],
)
def test_rows_do_not_see_each_other(metal: object, width: int, form: Form, dtype: mx.Dtype) -> None:
    case = _case(form, (8, 16, width), dtype)
    together = _metal(case)
    for row, place, rows, places in [(0, 0, 8, 1), (3, 2, 1, 14), (7, 15, 1, 1), (5, 11, 1, 1)]:
        at = (slice(row, row + rows), slice(place, place + places))
        assert _equal(_metal(case.rows(*at)), [x[at] for x in together])


@pytest.mark.parametrize(
    "width, form, threads",
    [(5376, LAST, 128), (1536, LAST, 96), *((128, LAST_OF_EXPERTS, n) for n in (32, 64, 128))],
)
def test_other_threadgroups_give_the_same_bits(
    metal: object, monkeypatch: pytest.MonkeyPatch, width: int, form: Form, threads: int
) -> None:
    case = _case(form, (1, 3, width), mx.float32)
    expected = _metal(case)
    monkeypatch.setattr(RESIDUAL_NORMS[form.nexts], "threads", threads)
    assert _equal(_metal(case), expected)


def test_views(metal: object) -> None:
    """A prompt's last position, and rows that are apart."""
    case = _case(LAST, (2, 6, 128), mx.bfloat16)
    for at in [(slice(0, 1), slice(5, 6)), (slice(0, 2), slice(0, 6, 2))]:
        assert _equal(_metal(case.rows(*at)), [x[at] for x in _metal(case)])
    turned = case._replace(h=mx.contiguous(case.h.swapaxes(0, 1)).swapaxes(0, 1))
    assert _equal(_metal(turned), _metal(case))


def test_a_row_of_zeros_and_large_values(metal: object) -> None:
    case = _case(BEFORE_EXPERTS, (2, 1, 128), mx.float16)
    case.h[0], case.added[0][0] = 0, 0
    case.h[1], case.added[0][1] = 3e4, 6e4
    reference = _flat(residual_norm_reference(*case, EPS))
    found = _metal(case)
    assert not any(x[0].any().item() for x in found)
    check_errors(found, reference, _truth(case))


def test_a_scalar_without_dimensions(metal: object) -> None:
    case = _case(EMBEDDED, (1, 2, 128), mx.bfloat16)
    assert case.scalar is not None
    assert _equal(_metal(case._replace(scalar=case.scalar.reshape(()))), _metal(case))


def test_rows_are_read_and_written_once(metal: Executor) -> None:
    case = _case(LAST_OF_EXPERTS, (2, 2, 128), mx.bfloat16)
    _metal(case)
    traffic = metal.launches[-1].traffic
    for name in ("h", "x", "y"):
        assert traffic[name].read == traffic[name].read_total == case.h.nbytes
    for name in ("out", "normed_0"):
        assert traffic[name].written == traffic[name].written_total == case.h.nbytes


def test_the_path_follows_the_device(metal: object) -> None:
    """On a GPU, the kernel: float32 sums in another order than the reference's."""
    case = _case(LAST, (4, 8, 1536), mx.float32)
    found = _flat(residual_norm(*case, EPS))
    assert _equal(found, _metal(case))
    assert not _equal(found, _flat(residual_norm_reference(*case, EPS)))


@pytest.mark.parametrize(
    "case, message",
    [
        (_case(LAST, (1, 1, 132), mx.bfloat16), "multiple of 8"),
        (_case(LAST, (1, 1, 128), mx.bfloat16)._replace(weights=[mx.ones(128)]), "float32"),
        (_case(LAST, (1, 1, 128), mx.float32)._replace(nexts=[mx.ones(64)]), r"\(64,\)"),
        (_case(LAST, (1, 1, 128), mx.float32)._replace(scalar=mx.ones(2)), r"\(2,\)"),
    ],
)
def test_what_a_checkpoint_may_not_hold(metal: object, case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _metal(case)
