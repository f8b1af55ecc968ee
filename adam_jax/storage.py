"""How a moment is kept between two steps: every low-memory Adam is Adam with another storage.

A `Storage` is a pair of pure functions on one leaf, `save` and `load`. The step uses the moment
before it is saved; what is lost in between is what the storage is made of:

    cast            in another dtype, rounded to nearest
    stochastic      in another dtype, rounded up or down at random
    int8, int4      as codes of 8 or 4 bits in blocks that share a scale
    factored        the row and column means of the second moment (Adafactor)
    block_mean      one second moment per block (Adam-mini)
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax import _blocks
from adam_jax._bits import check_seed, random_bits, rounded_at_random, uniform
from adam_jax._numbers import check_count, check_dtype, is_complex
from adam_jax._tree import check_params, place

SMALL = 4096  # elements: below, a leaf saves nothing worth its rounding


@dataclass(frozen=True)
class Leaf:
    """The leaf that a moment belongs to: what `save` and `load` get beside the moment.

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

    def random_bits(self, seed: int, like: jax.Array) -> jax.Array:
        """32 random bits for every element of `like`, an array of the leaf's shape.

        A function of the seed, the moment, the leaf's index and the step, so that a run can be
        repeated, on one device or on many.
        """
        return random_bits(seed, self.moment, self.index, self.count, like)


def is_large(leaf: Leaf) -> bool:
    """Whether a leaf is worth another storage: real, and of at least 4,096 elements."""
    return leaf.size >= SMALL and jnp.issubdtype(leaf.dtype, jnp.floating)


class Storage(NamedTuple):
    r"""How the moments of a tree are kept, leaf by leaf.

    A moment starts as what `save` makes of its initial value. A storage that keeps several arrays
    of a moment names them: `parts` is a NamedTuple of them, and last of `whole`, for the leaves
    that do not fit. The state then holds one of it, of trees shaped like the parameters, each with
    None for a leaf that has no such part.

    Attributes:
      save: `(moment, leaf) -> stored`: from an array of the leaf's shape and at least float32 to an
        array, or to the `parts`, of shapes and dtypes that only the leaf decides. `leaf` is a
        `Leaf`.
      load: `(stored, leaf) -> moment`: back to an array of the leaf's shape.
      fits: `(leaf) -> bool`: which leaves are kept this way; the others stay as they are computed.
        Default: the real ones of at least 4,096 elements.
      only: "mu" or "nu" for a storage that makes no sense for the other moment. Default None.
      parts: a NamedTuple class whose last field is `whole`, with default None, where `save` makes
        several arrays of one moment. Default None: one array.

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
    parts: Any = None


# --- Other dtypes ---------------------------------------------------------------------------------


def cast(dtype: Any) -> Storage:
    r"""Keep a moment in another dtype, rounded to the nearest number: all leaves, small ones too.

    A dtype in the place of a storage means the same, and so does `mu_dtype`. Careful with a second
    moment in bfloat16: with :math:`b_2 = 0.999` it changes by less than half a spacing in a step,
    so it stalls. `stochastic` does not.

    Args:
      dtype: a floating-point dtype, for the first moment of complex parameters a complex one. One
        with less range than bfloat16 is for first moments only.

    Returns:
      A `Storage`.

    Raises:
      ValueError: if `dtype` is neither a floating-point nor a complex dtype.
      TypeError: in `init`, if a moment is complex and the dtype is not, or the reverse.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> tx = adam_jax.adam(1e-3, mu_storage=adam_jax.storage.cast(jnp.bfloat16))
      >>> state = tx.init(jnp.zeros((64, 64)))
      >>> print(state[0].mu.dtype, state[0].nu.dtype)
      bfloat16 float32

    Source: Micikevicius et al., "Mixed Precision Training" (arXiv 1710.03740), section 3.
    """
    dtype = check_dtype("dtype", dtype, jnp.inexact)

    def fits(leaf):
        if is_complex(leaf.dtype) != is_complex(dtype):
            raise TypeError(
                f"{leaf.moment} of the parameter at {leaf.path!r} is {leaf.dtype} and cannot be "
                f"kept in {dtype}: treat this parameter apart with optax.partition."
            )
        return True

    return Storage(
        save=lambda moment, leaf: moment.astype(dtype),
        load=lambda stored, leaf: stored.astype(leaf.dtype),
        fits=fits,
        only=_only(dtype),
    )


def _only(dtype: Any) -> str | None:
    """A second moment needs the range of float32, since it is a square: in less it underflows."""
    return "mu" if jnp.finfo(dtype).nexp < 8 else None


def stochastic(dtype: Any = jnp.bfloat16, seed: int = 0) -> Storage:
    r"""Keep a moment in another dtype, rounded up or down at random, so that it is unbiased.

    .. math:: E[\operatorname{load}(\operatorname{save}(x))] = x

    Args:
      dtype: a real floating-point dtype of fewer than 32 bits; one with less range than bfloat16 is
        for first moments only. Default bfloat16.
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
    dtype = check_dtype("dtype", dtype)
    if jnp.finfo(dtype).bits >= 32:
        raise ValueError(f"dtype must have fewer than 32 bits, got {dtype}: use cast.")
    seed = check_seed(seed)

    def save(moment, leaf):
        moment = moment.astype(jnp.float32)
        return rounded_at_random(moment, dtype, leaf.random_bits(seed, moment))

    return Storage(save, lambda stored, leaf: stored.astype(jnp.float32), only=_only(dtype))


