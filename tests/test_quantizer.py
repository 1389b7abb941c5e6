"""The optimal quantizer against brute force, adaptive quadrature and hand-made cases."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from fewbit_hooks import FewbitTypeError, FewbitValueError
from fewbit_hooks._float16 import find_scale
from fewbit_hooks._quantizer import cheapest_path, optimal_quantizer

few = settings(max_examples=15, deadline=None)
waves = st.lists(st.floats(-1, 1), min_size=3, max_size=3).filter(lambda c: max(map(abs, c)) > 0.1)


def flat(x):
    return np.ones_like(x)


def logistic(x):
    return 1 / (1 + np.exp(-x))


def hardswish_slope(x):
    return np.where(x < -3, 0.0, np.where(x <= 3, x / 3 + 0.5, 1.0))


def wave(coefficients):
    return lambda x: sum(c * np.sin((k + 1) * x + k) for k, c in enumerate(coefficients))


def staircase(values):
    """values[i] on (i, i + 1]."""
    return lambda x: np.asarray(values, float)[np.clip(np.ceil(x).astype(int) - 1, 0, len(values) - 1)]


def error_by_quadrature(derivative, best, weight, interval, breaks=()):
    """E of the returned boundaries and levels, by scipy's adaptive quadrature between all of the breaks."""
    low, high = interval
    ends = sorted({low, high, *(b for b in (*best.boundaries, *breaks) if low < b < high)})
    total = 0.0
    for a, b in itertools.pairwise(ends):
        level = best.levels[np.searchsorted(best.boundaries, (a + b) / 2)]
        square = lambda x, q=level: float((derivative(np.array(x)) - q) ** 2 * weight(np.array(x)))  # noqa: E731
        total += integrate.quad(square, a, b, epsabs=1e-14, epsrel=1e-10, limit=200)[0]
    return total


@given(st.lists(st.floats(-1, 1), min_size=5, max_size=8), st.integers(2, 5))
def test_the_cheapest_path_is_that_of_brute_force(values, pieces):
    values, n = np.array(values), len(values)
    cost = np.full((n + 1, n + 1), np.inf)  # cost[stop, start]
    for start, stop in itertools.combinations(range(n + 1), 2):
        cost[stop, start] = np.sum((values[start:stop] - values[start:stop].mean()) ** 2)

    found, path = cheapest_path([cost[:, :1], *[cost] * (pieces - 2), cost[-1:]])

    def total(cuts):
        return sum(cost[b, a] for a, b in itertools.pairwise([0, *cuts, n]))

    assert found == pytest.approx(min(map(total, itertools.combinations(range(1, n), pieces - 1))))
    assert total(path) == pytest.approx(found)


@few
@given(st.lists(st.integers(-8, 8), min_size=5, max_size=7), st.integers(1, 2))
def test_a_staircase_gets_the_optimum_of_brute_force_among_the_values_it_takes(values, bits):
    n = len(values)

    def cost(start, stop):
        return min(sum((v - level) ** 2 for v in values[start:stop]) for level in values)

    brute = min(
        sum(cost(a, b) for a, b in itertools.pairwise([0, *cuts, n]))
        for cuts in itertools.combinations(range(1, n), 2**bits - 1)
    )
    best = optimal_quantizer(staircase(values), bits, weight=flat, interval=(0, n), jumps=range(1, n))
    assert brute * (1 - 1e-9) <= best.error <= brute * 1.0101 + 1e-9
    assert np.isin(best.levels, values).all()


@few
@given(waves)
def test_one_boundary_is_the_best_of_all_places(coefficients):
    f = wave(coefficients)
    best = optimal_quantizer(f, 1, weight=flat, interval=(-2, 3))
    x = np.linspace(-2, 3, 20_001)
    x = (x[1:] + x[:-1]) / 2
    n, s1, s2 = np.arange(1, 20_000), f(x).cumsum(), (f(x) ** 2).cumsum()
    errors = s2[-1] - s1[:-1] ** 2 / n - (s1[-1] - s1[:-1]) ** 2 / n[::-1]
    assert best.error == pytest.approx(errors.min() * 5 / 20_000, rel=1e-4)


