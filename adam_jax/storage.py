"""How a moment is kept between two steps: every low-memory Adam is Adam with another storage.

A `Storage` is a pair of pure functions on one leaf, `save` and `load`. The step uses the moment
before it is saved; what is lost in between is what the storage is made of:

    cast            in another dtype, rounded to nearest
    stochastic      in another dtype, rounded up or down at random
    int8, int4      as codes of 8 or 4 bits in blocks that share a scale
    factored        the row and column means of the second moment (Adafactor)
    block_mean      one second moment per block (Adam-mini)
"""

import itertools
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax import signals

SMALL = 4096  # elements: below, a leaf saves nothing worth its rounding


@dataclass(frozen=True)
class Leaf:
    """Where a moment stands: what `save` and `load` may know besides its value.

    Attributes:
      moment: "mu" or "nu".
      path: the place in the tree of parameters, like "layers/0/kernel".
      shape: the shape of the parameter, and of the moment.
      dtype: the dtype the moment is computed in: at least float32, real for "nu".
      index: the number of the leaf in the tree.
      count: the number of steps taken so far, an int32 scalar.
    """

    moment: str
    path: str
    shape: tuple[int, ...]
    dtype: Any
    index: int
    count: Any = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def is_large(leaf: Leaf) -> bool:
    """Whether a leaf is worth another storage: real, and of at least 4,096 elements."""
    return leaf.size >= SMALL and jnp.issubdtype(leaf.dtype, jnp.floating)


class Storage(NamedTuple):
    r"""How the moments of a tree are kept, leaf by leaf.

    A moment starts as what `save` makes of its initial value. Randomness comes from the `Leaf` (see
    `random_bits`), so that a run can be repeated, on one device or on many.

    Attributes:
      save: `(moment, leaf) -> stored`: from an array of the leaf's shape and at least float32 to an
        array or a tree of arrays, of shapes and dtypes that only the leaf decides.
      load: `(stored, leaf) -> moment`: back to an array of the leaf's shape.
      fits: `(leaf) -> bool`: which leaves are kept this way; the others stay as they are computed.
        Default: the real ones of at least 4,096 elements.
      only: "mu" or "nu" for a storage that makes no sense for the other moment. Default None.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> from adam_jax.storage import Storage
      >>> half = Storage(
      ...     save=lambda moment, leaf: moment.astype(jnp.float16),
      ...     load=lambda stored, leaf: stored.astype(leaf.dtype),
      ... )
      >>> tx = adam_jax.adam(1e-3, mu_storage=half)
      >>> state = tx.init({"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)})
      >>> print(jax.tree.map(lambda moment: str(moment.dtype), state[0].mu))
      {'bias': 'float32', 'kernel': 'float16'}
    """

    save: Callable[[jax.Array, Leaf], Any]
    load: Callable[[Any, Leaf], jax.Array]
    fits: Callable[[Leaf], bool] = is_large
    only: str | None = None


# --- Other dtypes ---------------------------------------------------------------------------------


def cast(dtype: Any) -> Storage:
    r"""Keep a moment in another dtype, rounded to the nearest number.

    Careful with a second moment in bfloat16: with :math:`b_2 = 0.999` it changes by less than half
    a spacing in a step, so it stalls. `stochastic` does not.

    Args:
      dtype: a real floating-point dtype.

    Returns:
      A `Storage`.

    Raises:
      ValueError: if `dtype` is not a floating-point dtype.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> tx = adam_jax.adam(1e-3, mu_storage=adam_jax.storage.cast(jnp.bfloat16))
      >>> state = tx.init(jnp.zeros((64, 64)))
      >>> print(state[0].mu.dtype, state[0].nu.dtype)
      bfloat16 float32

    Source: Micikevicius et al., "Mixed Precision Training" (arXiv 1710.03740), section 3.
    """
    return in_dtype(signals.check_dtype("dtype", dtype, jnp.floating))._replace(fits=is_large)


