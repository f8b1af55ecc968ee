"""Random bits, and rounding by hand: up to the next number of a dtype, or up or down at random."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax.fusion._tiles import positions


def random_bits(seed: int, name: str, index: int, count: Any, like: jax.Array) -> jax.Array:
    """32 random bits for every element of `like`, laid out on the devices as `like` is.

    They are a hash of the seed, the name of what is rounded, the leaf's index in its tree, the step
    and the element's position. Each element makes its own, so a sharded leaf gets the bits of a
    whole one. (jax.random has that too, for the price of the whole step fifteen times over:
    threefry is made to withstand attacks.)
    """
    key = 0
    for part in (seed, zlib.crc32(name.encode()), index, count):
        part = part % 2**32 if isinstance(part, int) else part.astype(jnp.uint32)
        key = _hash(_sum(key, part, 0x9E3779B9))  # 0 is hashed to 0, so not from there
    return _hash(positions(like) + jnp.asarray(key, jnp.uint32))


def _hash(x: Any) -> Any:
    """A permutation of the 32-bit numbers in which every bit of the result depends on all of x.

    Of a Python number it is one, so that what is known is not computed while tracing. The constants
    are Wellons's "lowbias32" (nullprogram.com/blog/2018/07/31).
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x ^ (x >> shift)
        x = x * factor % 2**32 if isinstance(x, int) else x * np.uint32(factor)
    return x ^ (x >> 16)


def _sum(*terms: Any) -> Any:
    """The sum of 32-bit numbers, without its carry."""
    known = sum(term for term in terms if isinstance(term, int)) % 2**32
    arrays = [term for term in terms if not isinstance(term, int)]
    return sum(arrays, start=jnp.uint32(known)) if arrays else known


def uniform(bits: jax.Array) -> jax.Array:
    """Random numbers in [0, 1) of random bits: all multiples of 2**-24."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def rounded_at_random(x: jax.Array, dtype: Any, bits: jax.Array) -> jax.Array:
    """One of the two numbers of the dtype around the float32 `x`, so that the mean is `x`.

    A carry out of the bits that are dropped leads to the next larger magnitude, and random bits
    added to them carry as often as they should.
    """
    info = jnp.finfo(dtype)
    dropped = np.uint32(2 ** (23 - info.nmant) - 1)
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((raw + (bits & dropped)) & ~dropped, jnp.float32)
    if info.nexp < 8:  # below its normal numbers the dtype is evenly spaced, float32 is not
        step = float(info.smallest_subnormal)
        even = jnp.floor(x / step + uniform(bits)) * step
        rounded = jnp.where(jnp.abs(x) < float(info.smallest_normal), even, rounded)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)
