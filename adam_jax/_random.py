"""Random bits for every element of an array, and stochastic rounding with them."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax.fusion._tiles import column_positions, row_positions
from adam_jax.sharding import varying_axes


def random_bits(seed: int, name: str, index: int, count: Any, like: jax.Array) -> jax.Array:
    """32 random bits for every element of `like`, sharded as `like` is.

    The bits are a hash of the seed, the name of what is rounded, the leaf's index in its tree, the
    step count and the element's position. Each element computes its own, so they do not depend on
    the sharding. (Those of jax.random do not either, but threefry is made to withstand attacks, and
    takes fifteen times as long as the whole step.) Inside `jax.shard_map` a position is that in the
    shard, and every shard has a key of its own.
    """
    key = 0
    shard = [jax.lax.axis_index(axis) for axis in varying_axes(like)]
    for part in (seed, zlib.crc32(name.encode()), index, count, *shard):
        part = part % 2**32 if isinstance(part, int) else part.astype(jnp.uint32)
        key = _hash(_sum(key, part, 0x9E3779B9))  # a constant is added, because 0 is hashed to 0
    # The key is added to the rows first: XLA would compute these once for all leaves, and make one
    # kernel of all leaves that read them, for which the states of all must lie in memory at once.
    rows = row_positions(like) + jnp.asarray(key, jnp.uint32)
    return _hash(rows + column_positions(like))


def _hash(x: Any) -> Any:
    """A permutation of the 32-bit integers; every bit of the result depends on every bit of x.

    A Python integer gives a Python integer, so that what is known while tracing needs no equations.
    The constants are those of Wellons's "lowbias32" (nullprogram.com/blog/2018/07/31).
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x ^ (x >> shift)
        x = x * factor % 2**32 if isinstance(x, int) else x * np.uint32(factor)
    return x ^ (x >> 16)


def _sum(*terms: Any) -> Any:
    """The sum of integers modulo 2**32: a Python integer if all are."""
    known = sum(term for term in terms if isinstance(term, int)) % 2**32
    arrays = [term for term in terms if not isinstance(term, int)]
    return sum(arrays, start=jnp.uint32(known)) if arrays else known


def uniform(bits: jax.Array) -> jax.Array:
    """Random numbers in [0, 1), multiples of 2**-24, made of random bits."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def rounded_at_random(x: jax.Array, dtype: Any, bits: jax.Array) -> jax.Array:
    """The float32 `x` rounded up or down at random to a number of the dtype, with `x` as the mean.

    Random bits are added to the bits that the dtype drops. A carry out of those makes the next
    larger magnitude, with the probability that makes the result unbiased.
    """
    info = jnp.finfo(dtype)
    dropped = np.uint32(2 ** (23 - info.nmant) - 1)
    bits_of_x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    carried = (bits_of_x + (bits & dropped)) & ~dropped
    rounded = jax.lax.bitcast_convert_type(carried, jnp.float32)
    if info.nexp < 8:  # the subnormal numbers of the dtype, evenly spaced, are normal in float32
        spacing = float(info.smallest_subnormal)
        subnormal = jnp.floor(x / spacing + uniform(bits)) * spacing
        rounded = jnp.where(jnp.abs(x) < float(info.smallest_normal), subnormal, rounded)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)