# --- Codes of few bits ----------------------------------------------------------------------------


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
      >>> codes, scales, whole = tx.init(jnp.zeros((64, 64)))[0].nu
      >>> print(codes.dtype, codes.shape, scales.dtype, scales.shape, whole)
      uint8 (64, 64) bfloat16 (2, 64) None

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
      >>> codes, scales, whole = tx.init(jnp.zeros((64, 64)))[0].nu
      >>> print(codes.dtype, codes.shape, scales.dtype, scales.shape, whole)
      uint8 (32, 64) bfloat16 (1, 64) None

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
        scales = _blocks.largest(x, axis, block)
        inverse = 1 / jnp.where(scales == 0, 1, scales).astype(jnp.float32)
        square = jnp.abs(x) * _blocks.spread(inverse, axis, block, leaf.shape[axis])
        below = jnp.floor(jnp.sqrt(square) * most)
        draw = uniform(leaf.random_bits(seed, x))
        above = draw * (2 * below + 1) < square * most**2 - below * below
        root = jnp.minimum(below + above.astype(jnp.float32), most)
        if leaf.moment == "mu":
            root = jnp.where(valid, jnp.sign(x) * root, not_a_number)
        else:
            root = jnp.where(valid, jnp.maximum(root, 1), most)
        codes = (root - first[leaf.moment]).astype(dtype[leaf.moment])
        return Blocks(codes if bits == 8 else _blocks.packed(codes, axis, bits), scales)

    def load(stored, leaf):
        axis, codes = axis_of(leaf), stored.codes
        if bits < 8:
            codes = _blocks.unpacked(codes, axis, bits, leaf.shape[axis])
        root = codes.astype(jnp.float32) + first[leaf.moment]
        if leaf.moment == "mu":
            root = jnp.where(root == not_a_number, jnp.nan, root)
        root = root * (1 / top[leaf.moment])
        scales = stored.scales.astype(jnp.float32)
        return jnp.abs(root) * root * _blocks.spread(scales, axis, block, leaf.shape[axis])

    def axis_of(leaf):
        return max(len(leaf.shape) - 2, 0)

    return Storage(save, load, parts=Blocks)


# --- Fewer numbers --------------------------------------------------------------------------------


class Factors(NamedTuple):
    """Second moments by their means along their two largest axes, which stay as axes of length 1.

    Attributes:
      rows: the means along the largest axis.
      columns: the means along the second largest.
      whole: the leaves that are not kept by their means.
    """

    rows: Any
    columns: Any
    whole: Any = None