def in_dtype(dtype: Any) -> Storage:
    """What `mu_dtype` and `nu_dtype` stand for: `cast` for all leaves, the small ones too."""
    return Storage(
        save=lambda moment, leaf: moment.astype(dtype),
        load=lambda stored, leaf: stored.astype(leaf.dtype),
        fits=lambda leaf: True,
    )


def stochastic(dtype: Any = jnp.bfloat16, seed: int = 0) -> Storage:
    r"""Keep a moment in another dtype, rounded up or down at random so that the mean is right.

    .. math:: E[\operatorname{load}(\operatorname{save}(x))] = x

    Args:
      dtype: a real floating-point dtype of fewer than 32 bits. Default bfloat16.
      seed: an integer that starts the random bits. Default 0.

    Returns:
      A `Storage`.

    Raises:
      ValueError: if `dtype` is not a floating-point dtype of fewer than 32 bits.
      TypeError: if `seed` is not an integer.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> tx = adam_jax.adam(1e-3, nu_storage=adam_jax.storage.stochastic())
      >>> state = tx.init(jnp.zeros((64, 64)))
      >>> _, state = tx.update(jnp.ones((64, 64)), state)
      >>> print(jnp.unique(state[0].nu).astype(float), state[0].nu.astype(float).mean())
      [0.000999451 0.00100708] 0.00100

    Source: Ozkara, Yu and Park, "Stochastic Rounding for LLM Training" (arXiv 2502.20566).
    """
    dtype = signals.check_dtype("dtype", dtype, jnp.floating)
    if jnp.finfo(dtype).bits >= 32:
        raise ValueError(f"dtype must have fewer than 32 bits, got {jnp.dtype(dtype)}: use cast.")
    check_seed(seed)

    def save(moment, leaf):
        return rounded_at_random(moment.astype(jnp.float32), dtype, random_bits(seed, leaf))

    return Storage(save, load=lambda stored, leaf: stored.astype(jnp.float32))


# --- Codes of few bits ----------------------------------------------------------------------------


class Blocks(NamedTuple):
    """A moment in codes of few bits, in blocks along the last axis.

    Attributes:
      codes: the elements: in 8 bits of the shape of the leaf, in 4 bits two neighbours a byte.
      scales: one bfloat16 a block, the largest magnitude in it, rounded up.
    """

    codes: jax.Array
    scales: jax.Array


def int8(group: int = 32, seed: int = 0) -> Storage:
    r"""Keep a moment in 8 bits an element and 16 bits a group.

    A group of neighbours along the last axis shares the scale :math:`s = \max |x|`, and a code
    counts the steps of the root:

    .. math:: m \approx s \operatorname{sign}(c) (c / 127)^2, \quad -127 \le c \le 127; \qquad
              v \approx s ((c + 1) / 256)^2, \quad 0 \le c \le 255

    fine near 0, and never 0 for a second moment. Codes are rounded up or down at random, so that
    the mean is right: rounded to nearest, a second moment with :math:`b_2 = 0.999` stalls.

    Args:
      group: the number of elements that share a scale; leaves whose last axis it does not divide
        stay as they are. Default 32, which makes 1.06 bytes a parameter.
      seed: an integer that starts the random bits. Default 0.

    Returns:
      A `Storage` for either moment; it keeps `Blocks`.

    Raises:
      ValueError: if `group` is not positive.
      TypeError: if `group` or `seed` is not an integer.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> eight = adam_jax.storage.int8()
      >>> tx = adam_jax.adam(1e-3, mu_storage=eight, nu_storage=eight)
      >>> nu = tx.init(jnp.zeros((64, 64)))[0].nu
      >>> print(nu.codes.dtype, nu.codes.shape, nu.scales.dtype, nu.scales.shape)
      uint8 (64, 64) bfloat16 (64, 2)

    Source: after FlashOptim (arXiv 2602.23349), section 3.2, which maps the first moment by
    :math:`2x / (1 + |x|)` and rounds to nearest. A root is as precise, and its inverse needs no
    division, so that XLA computes it wherever it is used instead of keeping it in float32.
    """
    return _in_blocks(8, "group", group, seed)