@few
@given(waves, st.integers(1, 5))
def test_the_error_is_that_of_the_returned_boundaries_and_levels(coefficients, bits):
    def weight(x):
        return np.exp(-x * x)

    f = wave(coefficients)
    best = optimal_quantizer(f, bits, weight=weight, interval=(-2, 3))
    assert best.error == pytest.approx(error_by_quadrature(f, best, weight, (-2, 3)), rel=1e-6)


@settings(max_examples=5, deadline=None)
@given(waves)
def test_the_error_falls_with_every_bit(coefficients):
    errors = [optimal_quantizer(wave(coefficients), b, weight=flat, interval=(-2, 3)).error for b in range(1, 9)]
    assert all(after < before for before, after in itertools.pairwise(errors))


@few
@given(waves, st.integers(1, 4))
def test_levels_are_the_weighted_means_of_their_pieces(coefficients, bits):
    f = wave(coefficients)
    best = optimal_quantizer(f, bits, weight=lambda x: 1 + x * x, interval=(-2, 3))
    for a, b, level in zip([-2, *best.boundaries], [*best.boundaries, 3], best.levels, strict=True):
        above = integrate.quad(lambda x: (1 + x * x) * float(f(x)), a, b)[0]
        assert level == pytest.approx(above / integrate.quad(lambda x: 1 + x * x, a, b)[0], abs=1e-7)


def test_folding_counts_the_error_on_both_sides_of_an_uneven_interval():
    def f(x):
        return np.cosh(x) ** -2.0

    best = optimal_quantizer(f, 2, weight=flat, interval=(-1.5, 4), folded=True)
    left = error_by_quadrature(f, best, flat, (0, 1.5))
    assert best.error == pytest.approx(left + error_by_quadrature(f, best, flat, (0, 4)), rel=1e-6)
    assert (best.boundaries > 0).all()


def test_folding_an_interval_away_from_zero_is_the_same_as_not_folding_it():
    def f(x):
        return np.cosh(x) ** -2.0

    plain = optimal_quantizer(f, 2, weight=flat, interval=(1, 4))
    folded = optimal_quantizer(f, 2, weight=flat, interval=(-4, -1), folded=True)
    assert folded.error == pytest.approx(plain.error, rel=1e-6)
    np.testing.assert_allclose(folded.boundaries, plain.boundaries, rtol=1e-3)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_boundaries_lie_on_the_jumps_to_one_float32(bits):
    best = optimal_quantizer(hardswish_slope, bits, weight=flat, interval=(-10, 10), jumps=(-3, 3))
    for jump in (-3, 3):
        assert np.abs(best.boundaries - jump).min() <= np.spacing(np.float32(3))
    breaks = error_by_quadrature(hardswish_slope, best, flat, (-10, 10), (-3, 3))
    assert best.error == pytest.approx(breaks, rel=1e-6)
    assert find_scale(best.boundaries) is not None


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("below", [lambda x: x <= 0, lambda x: x < 0], ids=["as below", "as above"])
@pytest.mark.parametrize("slope", [0.5, 0.1, 0.0, -1.0])
def test_zero_has_the_level_of_the_side_whose_derivative_it_has(bits, below, slope):
    def derivative(x):  # elu's has 0 with what lies below
        return np.where(below(x), slope * np.exp(np.minimum(x, 0)), 1.0)

    best = optimal_quantizer(derivative, bits, weight=flat, interval=(-10, 10), jumps=(0,))
    levels = best.levels[np.searchsorted(best.boundaries, [-1e-6, 0.0, 1e-6], side="left")]
    assert levels[0] != levels[2]
    assert levels[1] == levels[0 if below(np.float64(0)) else 2]


