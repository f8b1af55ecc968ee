"""The kernel of a large leaf: the equations of its chain, and what it reads and writes.

That is all there is to say for any backend. How a kernel is made of it for one backend is an
emitter's task: `_pallas_call.py` for TPUs and in Triton, `_mosaic_gpu.py` for NVIDIA's GPUs.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from adam_jax.fusion._graph import Equation, Value
from adam_jax.fusion._tiles import in_blocks, wide_axes


@dataclass(frozen=True, eq=False)
class Kernel:
    """The kernel of one leaf.

    Attributes:
      shape: the shape of the leaf.
      gradient: the gradient of the leaf.
      own: the equations between integer scalars that no other leaf needs.
      body: the equations between arrays.
      scalars: the scalars that the equations need; an array of equal elements counts as one.
      reads: the arrays that the equations need.
      writes: the arrays that they make.
      replaces: for an array that is written, the one that is read whose buffer it takes.
      axis: the axis that the blocks lie along; None where all elements are one vector.
      block_of: for every array, how many elements of the leaf along the axis of the blocks share
        one of its elements: 1, or more for scales and for codes packed into bytes.
    """

    shape: tuple[int, ...]
    gradient: Value
    own: list[Equation]
    body: list[Equation]
    scalars: list[Value]
    reads: list[Value]
    writes: list[Value]
    replaces: dict[Value, Value]
    axis: int | None
    block_of: dict[Value, int]

    @property
    def axes(self) -> list[int]:
        """The axes of the leaf that the kernel sees: those longer than 1."""
        return wide_axes(self.shape)

    @property
    def block(self) -> int:
        """The longest block, which the others divide."""
        return max(self.block_of.values(), default=1)

    @property
    def has_blocks_of_rows(self) -> bool:
        """Whether blocks are 1, 2, 4, … rows of the leaf as the kernel sees it."""
        of_rows = self.block == 1 or self.axis == self.axes[-2:][0]
        return of_rows and self.block & (self.block - 1) == 0

    @property
    def key(self) -> Hashable:
        """The same for kernels that compute the same: most leaves of a model are like another."""
        numbers: dict[Value, int] = {}

        def name(x: Any) -> Hashable:
            if isinstance(x, Value):
                return numbers.setdefault(x, len(numbers)), x.aval
            return str(x.dtype), x.shape, x.tobytes()

        return (
            self.shape,
            self.axis,
            tuple(map(name, (*self.scalars, *self.reads))),
            tuple(
                (e.primitive, *sorted(e.params.items()), *map(name, (*e.inputs, *e.outputs)))
                for e in (*self.own, *self.body)
            ),
            tuple((name(v), name(self.replaces.get(v, v))) for v in self.writes),
            tuple((number, self.block_of[v]) for v, number in numbers.items()),
        )

    def shape_of(self, value: Value, lengths: Sequence[int]) -> tuple[int, ...]:
        """The shape of an array where that of the leaf or of a shard of it is `lengths`."""
        return in_blocks(lengths, self.axis, self.block_of.get(value, 1))

    def seen(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of an array that the kernel sees: without the axes of length 1 of the leaf."""
        return tuple(shape[axis] for axis in self.axes)

    def part_of(self, value: Value, lengths: Sequence[int]) -> tuple[int, ...]:
        """The part of an array that a kernel sees, where it sees `lengths` of the leaf."""
        return in_blocks(lengths, max(len(lengths) - 2, 0), self.block_of.get(value, 1))

    def lengths(self, arrays: Sequence[Any]) -> tuple[int, ...]:
        """The shape of the leaf, or of the shard of it, that arrays for `reads` are of."""
        pairs = zip(self.reads, arrays, strict=True)
        return next(x.shape for v, x in pairs if v.shape == self.shape)


class Emitter(Protocol):
    """Makes kernels for one backend."""

    def tile_shape(self, kernel: Kernel, lengths: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of a tile; None where XLA does better or blocks do not fit.

        Args:
          kernel: a kernel.
          lengths: the shape of the leaf or of a shard of it.
        """

    def launch(
        self,
        kernel: Kernel,
        tile_shape: tuple[int, ...],
        scalars: Sequence[Any],
        arrays: Sequence[Any],
        offset: Any = None,
    ) -> tuple[Any, ...]:
        """What a kernel makes of the arrays of the leaf, or of the shard that begins at `offset`.

        Args:
          kernel: the kernel.
          tile_shape: what the method of this name gives.
          scalars: one for each of `kernel.scalars`.
          arrays: one for each of `kernel.reads`.
          offset: one int32 for each of `kernel.axes`; None for the whole leaf.

        Returns:
          One array for each of `kernel.writes`.
        """
        ...


def numbers(scalars: Sequence[Any]) -> list[Any]:
    """Scalars as a kernel takes them: arrays of one element, and no booleans."""
    return [jnp.reshape(x.astype(np.int32) if x.dtype == bool else x, (1,)) for x in scalars]


def as_array(x: Any, value: Any, shape: tuple[int, ...]) -> Any:
    """An array of equal elements for a scalar: Mosaic broadcasts numbers, but no booleans."""
    if np.ndim(x):
        return x
    if value.dtype == bool:
        return jnp.full(shape, x, jnp.int32) != 0
    return jnp.full(shape, x, value.dtype)


def widened(x: Any) -> Any:
    """Integers of fewer bits as int32."""
    return x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x


def tile_count(lengths: Sequence[int], tile_shape: Sequence[int]) -> tuple[int, ...]:
    """How many tiles there are along each axis."""
    return tuple(math.ceil(n / t) for n, t in zip(lengths, tile_shape, strict=True))
