"""Boundaries that a float16 look-up table can apply exactly to float32 inputs.

NOTE [ Sixteen bits decide the code ]

The fastest way found to encode on the CPU is one look-up in a table of all 65,536 values of a 16-bit float
(measured, 2**24 float32 elements: 0.54 ns an element, seven comparisons 1.4, `torch.bucketize` 7.5). For bfloat16
and float16 inputs such a table is exact whatever the boundaries are. A float32 input is first multiplied by a *scale*
(1 but for codebooks whose derivative jumps) and rounded to float16. Rounding is monotone, so this too is a comparison
with thresholds, but only certain thresholds can be had: the *cuts*, float32 numbers where rounding moves from one
float16 value to the next. Their relative spacing is 2**-11 to 2**-10, so moving a boundary to the nearest cut costs
nothing that can be measured, *except* on a jump of the derivative, where every element of the sliver between jump and
cut gets a level that is wrong by half the jump: there the scale puts a cut on the jump itself, or on the float32 number
below it, if the jump has the derivative of what lies on its right. (A number halfway between two float16 values is
rounded to the even one, so that one scale cannot take 3 and -3 both to the left.)

So a codebook's boundaries are cuts from the start, and what it publishes is what every encoder applies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLOAT16_MAX = 65504.0


def snap(boundaries: ArrayLike, scale: float = 1.0) -> NDArray[np.float64]:
    """Move each boundary to the nearest cut.

    >>> snap([-1.0, 0.3, 2.0])
    array([-0.99975586,  0.29992676,  1.9995116 ])

    Args:
        boundaries: float64, any order of magnitude below 65504.
        scale: what a float32 input is multiplied by before it is rounded to float16.

    Returns:
        float64 array of the same shape. Each value is a float32 number `b` such that, for every float32 `x`,
        `x <= b` if and only if `float16(x * scale) <= h` for some float16 number `h`.
    """
    boundaries = np.asarray(boundaries, np.float64)
    cuts = cuts_around(boundaries, scale, 1)
    nearest = np.abs(cuts - boundaries).argmin(axis=0)
    snapped: NDArray[np.float64] = np.take_along_axis(cuts, nearest[None], axis=0)[0]
    return snapped


def cuts_around(boundaries: ArrayLike, scale: float, reach: int) -> NDArray[np.float64]:
    """The cuts nearest to each boundary, ascending: `reach` on either side of one, stacked along a new first axis."""
    with np.errstate(over="ignore"):
        neighbours = [(np.asarray(boundaries, np.float64) * scale).astype(np.float16)]
    for _ in range(reach):
        neighbours.insert(0, np.nextafter(neighbours[0], np.float16(-np.inf)))
        neighbours.append(np.nextafter(neighbours[-1], np.float16(np.inf)))
    return _cut_above(np.stack(neighbours), np.float32(scale))


def scale_for_cut(cut: float) -> float:
    """The scale, next to 1, with which a float32 number is a cut; 1 where none was found.

    >>> three, below = 3.0, float(np.nextafter(np.float32(3.0), np.float32(0.0)))
    >>> float(snap([three])[0]), [float(snap([cut], scale_for_cut(cut))[0]) == cut for cut in (three, below)]
    (3.0009765625, [True, True])
    """
    near = np.abs(np.float16(cut))
    if not 0 < near < FLOAT16_MAX / 2:
        return 1.0
    for steps in (0, -1, 1, -2, 2):
        h = near + steps * np.spacing(near)
        tie = (np.float64(h) + np.float64(np.nextafter(h, np.float16(np.inf)))) / 2
        scale = np.float32(tie / abs(cut))
        for towards in (scale, 0, np.inf):
            tried = float(np.nextafter(scale, np.float32(towards)))
            if snap([cut], tried)[0] == cut:
                return tried
    return 1.0


def find_scale(boundaries: ArrayLike) -> float | None:
    """The scale with which every one of `boundaries` is a cut; None where there is no such scale.

    >>> find_scale(snap([-1.0, 0.3, 2.0])), find_scale([0.1, 0.2])
    (1.0, None)
    """
    boundaries = np.asarray(boundaries, np.float64)
    if not np.all(np.abs(boundaries) < FLOAT16_MAX / 2):
        return None
    if not np.array_equal(boundaries.astype(np.float32), boundaries):
        return None
    if np.array_equal(snap(boundaries), boundaries):
        return 1.0
    for scale in {scale_for_cut(float(b)): None for b in boundaries}:
        if np.array_equal(snap(boundaries, scale), boundaries):
            return scale
    return None


def _cut_above(h: NDArray[np.float16], scale: np.float32) -> NDArray[np.float64]:
    """The largest float32 `x` with `float16(x * scale) <= h`."""
    tie = (h.astype(np.float64) + np.nextafter(h, np.float16(np.inf)).astype(np.float64)) / 2
    near = (tie / np.float64(scale)).astype(np.float32)
    candidates = [near]
    for _ in range(3):
        candidates.insert(0, np.nextafter(candidates[0], np.float32(-np.inf)))
        candidates.append(np.nextafter(candidates[-1], np.float32(np.inf)))
    xs = np.stack(candidates)
    with np.errstate(over="ignore"):
        below = (xs * scale).astype(np.float16) <= h
    last = len(candidates) - 1 - below[::-1].argmax(axis=0)
    cuts: NDArray[np.float32] = np.take_along_axis(xs, last[None], axis=0)[0]
    return cuts.astype(np.float64)