def int4(block: int = 64, seed: int = 0) -> Storage:
    r"""Keep a moment in 4 bits an element and 16 bits a block.

    As `int8` with fewer codes:

    .. math:: m \approx s \operatorname{sign}(c) (c / 7)^2, \quad -7 \le c \le 7; \qquad
              v \approx s ((c + 1) / 16)^2, \quad 0 \le c \le 15

    Args:
      block: the number of elements that share a scale, even; leaves whose last axis it does not
        divide stay as they are. Default 64, which makes 0.53 bytes a parameter.
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
      >>> nu = tx.init(jnp.zeros((64, 64)))[0].nu
      >>> print(nu.codes.dtype, nu.codes.shape, nu.scales.dtype, nu.scales.shape)
      uint8 (64, 32) bfloat16 (64, 1)

    Source: after Li, Chen and Zhu, "Memory Efficient Optimizers with 4-bit States" (arXiv
    2309.01507), section 4: a map without zero for the second moment.
    """
    return _in_blocks(4, "block", block, seed)


def _in_blocks(bits: int, name: str, length: int, seed: int) -> Storage:
    packed = 8 // bits  # codes a byte
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"{name} must be an integer, got {length!r}.")
    if length < 1 or length % packed:
        raise ValueError(f"{name} must be positive{' and even' * (packed > 1)}, got {length}.")
    check_seed(seed)
    # The root of a moment over its scale is (code + first) / top.
    half = 2 ** (bits - 1) - 1
    first = {"mu": 0 if bits == 8 else -half, "nu": 1}
    top = {"mu": half, "nu": 2**bits}
    dtype = {"mu": jnp.int8 if bits == 8 else jnp.uint8, "nu": jnp.uint8}

    def save(moment, leaf):
        most = top[leaf.moment]
        x = moment.astype(jnp.float32).reshape(*leaf.shape[:-1], -1, length // packed, packed)
        scales = rounded_up(_largest(x), jnp.bfloat16)
        inverse = 1 / jnp.where(scales == 0, 1, scales).astype(jnp.float32)
        square = jnp.abs(x) * inverse[..., None, None]
        below = jnp.floor(jnp.sqrt(square) * most)
        draw = uniform(random_bits(seed, leaf)).reshape(x.shape)
        above = draw * (2 * below + 1) < square * most**2 - below * below
        root = jnp.minimum(below + above.astype(jnp.float32), most)
        root = jnp.sign(x) * root if leaf.moment == "mu" else jnp.maximum(root, 1)
        codes = (root - first[leaf.moment]).astype(dtype[leaf.moment])
        if packed > 1:
            codes = jax.lax.reduce(
                codes << shifts(leaf), np.uint8(0), jax.lax.bitwise_or, [x.ndim - 1]
            )
        return Blocks(codes.reshape(*leaf.shape[:-1], -1), scales)

    def load(stored, leaf):
        codes = stored.codes.reshape(*leaf.shape[:-1], -1, length // packed, 1)
        if packed > 1:
            codes = (codes >> shifts(leaf)) & (2**bits - 1)
        root = (codes.astype(jnp.float32) + first[leaf.moment]) * (1 / top[leaf.moment])
        scales = stored.scales.astype(jnp.float32)[..., None, None]
        return (jnp.abs(root) * root * scales).reshape(leaf.shape)

    def shifts(leaf):
        """How far each code of a byte is shifted, along a last axis."""
        return np.arange(0, 8, bits, dtype=np.uint8).reshape((1,) * (len(leaf.shape) + 1) + (-1,))

    def fits(leaf):
        return is_large(leaf) and leaf.shape[-1] % length == 0

    return Storage(save, load, fits)


# --- Fewer numbers --------------------------------------------------------------------------------


class Factors(NamedTuple):
    """A second moment by its means along its two largest axes, which stay as axes of length 1.

    Attributes:
      rows: the means along the largest axis.
      columns: the means along the second largest.
    """

    rows: jax.Array
    columns: jax.Array


def factored() -> Storage:
    r"""Keep the row and column means of the second moment.

    .. math:: v_{ij} \approx R_i C_j / \operatorname{mean}(R)

    over the two largest axes. Saving is linear and forgets nothing that loading shows, so what is
    kept is Adafactor's estimate to the letter. The step sees the squares of its own gradient
    element by element; for Adafactor's own step, average them too (see `block_mean`).

    Returns:
      A `Storage` for `nu_storage`; it keeps `Factors` of leaves with at least two axes.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> tx = adam_jax.adam(1e-3, nu_storage=adam_jax.storage.factored())
      >>> nu = tx.init(jnp.zeros((64, 128)))[0].nu
      >>> print(nu.rows.shape, nu.columns.shape)
      (64, 1) (1, 128)

    Source: Shazeer and Stern, "Adafactor" (arXiv 1804.04235), section 3.
    """

    def largest_axes(shape):
        *_, second, largest = np.argsort(shape, kind="stable")
        return int(second), int(largest)

    def save(moment, leaf):
        second, largest = largest_axes(leaf.shape)
        return Factors(rows=_mean(moment, largest), columns=_mean(moment, second))

    def load(stored, leaf):
        second, _ = largest_axes(leaf.shape)
        mean = jnp.mean(stored.rows, axis=second, keepdims=True)
        return stored.rows * (1 / jnp.where(mean == 0, 1, mean)) * stored.columns

    def fits(leaf):
        return is_large(leaf) and sum(length > 1 for length in leaf.shape) > 1

    return Storage(save, load, fits, only="nu")


def transformer_blocks(path: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Adam-mini's blocks for the transformers of Flax, whose kernels end in the output axis.

    A block is a row of an embedding (one token), a head of a query or key kernel of shape
    (features, heads, length), one output of any other kernel.

    Args:
      path: the place in the tree of parameters, like "layers/0/attention/query/kernel".
      shape: the shape of the parameter.

    Returns:
      The shape of a block, or None for a parameter of fewer than two axes: not in blocks.

    Example:
      >>> transformer_blocks("layers/0/attention/query/kernel", (768, 12, 64))
      (768, 1, 64)
      >>> transformer_blocks("embed/embedding", (50257, 768))
      (1, 768)
      >>> transformer_blocks("layers/0/mlp/kernel", (768, 3072))
      (768, 1)

    Source: Zhang et al., "Adam-mini" (arXiv 2406.16793), algorithm 3.
    """
    if len(shape) < 2:
        return None
    if re.search(r"embed|\bw[tp]e\b", path):
        return (*(1 for _ in shape[:-1]), shape[-1])
    if re.search(r"\b(query|key)\b", path) and len(shape) == 3:
        return shape[0], 1, shape[2]
    return (*shape[:-1], 1)


def block_mean(
    blocks: Callable[[str, tuple[int, ...]], tuple[int, ...] | None] = transformer_blocks,
) -> Storage:
    r"""Keep one second moment a block, the mean of its elements.

    .. math:: v_{b,i} \approx \frac{1}{|b|} \sum_{j \in b} v_{b,j}

    What is kept is Adam-mini's moment to the letter. The step sees the squares of its own gradient
    element by element; for Adam-mini's own step let the rule average them too, as below.

    Args:
      blocks: a function from the path and the shape of a parameter to the shape of its blocks,
        which must divide it, or to None for a parameter that is kept whole. Default
        `transformer_blocks`.

    Returns:
      A `Storage` for `nu_storage`; it keeps an array with one element a block.

    Raises:
      TypeError: if `blocks` is not a function.
      ValueError: in `init`, if a block has not as many axes as the parameter.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> mini = adam_jax.storage.block_mean(lambda path, shape: (shape[0], 1))
      >>> tx = adam_jax.adam(1e-3, nu_storage=mini)
      >>> tx.init(jnp.zeros((64, 128)))[0].nu.shape
      (1, 128)
      >>> averaged = lambda grad, mu, nu, decay: jnp.broadcast_to(
      ...     jnp.mean(adam_jax.squared(grad, mu, nu, decay), axis=0, keepdims=True), nu.shape
      ... )
      >>> adam_mini = adam_jax.scale_by_moments(second_moment=averaged, nu_storage=mini)

    Source: Zhang et al., "Adam-mini" (arXiv 2406.16793), algorithm 1.
    """
    if not callable(blocks):
        raise TypeError(f"blocks must be a function of a path and a shape, got {blocks!r}.")

    def block_of(leaf):
        block = blocks(leaf.path, leaf.shape)
        if block is not None and len(block) != len(leaf.shape):
            raise ValueError(
                f"blocks({leaf.path!r}, {leaf.shape}) must be a shape of {len(leaf.shape)} axes, "
                f"got {block}."
            )
        return block

    def apart(leaf):
        """Every axis as two: which block, and where in it."""
        return [
            axis for n, b in zip(leaf.shape, block_of(leaf), strict=True) for axis in (n // b, b)
        ]

    def save(moment, leaf):
        mean = moment.reshape(apart(leaf))
        for axis in range(1, mean.ndim, 2):
            mean = _mean(mean, axis) if mean.shape[axis] > 1 else mean
        return mean.reshape(apart(leaf)[::2])

    def load(stored, leaf):
        lengths = apart(leaf)
        which = [n if axis % 2 == 0 else 1 for axis, n in enumerate(lengths)]
        return jnp.broadcast_to(stored.reshape(which), lengths).reshape(leaf.shape)

    def fits(leaf):
        block = block_of(leaf) if is_large(leaf) else None
        return block is not None and all(
            b > 0 and n % b == 0 for n, b in zip(leaf.shape, block, strict=True)
        )

    return Storage(save, load, fits, only="nu")


# --- Reductions that stay inside a kernel ---------------------------------------------------------
#
# XLA's CPU backend leaves a sum or a maximum of floats to a library, and for that writes the floats
# to memory: a moment in float32, which a storage is there to avoid. Of other numbers, at most 32 at
# a time, it compiles the reduction into the kernel that makes them.


def _largest(x: jax.Array) -> jax.Array:
    """The largest magnitude along the last two axes; not a number if one is not."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)  # in the order of the magnitudes
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis=(-2, -1)), x.dtype)


def _mean(x: jax.Array, axis: int) -> jax.Array:
    """The mean along one axis, which stays with length 1."""
    length = x.shape[axis]
    few = max(n for n in range(1, 33) if length % n == 0)

    def in_kernel(x):
        pieces = x.reshape(*x.shape[:axis], length // few, few, *x.shape[axis + 1 :])
        sums = jnp.sum(jax.lax.complex(pieces, jnp.zeros_like(pieces)), axis + 1).real
        return jnp.sum(sums, axis, keepdims=True) / length

    plain = lambda x: jnp.mean(x, axis, keepdims=True)  # noqa: E731
    return jax.lax.platform_dependent(x, cpu=in_kernel, default=plain)


# --- Randomness and rounding ----------------------------------------------------------------------


def check_seed(seed: Any) -> None:
    """A seed is a Python integer."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}.")


def random_bits(seed: int, leaf: Leaf) -> jax.Array:
    """32 random bits for every element: a hash of the seed, the leaf, the step and the position.

    Each element makes its own, so a sharded leaf gets the bits of a whole one. (jax.random has that
    too, for the price of the whole step fifteen times over: threefry is made to withstand attacks.)
    """
    key = jnp.uint32(0)
    for part in (seed, zlib.crc32(leaf.moment.encode()), leaf.index, leaf.count):
        part = np.uint32(part % 2**32) if isinstance(part, int) else part.astype(jnp.uint32)
        key = _mixed(key + part + jnp.uint32(0x9E3779B9))  # 0 is mixed to 0, so not from there
    position = key
    for axis, stride in enumerate(_strides(leaf.shape)):
        along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        position = position + along * jnp.uint32(stride % 2**32)
    return _mixed(position)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit numbers in which every bit of the result depends on all of x.

    The constants are Wellons's "lowbias32" (nullprogram.com/blog/2018/07/31).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def uniform(bits: jax.Array) -> jax.Array:
    """Random numbers in [0, 1) of random bits: all multiples of 2**-24."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def rounded_up(x: jax.Array, dtype: Any) -> jax.Array:
    """The least number of the dtype that is not below the float32 `x`."""
    nearest = x.astype(dtype)
    above = jnp.nextafter(nearest, jnp.full_like(nearest, jnp.inf))
    return jnp.where(nearest.astype(jnp.float32) < x, above, nearest)


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


# --- Trees of moments -----------------------------------------------------------------------------


def chosen(moment: str, storage: Storage | None, dtype: Any | None = None) -> Storage:
    """The storage that the arguments `mu_storage` and `mu_dtype` ask for (or those of nu)."""
    if storage is None:
        return _plain if dtype is None else in_dtype(dtype)
    if dtype is not None:
        raise ValueError(
            f"{moment}_storage and {moment}_dtype both say how to keep the moment: give one."
        )
    if not isinstance(storage, Storage):
        raise TypeError(
            f"{moment}_storage must be a Storage, such as adam_jax.storage.int8(), got {storage!r}."
        )
    if storage.only not in (None, moment):
        raise ValueError(
            f"{moment}_storage got a storage that is for {storage.only} only: one mean for many "
            f"elements says nothing about the signs of a first moment."
        )
    return storage


_plain = Storage(lambda m, leaf: m, lambda s, leaf: s, fits=lambda leaf: False)


def leaves(moment: str, tree: optax.Params, count: Any = 0) -> Any:
    """The `Leaf` of every parameter or gradient of a tree."""
    index = itertools.count()

    def leaf(path, x):
        dtype = signals.accumulator(jnp.result_type(x))
        return Leaf(
            moment=moment,
            path=jax.tree_util.keystr(path, simple=True, separator="/"),
            shape=jnp.shape(x),
            dtype=signals.real(dtype) if moment == "nu" else dtype,
            index=next(index),
            count=count,
        )

    return jax.tree_util.tree_map_with_path(leaf, tree)


def initial(storage: Storage, params: optax.Params, at: Any, value: float = 0.0) -> Any:
    """What a state keeps before the first step."""

    def leaf(param, at):
        full = jnp.full_like(param, value, dtype=at.dtype)
        # Unless it is kept from knowing them, XLA works out the codes of constants in compilation.
        return storage.save(jax.lax.optimization_barrier(full), at) if storage.fits(at) else full

    return jax.tree.map(leaf, params, at)


def loaded(stage: str, storage: Storage, kept: Any | None, at: Any) -> Any:
    """The moments that a state keeps; an error if it was not made for these leaves."""
    if kept is None:
        return None

    def due(at):
        full = jax.ShapeDtypeStruct(at.shape, at.dtype)
        still = replace(at, count=0)
        return jax.eval_shape(lambda m: storage.save(m, still), full) if storage.fits(at) else full

    signals.check_match(stage, kept, jax.tree.map(due, at))
    return jax.tree.map(lambda a, s: storage.load(s, a) if storage.fits(a) else s, at, kept)


def saved(storage: Storage, moments: Any, kept: Any | None, at: Any) -> Any:
    """What a state keeps of new moments, in the dtypes it had: they never drift."""
    if kept is None:
        return None

    def leaf(at, new, old):
        new = storage.save(new, at) if storage.fits(at) else new
        return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)

    return jax.tree.map(leaf, at, moments, kept)