SIDES = {
    "outside": (lambda x: x <= -3, lambda x: x < 3),  # as hardswish has it
    "inside": (lambda x: x < -3, lambda x: x <= 3),
    "left": (lambda x: x <= -3, lambda x: x <= 3),
}


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("sides", SIDES)
def test_a_jump_has_the_level_of_the_side_whose_derivative_it_has(bits, sides):
    low, high = SIDES[sides]

    def derivative(x):
        return np.where(low(x), 0.0, np.where(high(x), x / 3 + 0.5, 1.0))

    best = optimal_quantizer(derivative, bits, weight=flat, interval=(-10, 10), jumps=(-3, 3))
    at = np.float32([-3, 3])
    below, above = np.nextafter(at, np.float32(-np.inf)), np.nextafter(at, np.float32(np.inf))
    level = {float(x): best.levels[np.searchsorted(best.boundaries, x)] for x in [*below, *at, *above]}
    own = np.where([low(-3.0), high(3.0)], below, above)
    wrong = sum(level[float(x)] != level[float(side)] for x, side in zip(at, own, strict=True))
    assert wrong == (sides == "left")  # halves go to even numbers: on both sides of 0 to the inside, or the outside
    assert find_scale(best.boundaries) is not None


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("jump", [0.1, -0.7, 1.3, -5.0])
def test_a_jump_anywhere_has_the_level_of_its_side(jump, right):
    single = np.float64(np.float32(jump))

    def derivative(x):
        return np.where((x >= single) if right else (x > single), 1.0, 0.0) + np.tanh(x) / 9

    best = optimal_quantizer(derivative, 3, weight=flat, interval=(-10, 10), jumps=(jump,))
    assert best.levels[np.searchsorted(best.boundaries, single)] == pytest.approx(derivative(single), abs=0.1)


def test_a_jump_that_is_not_named_costs_more_than_one_that_is():
    named = optimal_quantizer(hardswish_slope, 4, weight=flat, interval=(-10, 10), jumps=(-3, 3))
    unnamed = optimal_quantizer(hardswish_slope, 4, weight=flat, interval=(-10, 10))
    assert named.error < unnamed.error


def test_a_level_in_a_gap_of_the_values_is_moved_to_a_value_that_is_taken():
    best = optimal_quantizer(staircase([0, 4, 10]), 1, weight=flat, interval=(0, 3), jumps=(1, 2))
    # {0, 4 | 10} would have the mean 2, which no input has
    np.testing.assert_allclose(best.levels, [0, 10])
    assert best.error == pytest.approx(16)


def test_the_weight_decides_where_the_boundaries_are():
    def near(center):
        return optimal_quantizer(logistic, 2, weight=lambda x: np.exp(-2 * (x - center) ** 2), interval=(-10, 10))

    np.testing.assert_allclose(near(3.0).boundaries, 3.0, atol=1.5)
    np.testing.assert_allclose(near(-3.0).boundaries, -3.0, atol=1.5)


def test_jumps_of_the_weight_are_integrated_exactly():
    heights = staircase([3, 0, 1, 7, 2])
    best = optimal_quantizer(logistic, 2, weight=heights, interval=(0, 5), edges=range(6))
    assert best.error == pytest.approx(error_by_quadrature(logistic, best, heights, (0, 5), range(6)), rel=1e-6)


def test_a_piece_without_weight_has_a_level_that_the_derivative_takes():
    best = optimal_quantizer(staircase([1, 5, 2, 9]), 1, weight=lambda x: x <= 1.0, interval=(0, 4), jumps=(1, 2, 3))
    assert np.isin(best.levels, [1, 5, 2, 9]).all()
    assert best.error == pytest.approx(0)


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_boundaries_are_increasing_float32_numbers_at_any_magnitude(scale, bits):
    best = optimal_quantizer(lambda x: logistic(x / scale), bits, weight=flat, interval=(-9 * scale, 9 * scale))
    np.testing.assert_array_equal(best.boundaries.astype(np.float32), best.boundaries)
    assert (np.diff(best.boundaries) > 0).all()
    unit = optimal_quantizer(logistic, bits, weight=flat, interval=(-9, 9))
    assert best.error == pytest.approx(unit.error * scale, rel=0.02)


