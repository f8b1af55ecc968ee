"""Storages in codes of 8 or 4 bits, in blocks that share a scale."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from adam_jax._checks import check_count, check_seed
from adam_jax._random import uniform
from adam_jax.fusion import _tiles
from adam_jax.storage._protocol import Storage


class Blocks(NamedTuple):
    """Moments in codes of few bits, in blocks along the second-to-last axis.

    Attributes:
      codes: the elements: in 8 bits of the shape of the leaf, in 4 bits two neighbours a byte.
      scales: one bfloat16 a block, the largest magnitude in it, rounded up.
      whole: the leaves that are not kept in codes.
    """

    codes: Any
    scales: Any
    whole: Any = None


def int8(block: int = 32, seed: int = 0) -> Storage:
    r"""Keep a moment in 8 bits an element and 16 bits a block.

    The elements of a block share the scale :math:`s = \max |x|`, and a code counts the steps of the
    root:

    .. math:: m \approx s \operatorname{sign}(c) (c / 127)^2, \quad -127 \le c \le 127; \qquad
              v \approx s ((c + 1) / 256)^2, \quad 0 \le c \le 255

    fine near 0, and never 0 for a second moment. Codes are rounded up or down at random, so that
    they are unbiased: rounded to nearest, a second moment with :math:`b_2 = 0.999` stalls.

    Blocks lie along the second-to-last axis of a leaf (the only axis of a vector); the last block
    may be a partial one. On a mesh they cost no communication where that axis is not sharded, or
    where its part on one device is a multiple of `block`. Otherwise the codes stay sharded, the
    scales are on every device, and each step gathers the maxima of 8 elements.

    After a gradient that is not finite, an element of m stays not a number, as in float32, and its
    neighbours are what they were. A square that overflows stops its block, as it stops its element
    in float32.

    Args:
      block: the number of elements that share a scale. Default 32, which makes 1.06 bytes a
        parameter.
      seed: an integer that starts the random bits. Default 0.

    Returns:
      A `Storage` for either moment; it keeps `Blocks`.

    Raises:
      ValueError: if `block` is not positive.
      TypeError: if `block` or `seed` is not an integer.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> eight = adam_jax.storage.int8()
      >>> tx = adam_jax.adam(1e-3, mu_storage=eight, nu_storage=eight)
      >>> codes, scales, _ = tx.init(jnp.zeros((64, 64)))[0].nu
      >>> print(codes.dtype, codes.shape, scales.dtype, scales.shape)
      uint8 (64, 64) bfloat16 (2, 64)

    Source: after FlashOptim (arXiv 2602.23349), section 3.2, which maps the first moment by
    :math:`2x / (1 + |x|)` and rounds to nearest. A root is as precise, and its inverse needs no
    division, so that XLA computes it wherever it is used instead of keeping it in float32.
    """
    return _in_blocks(8, check_count("block", block), check_seed(seed))


def int4(block: int = 64, seed: int = 0) -> Storage:
    r"""Keep a moment in 4 bits an element and 16 bits a block.

    As `int8` with fewer codes:

    .. math:: m \approx s \operatorname{sign}(c) (c / 7)^2, \quad -7 \le c \le 7; \qquad
              v \approx s ((c + 1) / 16)^2, \quad 0 \le c \le 15

    Args:
      block: the number of elements that share a scale, even. Default 64, which makes 0.53 bytes a
        parameter.
      seed: an integer that starts the random bits. Default 0.

    Returns:
      A `Storage` for either moment; it keeps `Blocks`.

    Raises:
      ValueError: if `block` is not positive and even.
      TypeError: if `block` or `seed` is not an integer.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> four = adam_jax.storage.int4()
      >>> tx = adam_jax.adam(1e-3, mu_storage=four, nu_storage=four)
      >>> codes, scales, _ = tx.init(jnp.zeros((64, 64)))[0].nu
      >>> print(codes.dtype, codes.shape, scales.dtype, scales.shape)
      uint8 (32, 64) bfloat16 (1, 64)

    Source: after Li, Chen and Zhu, "Memory Efficient Optimizers with 4-bit States" (arXiv
    2309.01507), section 4: a map without zero for the second moment.
    """
    return _in_blocks(4, check_count("block", block, multiple_of=2), check_seed(seed))


def _in_blocks(bits: int, block: int, seed: int) -> Storage:
    # The root of a moment over its scale is (code + first) / top.
    half = 2 ** (bits - 1) - 1
    first = {"mu": 0 if bits == 8 else -half, "nu": 1}
    top = {"mu": half, "nu": 2**bits}
    not_a_number = -128 if bits == 8 else 8  # the root whose code no first moment needs
    dtype = {"mu": jnp.int8 if bits == 8 else jnp.uint8, "nu": jnp.uint8}

    def save(moment, leaf):
        axis, most = axis_of(leaf), top[leaf.moment]
        x = moment.astype(jnp.float32)
        # What is not a number must not become the scale of its neighbours. A first moment keeps it
        # in a code of its own; of a second moment, whose first is not a number either, it is not
        # kept. An infinite square stays the largest of its block.
        valid = jnp.abs(x) < jnp.inf if leaf.moment == "mu" else x == x
        x = jnp.where(valid, x, 0)
        scales = _tiles.largest(x, axis, block)
        inverse = 1 / jnp.where(scales == 0, 1, scales).astype(jnp.float32)
        square = jnp.abs(x) * _tiles.spread(inverse, axis, block, leaf.shape[axis])
        below = jnp.floor(jnp.sqrt(square) * most)
        draw = uniform(leaf.random_bits(seed, x))
        above = draw * (2 * below + 1) < square * most**2 - below * below
        root = jnp.minimum(below + above.astype(jnp.float32), most)
        if leaf.moment == "mu":
            root = jnp.where(valid, jnp.sign(x) * root, not_a_number)
        else:
            root = jnp.where(valid, jnp.maximum(root, 1), most)
        codes = (root - first[leaf.moment]).astype(dtype[leaf.moment])
        return Blocks(codes if bits == 8 else _tiles.packed(codes, axis, 8 // bits), scales)

    def load(stored, leaf):
        axis, codes = axis_of(leaf), stored.codes
        if bits < 8:
            codes = _tiles.unpacked(codes, axis, 8 // bits, leaf.shape[axis])
        root = codes.astype(jnp.float32) + first[leaf.moment]
        if leaf.moment == "mu":
            root = jnp.where(root == not_a_number, jnp.nan, root)
        root = root * (1 / top[leaf.moment])
        scales = stored.scales.astype(jnp.float32)
        return jnp.abs(root) * root * _tiles.spread(scales, axis, block, leaf.shape[axis])

    def axis_of(leaf):
        return max(len(leaf.shape) - 2, 0)

    return Storage(save, load, parts=Blocks)
