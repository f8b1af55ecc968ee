"""Operations on blocks along an axis of a leaf, each with a second form for a tile of the leaf.

A chain in a kernel sees one tile. Elementwise equations hold there as they are. The operations of
this file do not, so each is one equation of its own, whose form for a tile stands beside the form
for a leaf. That form speaks of one element and where it is in its block, so it serves a kernel that
has all rows of a tile at once and one that goes through them one by one:

    row_positions       the index of the first element in every element's row
    column_positions    the index of every element in its row
    largest             the largest magnitude of every block
    spread              one number per block, repeated for each of its elements
    packed, unpacked    codes of a few bits, several to a byte

Sharded leaves: JAX refuses to split a sharded axis of an explicit mesh into blocks that cross the
shards, and on an automatic mesh XLA would gather the leaf for it. So `largest` reduces pieces of 8
inside each shard, and only those maxima are gathered where the blocks cross the shards.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax.fusion._jax import Primitive, ad, batching, mlir
from adam_jax.sharding import in_one_part, parts_of_axis, reshaped

PIECE = 8  # the rows of a TPU's tile
SHORTEST = 12  # elements of an axis: blocks of fewer would be mostly scales

# --- Blocks of a leaf -----------------------------------------------------------------------------


def wide_axes(shape: tuple[int, ...]) -> list[int]:
    """The axes longer than 1; at least one."""
    return [axis for axis, length in enumerate(shape) if length > 1] or [0]


def block_axis(shape: tuple[int, ...]) -> int | None:
    """The axis that blocks lie along; None where all elements are one vector.

    Of the axes longer than 1 it is the second-to-last, of a vector the only one. Where that is
    short, blocks lie along the longest axis, and where all are short, along none.
    """
    axis = wide_axes(shape)[-2:][0]
    if shape and shape[axis] < SHORTEST:
        axis = shape.index(max(shape))
    return axis if shape and shape[axis] >= SHORTEST else None


def in_blocks(shape: Sequence[int], axis: int | None, block: int) -> tuple[int, ...]:
    """The shape of what has one element for each block of a leaf of this shape."""
    if axis is None and block > 1:
        return (-(-math.prod(shape) // block), *[1] * (len(shape) - 1))
    return tuple(-(-length // block) if a == axis else length for a, length in enumerate(shape))


# --- One equation with two forms ------------------------------------------------------------------


class TileOperation:
    """A function of an array as one equation: a JAX primitive.

    Arguments other than the array are the equation's parameters. `axis` and `block` say that a
    block of elements along an axis shares one element of the input or of the output. `axis` is what
    `block_axis` gives for the leaf, and `shape` is the shape of the leaf.

    Args:
      on_leaf: the function.
    """

    def __init__(self, on_leaf: Callable[..., Any]):
        names = list(inspect.signature(on_leaf).parameters)[1:]
        self.parameters = names
        # Unused inputs are kept for their sharding, which is that of the result.
        self.on_leaf = jax.jit(on_leaf, static_argnames=names, keep_unused=True)
        self.primitive = Primitive(f"adam_jax_{on_leaf.__name__}")
        self.primitive.def_impl(self.on_leaf)
        self.primitive.def_abstract_eval(self._type)
        lowering = mlir.lower_fun(self.on_leaf, multiple_results=False)
        mlir.register_lowering(self.primitive, lowering)
        batching.primitive_batchers[self.primitive] = self._batched
        ad.primitive_jvps[self.primitive] = self._jvp
        functools.update_wrapper(self, on_leaf)
        OPERATIONS[self.primitive] = self

    def __call__(self, x: jax.Array, *parameters: Any) -> jax.Array:
        return self.primitive.bind(x, **dict(zip(self.parameters, parameters, strict=True)))

    def _type(self, x: Any, **parameters: Any) -> Any:
        on_leaf = functools.partial(self.on_leaf, **parameters)
        return jax.make_jaxpr(on_leaf)(x).out_avals[0]

    def _batched(self, inputs: Any, axes: Any, **parameters: Any) -> tuple[Any, int]:
        on_leaf = functools.partial(self.on_leaf, **parameters)
        return jax.vmap(on_leaf, axes)(*inputs), 0

    def _jvp(self, primals: Any, tangents: Any, **parameters: Any) -> tuple[Any, Any]:
        on_leaf = functools.partial(self.on_leaf, **parameters)
        return jax.jvp(on_leaf, primals, tuple(map(ad.instantiate_zeros, tangents)))


class Reduction(TileOperation):
    """One element of the output for each block of the input.

    Attributes:
      each: `each(x, row, block)` is what an element contributes that is in row `row` of its block.
        Kernels have few operations on integers of fewer bits, so it is an int32, as `row` is.
      combine: of two contributions, and of more in any order.
      finish: the element of the output.
    """

    each: Callable[[Any, Any, int], Any]
    combine: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]

    def for_tile(self, each: Any, combine: Any, finish: Any) -> None:
        self.each, self.combine, self.finish = each, combine, finish


class Expansion(TileOperation):
    """One element of the input for each block of the output.

    Attributes:
      each: `each(x, row, block)` is the element in row `row` of the block that shares x, in the
        dtype of x, but as an int32 if both are integers.
    """

    each: Callable[[Any, Any, int], Any]

    def for_tile(self, each: Any) -> None:
        self.each = each


class Location(TileOperation):
    """A function of where an element is in the leaf.

    Attributes:
      at: `at(index, shape)`, of the index along each axis of the leaf and the leaf's shape.
    """

    at: Callable[[Sequence[Any], Sequence[int]], Any]

    def for_tile(self, at: Any) -> None:
        self.at = at


OPERATIONS: dict[Primitive, TileOperation] = {}

# --- The operations -------------------------------------------------------------------------------


@Location
def row_positions(like: jax.Array) -> jax.Array:
    """The index of the first element in the row of every element, in row-major order."""
    return _positions(like, range(like.ndim - 1))


@row_positions.for_tile
def _(index: Sequence[Any], shape: Sequence[int]) -> Any:
    first = jnp.zeros_like(index[-1], jnp.uint32)
    along = (i.astype(jnp.uint32) * _stride(shape, axis) for axis, i in enumerate(index[:-1]))
    return functools.reduce(jnp.add, along, first)


@Location
def column_positions(like: jax.Array) -> jax.Array:
    """The index of every element in its row, which is the last axis."""
    return _positions(like, range(like.ndim)[-1:])


@column_positions.for_tile
def _(index: Sequence[Any], shape: Sequence[int]) -> Any:
    return index[-1].astype(jnp.uint32)


def _positions(like: jax.Array, axes: Sequence[int]) -> jax.Array:
    """What these axes add to the index of every element, modulo 2**32."""
    # The zeros are sharded as `like` is. A sum of iotas alone would be replicated.
    position = jnp.zeros_like(like, jnp.uint32)
    for axis in axes:
        length = like.shape[axis]
        along = jax.lax.broadcasted_iota(jnp.uint32, (length,), 0) * _stride(like.shape, axis)
        position = position + along.reshape([-1 if a == axis else 1 for a in range(like.ndim)])
    return position


def _stride(shape: Sequence[int], axis: int) -> np.uint32:
    """The distance in row-major order from one element to the next along an axis."""
    return np.uint32(math.prod(shape[axis + 1 :]) % 2**32)


@Reduction
def largest(x: jax.Array, axis: int | None, block: int) -> jax.Array:
    """The largest magnitude of every block, in bfloat16, rounded up; NaN if a magnitude is NaN.

    The maximum is one of integers: the bits of magnitudes have the order of the magnitudes. XLA's
    CPU backend leaves a maximum of floats to a library, and for that writes the moment to memory in
    float32, which a storage is there to avoid. It fuses a maximum of integers. A maximum of 8 it
    unrolls and vectorizes, a longer one along this axis not.
    """
    x, axis = (as_vector(x), 0) if axis is None else (x, axis)
    bits = _magnitudes(x)
    rounded_up = lambda bits: ((bits + np.int32(0xFFFF)) >> 16).astype(jnp.int16)  # noqa: E731
    if x.shape[axis] <= block:
        bits = rounded_up(jnp.max(bits, axis, keepdims=True))
    elif block % PIECE:
        bits = jnp.max(split(rounded_up(bits), axis, block), axis + 1)
    else:
        bits = rounded_up(jnp.max(split(bits, axis, PIECE), axis + 1))
        pieces = split(bits, axis, block // PIECE)
        maxima = [jax.lax.index_in_dim(pieces, i, axis + 1, False) for i in range(block // PIECE)]
        bits = functools.reduce(jnp.maximum, maxima)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def _magnitudes(x: jax.Array) -> jax.Array:
    """The bits of the magnitudes; all NaNs have the same, which rounding up keeps a NaN."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    return jnp.minimum(bits, np.int32(0x7FC00000))