def test_an_interval_with_fewer_floats_than_pieces_still_gives_increasing_boundaries():
    best = optimal_quantizer(lambda x: x - 1e6, 8, weight=flat, interval=(1e6, 1e6 + 1))
    assert (np.diff(best.boundaries) > 0).all()


def test_boundaries_can_be_looked_up_in_float16():
    for bits in range(1, 9):
        assert find_scale(optimal_quantizer(logistic, bits, weight=flat, interval=(-10, 10)).boundaries) == 1.0


@pytest.mark.parametrize(("bits", "loss"), [(1, 1e-6), (4, 3e-5), (6, 6e-5), (7, 3e-4)])
def test_neither_the_grids_nor_snapping_cost_anything_that_matters(bits, loss):
    # the free optimum for f'(x) = x on (0, 1) is even: E = 1 / (12 * K^2)
    best = optimal_quantizer(lambda x: x, bits, weight=flat, interval=(0, 1))
    assert 1 - 1e-9 < best.error * 12 * 4**bits < 1 + loss


@pytest.mark.parametrize(("bits", "points"), [(4, 600_000), (8, 1_500_000)])
def test_a_codebook_asks_for_the_derivative_at_so_many_points_at_most(bits, points):
    asked = 0

    def slope(x):
        nonlocal asked
        asked += x.size
        return hardswish_slope(x)

    optimal_quantizer(slope, bits, weight=flat, interval=(-10, 10), jumps=(-3, 3))
    assert asked < points


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda x: 0 * x, "the weight is zero everywhere"),
        (lambda x: -flat(x), "the weight must be finite and not negative, got -1.0"),
        (lambda x: x * np.nan, "the weight must be finite and not negative, got nan"),
        (lambda x: 1.0, "the weight must map an array to one of the same shape"),
    ],
)
def test_a_weight_that_is_none_is_refused(weight, message):
    with pytest.raises(FewbitValueError, match=message):
        optimal_quantizer(logistic, 2, weight=weight, interval=(-10, 10))


def test_a_derivative_that_is_not_finite_is_refused():
    with pytest.raises(FewbitValueError, match="the derivative must be finite, got inf at x = 2"):
        optimal_quantizer(lambda x: np.where(x > 2, np.inf, 0.0), 2, weight=flat, interval=(-10, 10))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(FewbitValueError, match=f"^bits must be an integer from 1 to 8, got {bits}$"):
        optimal_quantizer(logistic, bits, weight=flat, interval=(-10, 10))


@pytest.mark.parametrize("bits", [2.5, "3", True, None])
def test_bits_that_are_no_integer_are_refused(bits):
    with pytest.raises(FewbitTypeError, match=f"^bits must be an integer from 1 to 8, got {bits!r}$"):
        optimal_quantizer(logistic, bits, weight=flat, interval=(-10, 10))


@pytest.mark.parametrize("interval", [(10, -10), (0, 0), (-np.inf, 1), (0, np.nan)])
def test_intervals_reversed_or_not_finite_are_refused(interval):
    with pytest.raises(FewbitValueError, match="interval must be two finite numbers, the lower one first, got"):
        optimal_quantizer(logistic, 2, weight=flat, interval=interval)


@pytest.mark.parametrize("interval", [None, 3, (1, 2, 3), ("a", "b")])
def test_intervals_that_are_not_two_numbers_are_refused(interval):
    with pytest.raises(FewbitTypeError, match="interval must be two numbers such as"):
        optimal_quantizer(logistic, 2, weight=flat, interval=interval)
