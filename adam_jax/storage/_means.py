"""Storages that keep means of the second moment, in blocks or by rows and columns."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adam_jax.fusion import _tiles
from adam_jax.storage._protocol import Storage, is_large


class Factors(NamedTuple):
    """Second moments as their means along each of their two largest axes.

    An axis that a mean was taken along stays, with length 1.

    Attributes:
      rows: the means along the largest axis.
      columns: the means along the second largest axis.
      whole: the moments of leaves that are not kept as means, at least float32.
    """

    rows: Any
    columns: Any
    whole: Any = None


def factored() -> Storage:
    r"""Keep the row and column means of the second moment.

    .. math:: v_{ij} \approx R_i C_j / \operatorname{mean}(C)

    where :math:`R` and :math:`C` are the means along the two largest axes. Saving is linear and
    ``save(load(x)) == x``, so what is kept is exactly Adafactor's estimate. The step itself uses
    the moment before it is saved, in which the squares of this step's gradient are not averaged.
    To average those too, as Adafactor does, give `scale_by_moments` a rule that averages, as the
    example of `block_mean` does.

    A row in which an element of v is infinite, NaN, or so large that a sum could overflow is
    stopped: all of its v is infinite from then on, and its updates are 0. The means of the other
    rows stay as they are. (A float32 moment stops that element only.) A NaN gradient stays in m, at
    its element only. Inside `jax.shard_map` the means are those of a shard.

    Returns:
      A `Storage` for `nu_storage`; it keeps `Factors` of leaves of at least 4,096 elements with two
      axes longer than 1, and the others as they are computed.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> tx = adam_jax.adam(1e-3, nu_storage=adam_jax.storage.factored())
      >>> rows, columns, _ = tx.init(jnp.zeros((64, 128)))[0].nu
      >>> print(rows.shape, columns.shape)
      (64, 1) (1, 128)

    Source: Shazeer and Stern, "Adafactor" (arXiv 1804.04235), section 3.
    """

    def largest_axes(shape):
        *_, second, largest = np.argsort(shape, kind="stable")
        return int(second), int(largest)

    def save(moment, leaf):
        second, largest = largest_axes(leaf.shape)
        # A number that is infinite, NaN, or so large that a sum could overflow makes its row
        # infinite. In the mean of its column it would make all rows so in the next step.
        counts = moment <= jnp.finfo(moment.dtype).max / leaf.size
        rows = _tiles.mean(jnp.where(counts, moment, jnp.inf), largest, leaf.shape[largest])
        columns = _tiles.mean(jnp.where(counts, moment, 0), second, leaf.shape[second])
        return Factors(rows, columns)

    def load(stored, leaf):
        _, largest = largest_axes(leaf.shape)
        # The mean of the rows would lack those that are infinite, whose last numbers the columns
        # may still have: the other rows would be too large.
        mean = jnp.mean(stored.columns, axis=largest, keepdims=True)
        goes_on = stored.rows < jnp.inf
        rows = jnp.where(goes_on, stored.rows, 0)
        moment = rows * (stored.columns * (1 / jnp.where(mean == 0, 1, mean)))
        return jnp.where(goes_on, moment, jnp.inf)

    def fits(leaf):
        return is_large(leaf) and sum(length > 1 for length in leaf.shape) > 1

    return Storage(save, load, fits, only="nu", parts=Factors)


def transformer_blocks(
    path: str, shape: tuple[int, ...], stacked: int = 0
) -> tuple[int, ...] | None:
    """Adam-mini's blocks for the transformers of Flax, whose kernels end in the output axis.

    A block is one row (one token) of an embedding, one head of a query or key kernel of shape
    (features, heads, length), or one output of any other kernel.

    Args:
      path: the path of a parameter in the tree, like "layers/0/attention/query/kernel".
      shape: the shape of the parameter.
      stacked: the number of leading axes that stack layers, as `nnx.scan`, `nnx.vmap` and Linen's
        `nn.scan` make them: each layer has its own blocks. Default 0. For a model of stacked layers
        give ``block_mean(partial(transformer_blocks, stacked=1))``.

    Returns:
      The shape of a block, or None for a parameter of fewer than two axes, which has no blocks.

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
    r"""Keep one second moment per block: the mean of its elements.

    .. math:: v_{b,i} \approx \frac{1}{|b|} \sum_{j \in b} v_{b,j}

    for the elements i and j of a block b. What is kept is exactly Adam-mini's moment. The step
    itself uses the moment before it is saved, in which the squares of this step's gradient are not
    averaged. To average those too, as Adam-mini does, give `scale_by_moments` a rule that averages:
    the last lines of the example. Leaves under 4,096 elements are kept as they are computed.

    Args:
      blocks: a function from the path and the shape of a parameter to the shape of its blocks,
        which must have as many axes and divide the parameter's shape, or to None for a parameter
        whose moment is kept as it is computed. Default `transformer_blocks`.

    Returns:
      A `Storage` for `nu_storage`; it keeps an array with one element per block.

    Raises:
      TypeError: if `blocks` is not a function.
      ValueError: in `init`, if the shape of a block does not divide that of its parameter.

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
            moment = _tiles.mean(moment, axis, length)
        return moment

    def load(stored, leaf):
        for axis, length in enumerate(blocks(leaf.path, leaf.shape) or ()):
            stored = _tiles.repeated(stored, axis, length, leaf.shape[axis])
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
