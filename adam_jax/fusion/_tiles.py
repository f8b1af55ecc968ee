"""Blocks along an axis of a leaf: the largest number of each, their means, one spread back.

On a mesh with explicit axes JAX refuses to cut a sharded axis into blocks that do not lie within
the shards, and on one with automatic axes XLA would gather the leaf for it. So the axis is cut
twice, first into short pieces that lie within the shards of most leaves, and only what is left of
those is gathered where the blocks do not fit.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax.sharding import in_one_part, parts_of_axis

PIECE = 8  # the rows of a TPU's tile


OWN = "adam_jax."


def own_equation(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of one array and some integers as one equation, which tells them in its name.

    A kernel sees a tile of the leaf and does in a way of its own what needs to know the place of an
    element (`_kernel.py`).
    """

    @functools.cache
    def with_integers(integers):
        def on_array(x):
            return fn(x, *integers)

        on_array.__name__ = " ".join([OWN + fn.__name__, *map(str, integers)])
        return jax.jit(on_array, keep_unused=True)  # its sharding is that of the result

    @functools.wraps(fn)
    def equation(x, *integers):
        return with_integers(integers)(x)

    return equation


@own_equation
def positions(like: jax.Array) -> jax.Array:
    """The number of every element of `like`, row by row, in 32 bits."""
    # The zeros are where `like` is: a sum of iotas alone would be made on every device in full.
    position = jnp.zeros_like(like, jnp.uint32)
    for axis, length in enumerate(like.shape):
        stride = jnp.uint32(math.prod(like.shape[axis + 1 :]) % 2**32)
        along = jax.lax.broadcasted_iota(jnp.uint32, (length,), 0) * stride
        position = position + along.reshape([-1 if a == axis else 1 for a in range(like.ndim)])
    return position


@own_equation
def largest(x: jax.Array, axis: int, block: int) -> jax.Array:
    """The largest magnitude of every block, in bfloat16, rounded up; not a number if one is not.

    XLA's CPU backend leaves a maximum of floats to a library, and for that writes the floats to
    memory: a moment in float32, which a storage is there to avoid. Of integers it compiles the
    maximum into the kernel that makes them, and as integers magnitudes have the same order. A
    maximum of 8 is unrolled and vectorized, a longer one along this axis is not.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    bits = jnp.minimum(bits, np.int32(0x7FC00000))  # one NaN, so that rounding up cannot pass it
    rounded_up = lambda bits: ((bits + np.int32(0xFFFF)) >> 16).astype(jnp.int16)  # noqa: E731
    if x.shape[axis] <= block:
        bits = rounded_up(jnp.max(bits, axis, keepdims=True))
    elif block % PIECE:
        bits = jnp.max(split(rounded_up(bits), axis, block), axis + 1)
    else:
        bits = rounded_up(jnp.max(split(bits, axis, PIECE), axis + 1))
        pieces = split(bits, axis, block // PIECE)
        each = [jax.lax.index_in_dim(pieces, i, axis + 1, False) for i in range(block // PIECE)]
        bits = functools.reduce(jnp.maximum, each)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


@own_equation
def spread(x: jax.Array, axis: int, block: int, length: int) -> jax.Array:
    """One number of every block for each of its elements."""
    lengths = list(x.shape)
    if x.shape[axis] == 1:
        lengths[axis] = length
        return jnp.broadcast_to(x, lengths)
    lengths.insert(axis + 1, block)
    repeated = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), lengths)
    whole = joined(repeated, axis)
    return jax.lax.slice_in_dim(whole, 0, length, axis=axis)


@own_equation
def packed(codes: jax.Array, axis: int, bits: int) -> jax.Array:
    """The codes of a few bits in bytes: neighbours along an axis, the first in the lowest bits."""
    pairs = split(codes, axis, 8 // bits) << _shifts(codes.ndim, axis, bits)
    return jax.lax.reduce(pairs, np.uint8(0), jax.lax.bitwise_or, [axis + 1])


@own_equation
def unpacked(codes: jax.Array, axis: int, bits: int, length: int) -> jax.Array:
    """What `packed` has packed, the first `length` codes of the axis."""
    pairs = (jnp.expand_dims(codes, axis + 1) >> _shifts(codes.ndim, axis, bits)) & (2**bits - 1)
    return jax.lax.slice_in_dim(joined(pairs, axis), 0, length, axis=axis)


def _shifts(ndim: int, axis: int, bits: int) -> np.ndarray:
    """How far each code of a byte is shifted, along an axis of its own."""
    shape = [-1 if a == axis + 1 else 1 for a in range(ndim + 1)]
    return np.arange(0, 8, bits, dtype=np.uint8).reshape(shape)


def mean(x: jax.Array, axis: int, block: int) -> jax.Array:
    """The mean of every block, which must divide the axis.

    Of complex numbers XLA's CPU backend compiles short sums into the kernel that makes them (see
    `largest`), so there the longest part of a sum is one of those.
    """
    if block == 1:
        return x
    if block < x.shape[axis]:
        x = split(x, axis, block)
        return jnp.squeeze(mean(x, axis + 1, block), axis + 1)
    few = max(n for n in range(1, PIECE + 1) if block % n == 0)

    def in_kernel(x):
        pieces = split(x, axis, few)
        sums = jnp.sum(jax.lax.complex(pieces, jnp.zeros_like(pieces)), axis + 1).real
        return jnp.sum(sums, axis, keepdims=True) / block

    plain = lambda x: jnp.mean(x, axis, keepdims=True)  # noqa: E731
    if (block // few) % parts_of_axis(x, axis):
        return plain(x)
    return jax.lax.platform_dependent(x, cpu=in_kernel, default=plain)


def split(x: jax.Array, axis: int, block: int) -> jax.Array:
    """An axis as two: which block, and where in it. The last block is filled up with zeros."""
    length = x.shape[axis]
    if length % block:
        x = in_one_part(x, axis)
        padding = [(0, -length % block if a == axis else 0) for a in range(x.ndim)]
        x = jnp.pad(x, padding)
    elif (length // block) % parts_of_axis(x, axis):
        x = in_one_part(x, axis)
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])


def joined(x: jax.Array, axis: int) -> jax.Array:
    """What `split` has split, with what it filled up."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
