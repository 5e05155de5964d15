"""gptq in C gives the bits of its reference in numpy, whatever the CPU and the split of the rows."""

from collections.abc import Iterator

import ggml as library
import gptq_reference as reference
import numpy as np
import pytest
from gptq_reference import Statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import KINDS, depths, some_weights

from tritcore import ggml
from tritcore.format import CODE_MAX, DEPTHS

pytestmark = pytest.mark.build

KERNELS = library.kernels()


@pytest.fixture(params=KERNELS)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    library.use_kernels(request.param)
    yield
    library.use_kernels(None)


def statistics(rng: np.random.Generator, sharpness: float = 1.0) -> Statistics:
    """Of correlated columns; the sharper, the more unequal."""
    mixed = rng.standard_normal((96, 24)) @ rng.standard_normal((24, 64)) + 0.5 * rng.standard_normal((96, 64))
    mixed *= np.exp(sharpness * rng.standard_normal(64))
    hessian = mixed.T @ mixed
    factor = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]  # R RT, R upper triangular
    diagonal = np.diagonal(factor)
    parts = (factor / diagonal, diagonal**2, hessian, np.linalg.inv(hessian))
    return Statistics(*(np.ascontiguousarray(part, dtype=np.float32) for part in parts))


def columns_of(known: Statistics) -> ggml.Columns:
    return ggml.Columns(known.feedback, known.importance, known.hessian, known.inverse)


class Strided:
    """Output (64, rows) and (4, rows) in the middle of wider arrays, whose margins stay as they are."""

    def __init__(self, rows: int, margin: int) -> None:
        self._wide = [np.full((n, rows + 2 * margin), 7, np.float32) for n in (64, 4)]
        self._margin = margin
        self.values, self.scales = (wide[:, margin : margin + rows] for wide in self._wide)
        self._indexes = np.full((rows + 2, 4), 77, np.uint8)
        self.indexes = self._indexes[1:-1]

    def check_margins(self) -> None:
        for wide in self._wide:
            inner = np.zeros(wide.shape, bool)
            inner[:, self._margin : wide.shape[1] - self._margin] = True
            assert (wide[~inner] == 7).all()
        assert (self._indexes[[0, -1]] == 77).all()


def quantized(depth: int, known: Statistics, aims: np.ndarray, margin: int = 0) -> Strided:
    out = Strided(aims.shape[1], margin)
    assert ggml.gptq_quantize(depth, columns_of(known), aims, out.values, out.scales, out.indexes) is None
    return out


def weights(kind: str, seed: int, rows: int, size: float) -> np.ndarray:
    """float32 (64, rows), half as large as the type can hold at most."""
    return np.ascontiguousarray(0.5 * some_weights(kind, seed, rows, size).T)


def same(got: Strided, expected: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    values, scales, indexes = expected
    assert np.array_equal(got.indexes, indexes)
    assert np.array_equal(got.scales, scales)
    assert np.array_equal(got.values, values)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("rows", "margin"), [(1, 0), (16, 5), (37, 3)])
def test_quantize(depth: int, kind: str, rows: int, margin: int) -> None:
    rng = np.random.default_rng(rows)
    known = statistics(rng)
    aims = weights(kind, rows, rows, 0.3)
    before = aims.copy()
    got = quantized(depth, known, aims, margin)
    same(got, reference.quantize(depth, known, aims))
    got.check_margins()
    assert np.array_equal(aims, before)
    assert np.abs(np.rint(got.values / np.repeat(got.scales, 16, axis=0))).max() <= CODE_MAX[depth]


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("rows", "margin"), [(1, 0), (16, 5), (37, 3)])
def test_descend(depth: int, kind: str, rows: int, margin: int, search: bool) -> None:
    rng = np.random.default_rng(rows)
    known = statistics(rng)
    aims = weights(kind, rows, rows, 0.3)
    got = quantized(depth, known, aims, margin)
    # the other blocks pull too
    gradient = (known.hessian @ (got.values - aims + 0.02 * rng.standard_normal(aims.shape))).astype(np.float32)
    before = gradient.copy()
    expected = reference.descend(depth, known, gradient, got.values, got.scales, got.indexes, search=search)
    where = (got.values, got.scales, got.indexes)
    assert ggml.gptq_descend(depth, columns_of(known), gradient, *where, search=search) is None
    same(got, expected)
    got.check_margins()
    assert np.array_equal(gradient, before)