def factored() -> Storage:
    r"""Keep the row and column means of the second moment.

    .. math:: v_{ij} \approx R_i C_j / \operatorname{mean}(R)

    over the two largest axes. Saving is linear and forgets nothing that loading shows, so what is
    kept is Adafactor's estimate to the letter. The step sees the squares of its own gradient
    element by element; for Adafactor's own step, average them too (see `block_mean`).

    A square that overflows stops its row, as it stops its element in float32, and leaves the others
    as they are. Inside `jax.shard_map` the means are those of the local part of a leaf.

    Returns:
      A `Storage` for `nu_storage`; it keeps `Factors` of leaves with at least two axes.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> tx = adam_jax.adam(1e-3, nu_storage=adam_jax.storage.factored())
      >>> rows, columns, whole = tx.init(jnp.zeros((64, 128)))[0].nu
      >>> print(rows.shape, columns.shape, whole)
      (64, 1) (1, 128) None

    Source: Shazeer and Stern, "Adafactor" (arXiv 1804.04235), section 3.
    """

    def largest_axes(shape):
        *_, second, largest = np.argsort(shape, kind="stable")
        return int(second), int(largest)

    def save(moment, leaf):
        second, largest = largest_axes(leaf.shape)
        rows = _blocks.mean(moment, largest, leaf.shape[largest])
        # An infinite square is remembered by its row alone: if its column were infinite too, so
        # would all rows be after the next step, and all products of the two not a number.
        columns = _blocks.mean(_finite(moment), second, leaf.shape[second])
        return Factors(rows, columns)

    def load(stored, leaf):
        second, _ = largest_axes(leaf.shape)
        mean = jnp.mean(_finite(stored.rows), axis=second, keepdims=True)
        return stored.rows * (1 / jnp.where(mean == 0, 1, mean)) * stored.columns

    def fits(leaf):
        return is_large(leaf) and sum(length > 1 for length in leaf.shape) > 1

    return Storage(save, load, fits, only="nu", parts=Factors)


def _finite(moment: jax.Array) -> jax.Array:
    return jnp.where(moment == jnp.inf, 0, moment)


def transformer_blocks(
    path: str, shape: tuple[int, ...], stacked: int = 0
) -> tuple[int, ...] | None:
    """Adam-mini's blocks for the transformers of Flax, whose kernels end in the output axis.

    A block is a row of an embedding (one token), a head of a query or key kernel of shape
    (features, heads, length), one output of any other kernel.

    Args:
      path: the place in the tree of parameters, like "layers/0/attention/query/kernel".
      shape: the shape of the parameter.
      stacked: how many leading axes hold layers, as `nnx.scan`, `nnx.vmap` and Linen's `nn.scan`
        stack them: each layer has blocks of its own. ``block_mean(partial(transformer_blocks,
        stacked=1))`` for a model whose layers are stacked. A shape does not tell by itself. Default
        0.

    Returns:
      The shape of a block, or None for a parameter of fewer than two axes: not in blocks.

    Example:
      >>> transformer_blocks("layers/0/attention/query/kernel", (768, 12, 64))
      (768, 1, 64)
      >>> transformer_blocks("embed/embedding", (50257, 768))
      (1, 768)
      >>> transformer_blocks("layers/mlp/kernel", (12, 768, 3072), stacked=1)
      (1, 768, 1)

    Source: Zhang et al., "Adam-mini" (arXiv 2406.16793), algorithm 3.
    """
    shape = shape[stacked:]
    if len(shape) < 2:
        return None
    if re.search(r"embed|\bw[tp]e\b", path):
        block = (*(1 for _ in shape[:-1]), shape[-1])
    elif re.search(r"\b(query|key)\b", path) and len(shape) == 3:
        block = shape[0], 1, shape[2]
    else:
        block = (*shape[:-1], 1)
    return (1,) * stacked + block


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
        `transformer_blocks`, for stacked layers with its argument `stacked`.

    Returns:
      A `Storage` for `nu_storage`; it keeps an array with one element a block.

    Raises:
      TypeError: if `blocks` is not a function.
      ValueError: in `init`, if a block does not divide the parameter it is for.

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

    def save(moment, leaf):
        for axis, length in enumerate(blocks(leaf.path, leaf.shape) or ()):
            moment = _blocks.mean(moment, axis, length)
        return moment

    def load(stored, leaf):
        for axis, length in enumerate(blocks(leaf.path, leaf.shape) or ()):
            stored = _blocks.spread(stored, axis, length, leaf.shape[axis])
        return jnp.broadcast_to(stored, leaf.shape)

    def fits(leaf):
        block = blocks(leaf.path, leaf.shape) if is_large(leaf) else None
        if block is None:
            return False
        if len(block) != len(leaf.shape):
            raise ValueError(
                f"blocks({leaf.path!r}, {leaf.shape}) must be a shape of {len(leaf.shape)} axes, "
                f"got {block}."
            )
        if any(b < 1 or n % b for n, b in zip(leaf.shape, block, strict=True)):
            raise ValueError(
                f"blocks({leaf.path!r}, {leaf.shape}) must divide that shape, got {block}. Return "
                f"None for a parameter that is kept whole."
            )
        return True

    return Storage(save, load, fits, only="nu")


