"""Storages in codes of 8 or 4 bits, in blocks that share a scale."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from adam_jax._checks import check_count, check_integer
from adam_jax._random import uniform
from adam_jax.fusion._tiles import block_axis, in_blocks, largest, packed, spread, unpacked
from adam_jax.storage._protocol import Leaf, Storage


class Blocks(NamedTuple):
    """Moments as codes of 8 or 4 bits, in blocks along an axis: see `int8`.

    Attributes:
      codes: the elements. 8-bit codes have the shape of the leaf, int8 for a first moment and uint8
        for a second; of 4-bit codes two neighbours along the axis share a byte, a uint8.
      scales: one bfloat16 per block: the largest magnitude in the block, rounded up.
      whole: the moments of leaves that are not kept in codes, at least float32.
    """

    codes: Any
    scales: Any
    whole: Any = None


def int8(block: int = 32, seed: int = 0) -> Storage:
    r"""Keep a moment in 8 bits per element and 16 bits per block.

    The elements of a block share the scale :math:`s = \max |x|`. A code is the square root of an
    element over the scale, in equal steps:

    .. math:: m \approx s \operatorname{sign}(c) (c / 127)^2, \quad -127 \le c \le 127; \qquad
              v \approx s ((c + 1) / 256)^2, \quad 0 \le c \le 255

    So values near 0 are closest together, and a second moment is never 0. Codes are rounded up or
    down at random, so that they are unbiased: rounded to nearest, a second moment with
    :math:`b_2 = 0.999` stalls.

    Blocks lie along the second-to-last axis of a leaf (the only axis of a vector), not counting
    axes of length 1; the last block may be partial. If that axis is shorter than 12, blocks lie
    along the longest axis: for a patch embedding (16, 16, 3, 768) the last, for convolutions
    (512, 512, 3, 3) the first. If all axes are shorter than 12, the leaf is taken as one vector, in
    row-major order. So every leaf keeps less than 1.2 bytes per parameter (`int4` 0.7), and a
    placeholder of at most a 64th of its elements.

    On a mesh there is no communication if the axis of the blocks is not sharded, or if the shard's
    length is a multiple of `block`. Otherwise the codes stay sharded, the scales are replicated,
    and each step gathers the maxima of pieces of 8 elements. A leaf that is one vector is gathered,
    unless only its first axis is sharded.

    Leaves under 4,096 elements, and complex ones, are kept as they are computed. Rounding at random
    is noise: with :math:`b_2 = 0.999` an 8-bit v makes updates about 5 % longer after 6,000 steps,
    in the same direction (`examples/noise.py`). On a CPU the step takes about twice the time of one
    in float32 (`examples/memory.py`).

    A NaN affects its element only: that element of m stays NaN, as in float32. An infinite element
    of v makes the updates of its whole block 0; in float32, that of its element only.

    Args:
      block: the number of elements that share a scale. Default 32: 1.06 bytes per parameter.
      seed: an integer, the seed of the random bits. Default 0.

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
    division: cheap enough that XLA recomputes the moment where it is used, and does not write it to
    memory in float32.
    """
    return _in_blocks(8, check_count("block", block), check_integer("seed", seed))


def int4(block: int = 64, seed: int = 0) -> Storage:
    r"""Keep a moment in 4 bits per element and 16 bits per block.

    Like `int8`, whose help says which leaves and axes, with fewer codes:

    .. math:: m \approx s \operatorname{sign}(c) (c / 7)^2, \quad -7 \le c \le 7; \qquad
              v \approx s ((c + 1) / 16)^2, \quad 0 \le c \le 15

    Args:
      block: the number of elements that share a scale, an even number. Default 64: 0.53 bytes per
        parameter.
      seed: an integer, the seed of the random bits. Default 0.

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
    return _in_blocks(4, check_count("block", block, multiple_of=2), check_integer("seed", seed))


def _axis(leaf: Leaf, block: int) -> int | None:
    """The axis of the blocks: the one in the state, since the shape of a shard may say another."""
    own, scales = block_axis(leaf.shape), getattr(leaf.stored, "scales", None)
    if scales is not None:
        for axis in (own, *range(len(leaf.shape))):
            if in_blocks(leaf.shape, axis, block) == scales.shape:
                return axis
    return own


def _in_blocks(bits: int, block: int, seed: int) -> Storage:
    # A code stands for a level, the root of a moment over its scale in steps of 1 / levels:
    # level = code + lowest.
    half = 2 ** (bits - 1) - 1
    lowest = {"mu": 0 if bits == 8 else -half, "nu": 1}
    levels = {"mu": half, "nu": 2**bits}
    nan_level = -128 if bits == 8 else 8  # of a first moment: the code that no number needs
    dtype = {"mu": jnp.int8 if bits == 8 else jnp.uint8, "nu": jnp.uint8}

    def save(moment, leaf):
        axis, most = _axis(leaf, block), levels[leaf.moment]
        x = moment.astype(jnp.float32)
        # A NaN must not become the scale of its block, nor must an infinite first moment: both have
        # the code for NaN. A second moment has none, and its first moment tells of the NaN. An
        # infinite second moment does become the scale: then the updates of the block are 0.
        valid = jnp.abs(x) < jnp.inf if leaf.moment == "mu" else x == x
        x = jnp.where(valid, x, 0)
        scales = largest(x, axis, block)
        inverse = 1 / jnp.where(scales == 0, 1, scales).astype(jnp.float32)
        square = jnp.abs(x) * spread(inverse, axis, block, leaf.shape)
        # Up with the probability (square * most**2 - below**2) / ((below + 1)**2 - below**2), which
        # makes the mean of what is loaded the moment.
        below = jnp.floor(jnp.sqrt(square) * most)
        draw = uniform(leaf.random_bits(seed, x))
        up = draw * (2 * below + 1) < square * most**2 - below * below
        level = jnp.minimum(below + up.astype(jnp.float32), most)
        if leaf.moment == "mu":
            level = jnp.where(valid, jnp.sign(x) * level, nan_level)
        else:
            level = jnp.where(valid, jnp.maximum(level, 1), most)
        codes = (level - lowest[leaf.moment]).astype(dtype[leaf.moment])
        return Blocks(codes if bits == 8 else packed(codes, axis, 8 // bits), scales)

    def load(stored, leaf):
        axis, codes = _axis(leaf, block), stored.codes
        if bits < 8:
            codes = unpacked(codes, axis, 8 // bits, leaf.shape)
        level = codes.astype(jnp.float32) + lowest[leaf.moment]
        if leaf.moment == "mu":
            level = jnp.where(level == nan_level, jnp.nan, level)
        root = level * (1 / levels[leaf.moment])
        scales = stored.scales.astype(jnp.float32)
        return jnp.abs(root) * root * spread(scales, axis, block, leaf.shape)

    return Storage(save, load, parts=Blocks)
