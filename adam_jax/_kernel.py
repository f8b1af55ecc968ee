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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from adam_jax._equations import TYPES, Equation, Value

LARGE = 4096  # elements; for less a kernel of its own is not worth its start
BACKENDS = {"cuda": "triton", "tpu": "tpu"}  # the modules of Pallas
DTYPES = {"float32", "bfloat16", "int32", "uint32", "int16", "uint16", "int8", "uint8", "bool"}


class Leaf:
    """A large leaf: its equations, its arrays, and its kernel.

    An array of the leaf has one element for each of the leaf's, or one for `grain` of them along
    the axis of the blocks: the scales of blocks, codes packed into bytes.
    """

    def __init__(self, program: Any, value: Value, body: list[Equation]):
        self.program, self.gradient, self.shape, self.body = program, value, value.shape, body
        self.axis = max(len(value.shape) - 2, 0)
        self.grains: dict[Value, int] = {}
        for equation in body:
            if not equation.elementwise and not equation.own:
                equation.refuse()
            if equation.grained:
                grained, grain = equation.grained
                if self.grains.setdefault(program.alike.root(grained), grain) != grain:
                    equation.refuse()
        made = {v for equation in body for v in equation.outputs}
        used = {v: None for e in body for v in e.inputs if isinstance(v, Value) and v not in made}
        self.scalars = [v for v in used if v in program.uniform]
        self.reads = [v for v in used if v not in program.uniform]
        self.writes = [v for v in dict.fromkeys(program.outputs) if v in made]
        for equation in body:
            for v in program.arrays(equation):
                if v.shape != self.cut(v, self.shape) or any(map(np.ndim, equation.inputs)):
                    equation.refuse()

    def grain(self, value: Value) -> int:
        return self.grains.get(self.program.alike.root(value), 1)

    def cut(self, value: Value, lengths: Sequence[int]) -> tuple[int, ...]:
        """The shape of a value where the leaf has this shape."""
        grain = self.grain(value)
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

    def call(
        self,
        tile: tuple[int, ...],
        platform: str,
        interpret: bool,
        scalars: Sequence[Any],
        arrays: Sequence[Any],
        corner: Any = None,
    ) -> tuple[Any, ...]:
        """What the kernel makes of the arrays of the leaf, or of a shard that lies at `corner`."""
        backend = importlib.import_module(f"jax.experimental.pallas.{BACKENDS[platform]}")
        operands = [
            jnp.reshape(x.astype(np.int32) if x.dtype == bool else x, (1,)) for x in scalars
        ]
        operands += [] if corner is None else [corner]
        if platform == "tpu":
            number = pl.BlockSpec(memory_space=backend.SMEM)
            parameters = backend.CompilerParams(dimension_semantics=("parallel",) * len(tile))
        else:
            number, parameters = pl.BlockSpec(), backend.CompilerParams(num_warps=8)
        lengths = next(
            x.shape for v, x in zip(self.reads, arrays, strict=True) if v.shape == self.shape
        )

        def block(value):
            shape = self.cut(value, tile)
            squeezed = (None,) * max(len(shape) - 2, 0)
            return pl.BlockSpec((*squeezed, *shape[-2:]), lambda *place: place)

        def kernel(*refs):
            place = Place(self, lengths, tile, refs[len(scalars)] if corner is not None else None)
            # Triton reads and writes beyond the leaf if it is not told where the leaf ends.
            mask = place.inside if platform == "cuda" else lambda value: None
            known: dict[Value, Any] = {}
            for value, ref in zip(self.scalars, refs, strict=False):
                known[value] = ref[0]
            refs = refs[len(operands) :]
            for value, ref in zip(self.reads, refs, strict=False):
                zero = jnp.zeros((), value.dtype)
                known[value] = (
                    ref[...]
                    if mask(value) is None
                    else backend.load(ref, mask=mask(value), other=zero)
                )
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
                if mask(value) is None:
                    ref[...] = known[value]
                else:
                    backend.store(ref, known[value], mask=mask(value))

        aliases = {}
        for number_of_output, value in enumerate(self.writes):
            # The results of a step replace its first inputs, one by one.
            old = self.program.inputs[self.program.outputs.index(value)]
            if old in self.reads and (old.shape, old.dtype) == (value.shape, value.dtype):
                aliases[len(operands) + self.reads.index(old)] = number_of_output
        varying = {
            key: getattr(jax.typeof(arrays[0]), key)
            for key in ("vma", "manual_axis_type")  # of jax 0.7 and of jax 0.10
            if key in inspect.signature(jax.ShapeDtypeStruct).parameters
        }
        call = pl.pallas_call(
            kernel,
            grid=tuple(-(-n // t) for n, t in zip(lengths, tile, strict=True)),
            in_specs=[number] * len(operands) + [block(v) for v in self.reads],
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

    def __init__(self, leaf: Leaf, lengths: Sequence[int], tile: Sequence[int], corner: Any):
        self.leaf, self.lengths, self.tile, self.corner = leaf, lengths, tile, corner
        self.number = [pl.program_id(a) for a in range(len(tile))]
        self.axis = leaf.axis - max(len(tile) - 2, 0)

    def inside(self, value: Value) -> Any:
        """Which elements of an array lie in the leaf, None for all."""
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
        return jnp.sum(codes << self.shifts(codes.shape), self.axis + 1).astype(jnp.uint8)

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
    if equation.primitive.name in TYPES:
        return values[0]
    if equation.primitive.name == "round":  # Triton has none; half of an odd number goes up
        (x,) = values
        down = jnp.floor(x)
        odd = down - 2 * jnp.floor(down * 0.5) == 1
        new = down + ((x - down > 0.5) | ((x - down == 0.5) & odd)).astype(x.dtype)
        return jnp.where(new == 0, x * 0, new)  # which keeps the sign of a zero
    if equation.primitive.name == "sign":  # Mosaic asks for the TPU, which an export does not have
        (x,) = values
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
