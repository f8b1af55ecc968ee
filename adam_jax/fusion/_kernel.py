"""The kernel of a large leaf: the equations of its chain, on a tile.

They are elementwise but for a few of this package's own, which depend on where a tile lies
(`own_equation`): those `Place` computes in a way of its own. The grid of the kernel has a place for
every tile; equations between scalars were computed before and are handed in.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from adam_jax.fusion._graph import TYPES, Equation, Value

LARGE = 4096  # elements; for less a kernel of its own is not worth its start
BACKENDS = {"cuda": "triton", "tpu": "tpu"}  # the modules of Pallas


@dataclass(frozen=True, eq=False)
class Leaf:
    """A large leaf and its kernel.

    Attributes:
      shape: the shape of the leaf.
      gradient: its gradient.
      body: its equations.
      scalars: what they need of scalars; an array of equal elements is one, too.
      reads: the arrays that they need.
      writes: the arrays that they make.
      replaces: what is read, for what is written in its place.
      grains: for arrays that have one element for several along the axis of the blocks (the scales
        of blocks, codes packed into bytes), for how many.
    """

    shape: tuple[int, ...]
    gradient: Value
    body: list[Equation]
    scalars: list[Value]
    reads: list[Value]
    writes: list[Value]
    replaces: dict[Value, Value]
    grains: dict[Value, int]

    @property
    def axis(self) -> int:
        """The axis of the blocks."""
        return max(len(self.shape) - 2, 0)

    def cut(self, value: Value, lengths: Sequence[int]) -> tuple[int, ...]:
        """The shape of a value where the leaf has this shape."""
        grain = self.grains.get(value, 1)
        return tuple(-(-n // grain) if a == self.axis else n for a, n in enumerate(lengths))

    def tile(self, platform: str, lengths: Sequence[int] = ()) -> tuple[int, ...] | None:
        """The shape of a tile, None where XLA does better or blocks do not fit."""
        lengths = tuple(lengths) or self.shape
        *_, columns = lengths
        grain = max(self.grains.values(), default=1)
        if grain & (grain - 1) or grain > 512 or math.prod(lengths) >= 2**31:
            return None
        if platform == "cuda":  # Triton wants powers of two
            if len(lengths) == 1:
                return (LARGE,)
            width = min(_power_of_two(columns), 128)
            height = max(min(_power_of_two(lengths[-2]), LARGE // width), grain)
        else:  # Mosaic wants multiples of (8, 128) or whole axes, of every array
            if len(lengths) == 1:
                return None
            # XLA lays a matrix out by columns where that leaves less of the last tiles empty, and
            # would have to copy it for a kernel.
            by_rows, by_columns = (
                -(-a // 8) * 8 * -(-b // 128) * 128 for a, b in (lengths[-2:], lengths[:-3:-1])
            )
            if by_rows > by_columns or math.prod(lengths[-2:]) < LARGE:
                return None
            height = max(256, 8 * grain)
            width = min(columns, max(128, 2**16 // height))  # Mosaic unrolls a tile
        return (*(1 for _ in self.shape[:-2]), height, width)

    def call(self, tile, platform, interpret, scalars, arrays, corner=None) -> tuple[Any, ...]:
        """What the kernel makes of the arrays of the leaf, or of a shard that lies at `corner`."""
        backend = importlib.import_module(f"jax.experimental.pallas.{BACKENDS[platform]}")
        operands = [
            jnp.reshape(x.astype(np.int32) if x.dtype == bool else x, (1,)) for x in scalars
        ]
        operands += [] if corner is None else [corner]
        if platform == "tpu":
            numbers = {"memory_space": backend.SMEM}
            parameters = backend.CompilerParams(dimension_semantics=("parallel",) * len(tile))
        else:
            numbers, parameters = {}, backend.CompilerParams(num_warps=8)
        lengths = next(
            x.shape for v, x in zip(self.reads, arrays, strict=True) if v.shape == self.shape
        )

        def block(value):
            shape = self.cut(value, tile)
            squeezed = (None,) * max(len(shape) - 2, 0)
            return pl.BlockSpec((*squeezed, *shape[-2:]), lambda *place: place)

        def kernel(*refs):
            place = Place(
                leaf=self,
                lengths=lengths,
                tile=tile,
                corner=None if corner is None else refs[len(scalars)],
                masked=platform == "cuda",
            )
            known: dict[Value, Any] = {}
            for value, ref in zip(self.scalars, refs, strict=False):
                known[value] = ref[0]
            refs = refs[len(operands) :]
            for value, ref in zip(self.reads, refs, strict=False):
                if (mask := place.inside(value)) is None:
                    known[value] = ref[...]
                else:
                    zero = jnp.zeros((), value.dtype)
                    known[value] = backend.load(ref, mask=mask, other=zero)
            for equation in self.body:
                values = [known[v] if isinstance(v, Value) else v for v in equation.inputs]
                (result,) = equation.outputs
                shape = self.cut(result, tile)[-2:]
                if equation.own:
                    known[result] = getattr(place, equation.own[0])(*values, shape)
                else:
                    values = [
                        x if np.ndim(x) else _full(x, value, shape)
                        for x, value in zip(values, equation.inputs, strict=True)
                    ]
                    known[result] = _elementwise(equation, values)
            for value, ref in zip(self.writes, refs[len(self.reads) :], strict=True):
                if (mask := place.inside(value)) is None:
                    ref[...] = known[value]
                else:
                    backend.store(ref, known[value], mask=mask)

        places = {old: len(operands) + n for n, old in enumerate(self.reads)}
        aliases = {
            places[self.replaces[new]]: n
            for n, new in enumerate(self.writes)
            if new in self.replaces
        }
        varying = {
            key: getattr(jax.typeof(arrays[0]), key)
            for key in ("vma", "manual_axis_type")  # of jax 0.7 and of jax 0.10
            if key in inspect.signature(jax.ShapeDtypeStruct).parameters
        }
        call = pl.pallas_call(
            kernel,
            grid=tuple(-(-n // t) for n, t in zip(lengths, tile, strict=True)),
            # Pallas's own place of a whole array has 64 bits under x64, which Mosaic lacks.
            in_specs=[
                *(pl.BlockSpec(x.shape, lambda *_: (np.int32(0),), **numbers) for x in operands),
                *(block(v) for v in self.reads),
            ],
            out_specs=[block(v) for v in self.writes],
            out_shape=[
                jax.ShapeDtypeStruct(self.cut(v, lengths), v.dtype, **varying) for v in self.writes
            ],
            input_output_aliases=aliases,
            interpret=interpret,
            compiler_params=parameters,
            name="adam_jax",
        )
        return tuple(call(*operands, *arrays))


class Place:
    """A tile while the kernel runs: where it lies, and the equations that depend on that.

    Each is the function of the same name, of an array of the tile and the shape of the result.
    Arrays have the last two axes of the tile, or its only one.
    """

    def __init__(self, leaf: Leaf, lengths: Any, tile: Any, corner: Any, masked: bool):
        self.leaf, self.lengths, self.tile, self.corner = leaf, lengths, tile, corner
        self.number, self.masked = [pl.program_id(a) for a in range(len(tile))], masked
        self.axis = leaf.axis - max(len(tile) - 2, 0)

    def inside(self, value: Value) -> Any:
        """Which elements of an array to load and store, None for all.

        Mosaic masks by itself; Triton reads and writes beyond the leaf if it is not told its end.
        """
        if not self.masked:
            return None
        shape, lengths = (self.leaf.cut(value, of) for of in (self.tile, self.lengths))
        shape, lengths, number = shape[-2:], lengths[-2:], self.number[-2:]
        masks = [
            number[a] * n + jax.lax.broadcasted_iota(jnp.int32, shape, a) < lengths[a]
            for a, n in enumerate(shape)
            if lengths[a] % n
        ]
        return functools.reduce(jnp.logical_and, masks) if masks else None

    def filled(self, x: Any) -> Any:
        """With zeros for what lies behind the last row of the leaf, as `_blocks.split` does."""
        rows, length = x.shape[self.axis], self.lengths[self.leaf.axis]
        if length % rows == 0:
            return x
        row = jax.lax.broadcasted_iota(jnp.int32, x.shape, self.axis)
        return jnp.where(self.number[self.leaf.axis] * rows + row < length, x, jnp.zeros_like(x))

    def positions(self, x: Any, shape: tuple[int, ...]) -> Any:
        position = jnp.zeros(shape, jnp.uint32)
        for a, n in enumerate(self.tile):
            along: Any = self.number[a] * n
            if self.corner is not None:
                along += self.corner[a]
            if (axis := a - len(self.tile) + len(shape)) >= 0:
                along += jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            stride = np.uint32(math.prod(self.leaf.shape[a + 1 :]) % 2**32)
            position += along.astype(jnp.uint32) * stride
        return position

    def largest(self, x: Any, shape: tuple[int, ...]) -> Any:
        bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
        bits = self.filled(jnp.minimum(bits, np.int32(0x7FC00000)))
        bits = jnp.max(self.split(bits, shape), self.axis + 1)
        bits = (bits + np.int32(0xFFFF)) & np.int32(-0x10000)
        return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)

    def spread(self, x: Any, shape: tuple[int, ...]) -> Any:
        return self.repeated(x, shape).reshape(shape)

    def packed(self, x: Any, shape: tuple[int, ...]) -> Any:
        codes = self.split(self.filled(x.astype(jnp.int32)), shape)
        codes = codes << self.shifts(codes.shape)
        return jnp.sum(codes, self.axis + 1, dtype=jnp.int32).astype(jnp.uint8)

    def unpacked(self, x: Any, shape: tuple[int, ...]) -> Any:
        codes = self.repeated(x.astype(jnp.int32), shape)
        bits = 8 // codes.shape[self.axis + 1]
        codes = (codes >> self.shifts(codes.shape)) & np.int32(2**bits - 1)
        return codes.reshape(shape).astype(jnp.uint8)

    def split(self, x: Any, shape: tuple[int, ...]) -> Any:
        """The axis of the blocks as two, the first as long as in `shape`."""
        return x.reshape(*shape[: self.axis + 1], -1, *shape[self.axis + 1 :])

    def repeated(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Each element along the axis of the blocks so often that they fill `shape`."""
        times = shape[self.axis] // x.shape[self.axis]
        lengths = (*x.shape[: self.axis + 1], times, *x.shape[self.axis + 1 :])
        return jnp.broadcast_to(jnp.expand_dims(x, self.axis + 1), lengths)

    def shifts(self, lengths: tuple[int, ...]) -> Any:
        bits = np.int32(8 // lengths[self.axis + 1])
        return jax.lax.broadcasted_iota(jnp.int32, lengths, self.axis + 1) * bits


def _elementwise(equation: Equation, values: list[Any]) -> Any:
    """An equation on a tile; what a backend lacks is made of what it has."""
    x, name = values[0], equation.primitive.name
    if name in TYPES:
        return x
    if name == "convert_element_type":  # Mosaic of jax 0.7 has no way from bytes to floats
        new = equation.params["new_dtype"]
        if any(jnp.issubdtype(d, jnp.integer) and d.itemsize < 4 for d in (x.dtype, new)):
            x = x.astype(jnp.int32)
        if x.dtype == jnp.uint32 and jnp.issubdtype(new, jnp.floating):  # nor from unsigned ones
            high, low = (
                (part.astype(jnp.int32)).astype(jnp.float32) for part in (x >> 16, x & 0xFFFF)
            )
            x = high * 65536 + low
        return x.astype(new)
    if name == "is_finite":  # Triton of jax 0.7 has none
        return jnp.abs(x.astype(jnp.float32)) < jnp.inf
    if name == "round":  # Triton has none; half of an odd number goes up
        down = jnp.floor(x)
        odd = down - 2 * jnp.floor(down * 0.5) == 1
        new = down + ((x - down > 0.5) | ((x - down == 0.5) & odd)).astype(x.dtype)
        return jnp.where(new == 0, x * 0, new)  # which keeps the sign of a zero
    if name == "sign":  # Mosaic asks for the TPU, which an export does not have
        return jnp.where(x > 0, jnp.ones_like(x), jnp.where(x < 0, -jnp.ones_like(x), x))
    return equation.primitive.bind(*values, **equation.params)


def _full(x: Any, value: Any, shape: tuple[int, ...]) -> Any:
    """An array of equal elements; a truth value is given as a number, since Mosaic spreads none."""
    if value.dtype == bool:
        return jnp.full(shape, x, jnp.int32) != 0
    return jnp.full(shape, x, value.dtype)


def _power_of_two(n: int) -> int:
    """The least one from n on."""
    return 1 << (n - 1).bit_length()