def _rounded_up(bits: jax.Array) -> jax.Array:
    bits = (bits + np.int32(0xFFFF)) & np.int32(-0x10000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


largest.for_tile(each=lambda x, row, block: _magnitudes(x), combine=jnp.maximum, finish=_rounded_up)


@Expansion
def spread(x: jax.Array, axis: int | None, block: int, shape: tuple[int, ...]) -> jax.Array:
    """One number per block, repeated for each of its elements."""
    if axis is None:
        return of_vector(repeated(x, 0, block, math.prod(shape)), shape)
    return repeated(x, axis, block, shape[axis])


spread.for_tile(each=lambda x, row, block: x)


@Reduction
def packed(codes: jax.Array, axis: int | None, block: int) -> jax.Array:
    """Blocks of neighbouring codes, one byte for each block: the first code in the lowest bits."""
    codes, axis = (as_vector(codes), 0) if axis is None else (codes, axis)
    shifted = split(codes, axis, block) << _shifts(codes.ndim, axis, block)
    return jax.lax.reduce(shifted, np.uint8(0), jax.lax.bitwise_or, [axis + 1])


packed.for_tile(
    each=lambda codes, row, block: codes.astype(jnp.int32) << row * np.int32(8 // block),
    combine=jnp.add,
    finish=lambda codes: codes.astype(jnp.uint8),
)


@Expansion
def unpacked(codes: jax.Array, axis: int | None, block: int, shape: tuple[int, ...]) -> jax.Array:
    """The codes of a leaf of this shape that `packed` has packed."""
    if axis is None:
        vector = (math.prod(shape), *[1] * (codes.ndim - 1))
        return of_vector(unpacked.on_leaf(codes, axis=0, block=block, shape=vector), shape)
    shifted = jnp.expand_dims(codes, axis + 1) >> _shifts(codes.ndim, axis, block)
    codes = merged(shifted & (2 ** (8 // block) - 1), axis)
    return jax.lax.slice_in_dim(codes, 0, shape[axis], axis=axis)


@unpacked.for_tile
def _(codes: Any, row: Any, block: int) -> Any:
    return (codes >> row * np.int32(8 // block)) & np.int32(2 ** (8 // block) - 1)


def _shifts(ndim: int, axis: int, block: int) -> np.ndarray:
    """How far each code of a byte is shifted, along an axis of its own."""
    shape = [-1 if a == axis + 1 else 1 for a in range(ndim + 1)]
    return np.arange(0, 8, 8 // block, dtype=np.uint8).reshape(shape)


# --- On leaves only -------------------------------------------------------------------------------


def mean(x: jax.Array, axis: int, block: int) -> jax.Array:
    """The mean of every block, which must divide the axis."""
    if block == 1:
        return x
    if block < x.shape[axis]:
        x = split(x, axis, block)
        return jnp.squeeze(mean(x, axis + 1, block), axis + 1)
    few = max(n for n in range(1, PIECE + 1) if block % n == 0)

    def of_complex(x):
        """As `largest`: XLA's CPU backend fuses a short sum if it is one of complex numbers."""
        pieces = split(x, axis, few)
        sums = jnp.sum(jax.lax.complex(pieces, jnp.zeros_like(pieces)), axis + 1).real
        return jnp.sum(sums, axis, keepdims=True) / block

    def plain(x):
        return jnp.mean(x, axis, keepdims=True)

    if (block // few) % parts_of_axis(x, axis):
        return plain(x)
    return jax.lax.platform_dependent(x, cpu=of_complex, default=plain)


def repeated(x: jax.Array, axis: int, block: int, length: int) -> jax.Array:
    """Every element of an axis `block` times, and of that the first `length`."""
    lengths = list(x.shape)
    if x.shape[axis] == 1:
        lengths[axis] = length
        return jnp.broadcast_to(x, lengths)
    lengths.insert(axis + 1, block)
    each = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), lengths)
    return jax.lax.slice_in_dim(merged(each, axis), 0, length, axis=axis)


def as_vector(x: jax.Array) -> jax.Array:
    """All elements along the first axis, the others of length 1; sharded as the first one is."""
    x = in_one_part(x, *range(1, x.ndim))
    return reshaped(x, (x.size, *[1] * (x.ndim - 1)), [0, *[None] * (x.ndim - 1)])


def of_vector(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The array that `as_vector` was made of."""
    x = in_one_part(x, 0) if shape[0] % parts_of_axis(x, 0) else x
    return reshaped(x, shape, [0, *[None] * (len(shape) - 1)])


def split(x: jax.Array, axis: int, block: int) -> jax.Array:
    """An axis as two: which block, and where in it. The last block is padded with zeros."""
    length = x.shape[axis]
    if length % block:
        x = in_one_part(x, axis)
        padding = [(0, -length % block if a == axis else 0) for a in range(x.ndim)]
        x = jnp.pad(x, padding)
    elif (length // block) % parts_of_axis(x, axis):
        x = in_one_part(x, axis)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    axes = [*range(axis + 1), None, *range(axis + 1, x.ndim)]
    return reshaped(x, (*before, x.shape[axis] // block, block, *after), axes)


def merged(x: jax.Array, axis: int) -> jax.Array:
    """The two axes that `split` made as one again, with the padding."""
    length = x.shape[axis] * x.shape[axis + 1]
    axes = [*range(axis + 1), *range(axis + 2, x.ndim)]
    return reshaped(x, (*x.shape[:axis], length, *x.shape[axis + 2 :]), axes)