@settings(deadline=None)
@given(depths, st.sampled_from(KINDS), st.integers(0, 2**32 - 1), st.integers(1, 50), st.floats(0, 4))
def test_all_kernels_agree(depth: int, kind: str, seed: int, rows: int, sharpness: float) -> None:
    rng = np.random.default_rng(seed)
    known = statistics(rng, sharpness)
    aims = weights(kind, seed, rows, float(rng.choice([0.02, 0.3, 5.0])))
    pull = 0.1 * np.abs(aims).max() * rng.standard_normal(aims.shape)
    results = []
    for kernels in KERNELS:
        library.use_kernels(kernels)
        got = quantized(depth, known, aims)
        gradient = (known.hessian @ (got.values - aims + pull)).astype(np.float32)
        where = (got.values, got.scales, got.indexes)
        results.append([part.copy() for part in where])
        assert ggml.gptq_descend(depth, columns_of(known), gradient, *where, search=True) is None
        results[-1] += where
    library.use_kernels(None)
    for other in results[1:]:
        assert all(map(np.array_equal, results[0], other))


@pytest.mark.parametrize("depth", DEPTHS)
def test_rows_can_be_shared_out(depth: int) -> None:
    known = statistics(np.random.default_rng(0))
    aims = weights("heavy tails", 0, 100, 0.3)
    whole = quantized(depth, known, aims)
    parts = Strided(100, 0)
    for part in (slice(0, 33), slice(33, 80), slice(80, 100)):
        where = (parts.values[:, part], parts.scales[:, part], parts.indexes[part])
        assert ggml.gptq_quantize(depth, columns_of(known), aims[:, part], *where) is None
    same(parts, (whole.values, whole.scales, whole.indexes))


def test_descent_and_new_scales_lessen_the_error() -> None:
    """Or leave it as it is, row by row."""
    rng = np.random.default_rng(1)
    known = statistics(rng)
    aims = weights("normal", 1, 64, 0.3)
    best = aims + 0.02 * rng.standard_normal(aims.shape)  # given the other blocks
    hessian = known.hessian.astype(np.float64)

    def errors(values: np.ndarray) -> np.ndarray:
        off = values - best
        return np.einsum("ir,ij,jr->r", off, hessian, off)

    def after(search: bool) -> np.ndarray:
        got = quantized(2, known, aims)
        gradient = (hessian @ (got.values - best)).astype(np.float32)
        where = (got.values, got.scales, got.indexes)
        assert ggml.gptq_descend(2, columns_of(known), gradient, *where, search=search) is None
        return errors(got.values)

    start, descended, searched = errors(quantized(2, known, aims).values), after(False), after(True)
    assert (descended <= start * (1 + 1e-5)).all()
    assert (searched <= descended * (1 + 1e-5)).all()
    assert descended.sum() < start.sum()
    assert searched.sum() < descended.sum()


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1000.0])
@pytest.mark.parametrize("row", [0, 20, 36])
def test_the_first_refused_row_is_named(row: int, value: float) -> None:
    known = statistics(np.random.default_rng(0))
    aims = weights("normal", 0, 37, 0.3)
    aims[50, row] = value
    aims[3, 36] = np.nan
    out = Strided(37, 0)
    refused = ggml.gptq_quantize(2, columns_of(known), aims, out.values, out.scales, out.indexes)
    assert refused == row


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("search", [False, True])
def test_descent_names_a_row_that_is_not_finite(search: bool) -> None:
    known = statistics(np.random.default_rng(0))
    aims = weights("normal", 0, 37, 0.3)
    got = quantized(2, known, aims)
    gradient = np.zeros_like(aims)
    gradient[7, 20] = np.nan
    where = (got.values, got.scales, got.indexes)
    assert ggml.gptq_descend(2, columns_of(known), gradient, *where, search=search) == 20


@pytest.mark.usefixtures("_kernels")
def test_rows_whose_new_scales_are_refused_keep_theirs() -> None:
    """The gradient is so great that the best values lie above the range."""
    known = statistics(np.random.default_rng(0))
    aims = weights("normal", 0, 20, 0.3)
    got = quantized(3, known, aims)
    gradient = (1e4 * known.hessian @ np.ones_like(aims)).astype(np.float32)
    scales, indexes = got.scales.copy(), got.indexes.copy()
    expected = reference.descend(3, known, gradient, got.values, scales, indexes, search=False)
    where = (got.values, got.scales, got.indexes)
    assert ggml.gptq_descend(3, columns_of(known), gradient, *where, search=True) is None
    same(got, expected)


def test_plain_kernels_run_everywhere() -> None:
    assert "plain" in KERNELS
