"""Cuts: thresholds that a look-up by float16 applies exactly to float32 inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit_hooks._float16 import find_scale, scale_for_cut, snap

NUMBERS = st.floats(-3e4, 3e4, allow_subnormal=False)


def codes_by_table(x, boundaries, scale):
    """The encoder's way: one look-up by the 16 bits of the scaled input."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    cuts = (boundaries.astype(np.float32) * np.float32(scale)).astype(np.float16)
    table = np.searchsorted(cuts, every, side="left")
    return table[(x * np.float32(scale)).astype(np.float16).view(np.uint16)]


def around(boundaries):
    """Each boundary with the three float32 numbers on either side."""
    middle = boundaries.astype(np.float32)
    below, above = [middle], [middle]
    for _ in range(3):
        below.append(np.nextafter(below[-1], np.float32(-np.inf)))
        above.append(np.nextafter(above[-1], np.float32(np.inf)))
    return np.concatenate(below + above)


def assert_table_is_exact(boundaries, scale):
    x = around(boundaries)
    expected = np.searchsorted(boundaries.astype(np.float32), x, side="left")
    np.testing.assert_array_equal(codes_by_table(x, boundaries, scale), expected)


@given(st.lists(NUMBERS, min_size=1, max_size=40))
def test_a_table_compares_exactly_with_snapped_boundaries(numbers):
    assert_table_is_exact(np.unique(snap(numbers)), 1.0)


@given(st.floats(1e-3, 3e4), st.sampled_from([-1, 1]), st.lists(NUMBERS, max_size=10))
def test_a_table_compares_exactly_with_boundaries_snapped_at_the_scale_of_one(size, sign, others):
    scale = scale_for_cut(sign * size)
    assert_table_is_exact(np.unique(snap([sign * size, *others], scale)), scale)


@given(st.floats(1e-3, 3e4), st.sampled_from([-1, 1]))
def test_with_its_scale_a_float32_number_is_a_cut(size, sign):
    number = float(np.float32(sign * size))
    assert snap([number], scale_for_cut(number))[0] == number


@given(st.floats(1e-4, 3e4), st.sampled_from([-1, 1]))
def test_snapping_moves_a_boundary_by_less_than_a_thousandth(size, sign):
    assert abs(snap([sign * size])[0] - sign * size) <= size * 2.0**-10


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_snapping_twice_changes_nothing(numbers):
    once = snap(numbers)
    np.testing.assert_array_equal(snap(once), once)


@pytest.mark.parametrize("beside", [None, -np.inf, np.inf])
@pytest.mark.parametrize("number", [3.0, -3.0, 0.7, 20.0])
def test_the_scale_is_found_again_from_the_boundaries(number, beside):
    number = np.float32(number) if beside is None else np.nextafter(np.float32(number), np.float32(beside))
    boundaries = np.unique(snap([number, -1.0, 0.3], scale_for_cut(float(number))))
    assert number in boundaries
    assert_table_is_exact(boundaries, find_scale(boundaries))


def test_there_is_no_scale_for_numbers_that_are_not_cuts():
    assert find_scale([0.1, 0.2]) is None
    assert find_scale([1e5]) is None