# --- What a storage makes of a model --------------------------------------------------------------


def report(storage: Any, params: Any, moment: str = "nu") -> str:
    """Which leaves of a model a storage keeps, in how many bytes, and which stay whole.

    Nothing is allocated: the arrays of the parameters may be `jax.ShapeDtypeStruct`.

    Args:
      storage: a `Storage`, a dtype, or None, as in `mu_storage` and `nu_storage`.
      params: a tree of parameters, or of their shapes.
      moment: "mu" or "nu". Default "nu".

    Returns:
      A table in plain text. A line for each leaf has its path, its shape, what is kept of it, the
      bytes of that, and the bytes per element. "whole" is what stays as it is computed. The last
      line has the bytes per parameter, and the share of the parameters whose moment stays whole.

    Raises:
      TypeError: if `storage` is neither a `Storage` nor a dtype, or a parameter is neither floating
        point nor complex.
      ValueError: if the storage is not for this moment.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> params = {"bias": jnp.zeros(64), "kernel": jnp.zeros((64, 64))}
      >>> print(adam_jax.storage.report(adam_jax.storage.int8(), params))
      bias    [64]     whole float32[64]                           256 bytes    4.00 per element
      kernel  [64,64]  codes uint8[64,64] + scales bfloat16[2,64]  4,352 bytes  1.06 per element
      4,160 parameters in 4,608 bytes: 1.11 per parameter, 1.54% whole

    Source: the shapes of the state that `init` makes, by `jax.eval_shape`.
    """
    from adam_jax._slot import Slot  # which needs this module

    check_params("report", params)
    slot, plain = (Slot.of("report", moment, how) for how in (storage, None))
    kept, full = (jax.eval_shape(s.initial, params) for s in (slot, plain))
    structure: Any = jax.tree.structure(params)
    names = slot.storage.parts._fields if slot.storage.parts else ("",)
    trees = [structure.flatten_up_to(tree) for tree in (kept if slot.storage.parts else [kept])]
    shape = lambda x: f"[{','.join(map(str, x.shape))}]"  # noqa: E731
    like = lambda x: f"{x.dtype}{shape(x)}"  # noqa: E731
    rows, elements, total, whole = [], 0, 0, 0
    leaves = jax.tree_util.tree_leaves_with_path(full)
    for (path, leaf), *stored in zip(leaves, *trees, strict=True):
        arrays = {name: x for name, x in zip(names, stored, strict=True) if x is not None}
        what = " + ".join(f"{name} {like(x)}".strip() for name, x in arrays.items())
        if stored[-1] is not None and like(stored[-1]) == like(leaf):
            what, whole = f"whole {like(leaf)}", whole + leaf.size
        size = sum(x.size * x.dtype.itemsize for x in arrays.values())
        each = f"{size / max(leaf.size, 1):.2f} per element"
        rows.append([place(path), shape(leaf), what, f"{size:,} bytes", each])
        elements, total = elements + leaf.size, total + size
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).strip() for row in rows]
    mean, share = (n / max(elements, 1) for n in (total, whole))
    last = f"{elements:,} parameters in {total:,} bytes: {mean:.2f} per parameter"
    return "\n".join([*lines, f"{last}, {share:.2%} whole"])
