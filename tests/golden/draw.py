"""A recorded run: its variables and the gradients of every step. Numpy only: TensorFlow and torch both import it.

Every number is drawn as an integer or a 53-bit fraction and scaled by powers of two: no libm call, hence the same bits on every machine.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent
DENSE_SHAPES = ((), (7,), (3, 5), (257,))
SPARSE_SHAPES = ((), (9,), (11, 4), (40, 3), (5, 2, 3))
LARGE_SHAPES = ((64, 33), (1,), (129,))
SMALL_SHAPES = ((), (7,), (2, 3), (5,))  # below the 8 lanes of Eigen's float32 packet
WIDE_SHAPES = ((), (6, 19), (13,), (4, 2, 8))


class Slices(NamedTuple):
    """A sparse gradient: row `indices[i]` of the variable receives `values[i]`; indices may repeat."""

    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, ...]


Gradient = np.ndarray | Slices | None


def never(step: int, index: int) -> bool:
    return False


def now_and_then(step: int, index: int) -> bool:
    """Gradients that come and go; variable 0 lacks its first one, so that it is not the first variable with slots."""
    return (step + index) % 5 == 1


def late(step: int, index: int) -> bool:
    """The last but one variable appears at step 20, the last at step 9; variable 0 pauses from 30 to 40."""
    return (index == 2 and step < 20) or (index == 3 and step < 9) or (index == 0 and 30 <= step <= 40)


@dataclass(frozen=True)
class Case:
    """One recorded run. `dtype` "mixed" alternates float32 and float64 variables."""

    name: str
    optimizer: str
    config: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] = DENSE_SHAPES
    absent: Callable[[int, int], bool] = never  # (step from 1, variable index) -> its gradient is None
    twice: tuple[int, ...] = ()  # variables that appear again at the end of each call, with another gradient
    sparse: bool = False  # variables of rank >= 1 get Slices
    duplicates: bool = True  # sparse only: indices repeat
    grid: bool = False  # gradients are multiples of 1/16 in [-4, 4]: their sums of squares are exact in any order
    ulp: int = 0  # 0: every bit equal; otherwise a bound in ulps of the largest magnitude in the array
    dtype: str = "float32"
    steps: int = 52
    snapshots: tuple[int, ...] = (1, 2, 10, 52)


def variable_dtype(case: Case, index: int) -> np.dtype:
    return np.dtype(("float32", "float64")[index % 2] if case.dtype == "mixed" else case.dtype)


def initial(case: Case) -> list[np.ndarray]:
    """The variables before the first step."""
    random = _random(case, "variables")
    values = [2 * random.random_sample(shape) - 1 for shape in case.shapes]
    return [np.asarray(value, variable_dtype(case, index)) for index, value in enumerate(values)]


def steps(case: Case) -> Iterator[list[tuple[Gradient, int]]]:
    """For every step the pairs of one `apply_gradients` call: (gradient, index of its variable)."""
    random = _random(case, "gradients")
    order = (*range(len(case.shapes)), *case.twice)
    for step in range(1, case.steps + 1):
        drawn = [(_gradient(case, random, index), index) for index in order]
        yield [(None if case.absent(step, index) else gradient, index) for gradient, index in drawn]


def checksum(case: Case) -> int:
    """Fails a test on its inputs first, should they ever be drawn differently."""
    total = 0
    for array in (*initial(case), *(part for pairs in steps(case) for gradient, _ in pairs for part in _parts(gradient))):
        total = zlib.crc32(array.tobytes(), total)
    return total


def path(optimizer: str) -> Path:
    return FOLDER / f"{optimizer.lower()}.npz"


def _random(case: Case, purpose: str) -> np.random.RandomState:
    """Seeded by name, so that cases can be added or moved; both dtypes of a case share one stream."""
    return np.random.RandomState(zlib.crc32(f"{case.name.split('-')[0]} {purpose}".encode()))


def _parts(gradient: Gradient) -> tuple[np.ndarray, ...]:
    if gradient is None:
        return ()
    return (gradient.indices, gradient.values) if isinstance(gradient, Slices) else (gradient,)


def _gradient(case: Case, random: np.random.RandomState, index: int) -> np.ndarray | Slices:
    shape, dtype = case.shapes[index], variable_dtype(case, index)
    if not case.sparse or not shape:
        return _values(case, random, shape).astype(dtype)
    count = int(random.randint(0, shape[0] + 1, dtype=np.int64))  # 0 rows happen too
    if case.duplicates:
        indices = random.randint(0, shape[0], count, dtype=np.int64)
    else:
        indices = random.permutation(shape[0])[:count].astype(np.int64)
    return Slices(indices, _values(case, random, (count, *shape[1:])).astype(dtype), shape)


def _values(case: Case, random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Five decades, 1/16 exact zeros; or the grid."""
    fraction, exponent = random.random_sample(shape), random.randint(-13, 4, shape, dtype=np.int64)
    zero = random.random_sample(shape) < 1 / 16
    values = np.rint(128 * fraction - 64) / 16 if case.grid else np.ldexp(2 * fraction - 1, exponent)
    return np.where(zero, 0.0, values)
