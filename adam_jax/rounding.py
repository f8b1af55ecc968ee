"""Last stages of a chain for low-precision parameters, in which small updates would be lost.

A bfloat16 weight of 1 plus an update of 1e-3 is 1: the next larger number is 1.0078. These stages
compute the new parameter in float32, round it to a number :math:`q` of the parameter's dtype, and
emit :math:`q - p` in float32. That difference is exact, so plain `optax.apply_updates` gives
:math:`q`. Updates of parameters of at least 32 bits pass through unchanged.

The update is in float32 because in bfloat16 the difference is not always exact (from 1 to -0.001,
say). Two kinds of callers expect it in the parameter's dtype:

- Wrappers that choose between an update and none (`optax.apply_if_finite`,
  `optax.conditionally_transform`). They go around the optimizer, before the rounding:
  ``optax.chain(optax.apply_if_finite(adam_jax.adamw(1e-3), 3), adam_jax.compensate())``.
- `equinox.apply_updates`, which adds without casting back: the weights would become float32. Apply
  the updates to the arrays with `optax.apply_updates`::

      arrays, rest = eqx.partition(model, eqx.is_inexact_array)
      updates, state = tx.update(grads, state, arrays)
      model = eqx.combine(optax.apply_updates(arrays, updates), rest)
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._checks import check_integer
from adam_jax._numerics import as_count, increment
from adam_jax._ownership import at, is_placeholder, leaves_by_path, placeholder
from adam_jax._random import random_bits, rounded_at_random
from adam_jax.signal import map_updates
from adam_jax.updates import CountState, params_like


def round_stochastically(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    r"""Round the new parameter up or down at random, so that it is unbiased.

    .. math:: q = \lfloor p + u \rfloor \text{ or } \lceil p + u \rceil, \qquad E[q] = p + u

    where the two are the nearest numbers below and above in the dtype of the parameter p. The stage
    emits :math:`q - p` in float32, so that `optax.apply_updates` gives exactly q. Updates of
    parameters of at least 32 bits pass through unchanged.

    The random bits are a function of the seed, the step count and the leaf's index in the tree, so
    a run can be repeated, on one device or on many. Inside `jax.shard_map` every shard draws bits
    of its own.

    Args:
      seed: an integer, the seed of the random bits. Default 0.

    Returns:
      A gradient transformation from updates to updates, with a `CountState`, for the end of a
      chain; `update` needs `params`.

    Raises:
      TypeError: if `seed` is not an integer; in `init`, if a parameter has fewer than 16 bits; in
        `update`, if it gets `Moments`.
      ValueError: in `update`, without `params`, or if an update has another shape than its
        parameter, naming the leaf.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> tx = optax.chain(adam_jax.scale_by_lr(1.0), adam_jax.round_stochastically(seed=1))
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> updates, _ = tx.update(jnp.full(10_000, -1e-3), tx.init(params), params)
      >>> new = params.astype(float) + updates  # as optax.apply_updates does
      >>> print(jnp.unique(new), new.mean())
      [1.        1.0078] 1.001

    Source: Ozkara, Yu and Park, "Stochastic Rounding for LLM Training" (arXiv 2502.20566).
    """
    seed = check_integer("seed", seed)

    def init_fn(params):
        _check_params("round_stochastically", params)
        return CountState.zero()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = params_like("round_stochastically", updates, params)
        count = as_count(state.count)
        leaves, structure = jax.tree.flatten(updates)
        indices = jax.tree.unflatten(structure, range(len(leaves)))

        def rounded(update, param, index):
            if not _is_low(param):
                return update
            exact = _wide(param) + _wide(update)
            bits = random_bits(seed, "param", index, count, exact)
            return _update_to(rounded_at_random(exact, param.dtype, bits), param)

        updates = map_updates("round_stochastically", rounded, updates, params, indices)
        return updates, CountState(increment(count, draws=True))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class CompensateState(NamedTuple):
    """The state of `compensate`.

    Attributes:
      residual: the exact values minus the parameters, a tree shaped like the parameters, in
        bfloat16 or int8. For a parameter of at least 32 bits there is a placeholder, False, with as
        many axes.
    """

    residual: optax.Params


def compensate(
    residual: Literal["bfloat16", "int8"] = "bfloat16",
) -> optax.GradientTransformationExtraArgs:
    r"""Keep the rounding error of every parameter, and add it to the next update.

    .. math:: q_t = \operatorname{round}(p_{t-1} + r_{t-1} + u_t), \qquad
              r_t = p_{t-1} + r_{t-1} + u_t - q_t

    The sum is computed in float32 and rounded to the dtype of the parameter p. The stage emits
    :math:`q_t - p_{t-1}` in float32, so that `optax.apply_updates` gives exactly :math:`q_t`.
    Updates of parameters of at least 32 bits pass through unchanged.

    Args:
      residual: how to keep :math:`r`: "bfloat16" takes two bytes per parameter; "int8" takes one,
        which counts 1/254 of the distance from the parameter to the next number of its dtype.
        Default "bfloat16".

    Returns:
      A gradient transformation from updates to updates, with a `CompensateState`, for the end of a
      chain; `update` needs `params`.

    Raises:
      ValueError: if `residual` is neither of the two; in `update`, without `params`, or if an
        update has another shape than its parameter, or the state is of other parameters, naming
        the leaf.
      TypeError: in `init`, if a parameter has fewer than 16 bits; in `update`, if it gets
        `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> tx = optax.chain(adam_jax.scale_by_lr(1.0), adam_jax.compensate("int8"))
      >>> params = jnp.ones(1, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> for _ in range(8):  # 8 steps of 1e-3, of which each alone would be lost
      ...     updates, state = tx.update(jnp.full(1, -1e-3), state, params)
      ...     params = (params.astype(float) + updates).astype(params.dtype)
      >>> print(params)
      [1.00781]

    Source: Kahan, "Further remarks on reducing truncation errors" (1965); "int8" is the 24-bit
    weight of FlashOptim (arXiv 2602.23349), section 3.1.
    """
    if residual not in ("bfloat16", "int8"):
        raise ValueError(f'residual must be "bfloat16" or "int8", got {residual!r}.')

    def init_fn(params):
        _check_params("compensate", params)

        def zero(param):
            if _is_low(param):
                return jnp.zeros_like(param, dtype=residual)
            return placeholder(jnp.shape(param))

        return CompensateState(jax.tree.map(zero, params))

    def save(error, param):
        if residual == "bfloat16":
            return error.astype(jnp.bfloat16)
        return jnp.round(error / _spacing(param) * 254).astype(jnp.int8)

    def load(saved, param):
        if residual == "bfloat16":
            return _wide(saved)
        return _wide(saved) / 254 * _spacing(param)

    def exact(update, param, saved):
        # In this order, because the update and the residual are small beside the parameter.
        return _wide(param) + (_wide(update) + load(saved, param))

    def rounded_update(update, param, saved):
        if not _is_low(param):
            return update
        return _update_to(exact(update, param, saved).astype(param.dtype), param)

    def next_residual(update, param, saved):
        if not _is_low(param):
            return saved
        new_exact = exact(update, param, saved)
        new = _rounded(new_exact, param.dtype)
        error = new_exact - _wide(new)
        # Where the parameter overflows it is infinite itself, and no error is kept.
        return save(jnp.where(jnp.isfinite(error), error, 0.0), new)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = params_like("compensate", updates, params)
        _check_residual(state.residual, params)
        trees = updates, params, state.residual
        rounded = map_updates("compensate", rounded_update, *trees)
        return rounded, CompensateState(map_updates("compensate", next_residual, *trees))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- Numbers of few bits --------------------------------------------------------------------------


def _is_low(param: Any) -> bool:
    """Whether it is of a floating-point dtype of fewer than 32 bits."""
    dtype = jnp.result_type(param)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """To the nearest number of a dtype, so that the error is seen.

    For GPUs XLA leaves out a conversion to fewer bits that is converted back. It keeps
    `reduce_precision`, which flushes subnormal numbers: float16 has them, in steps of 2**-24.
    """
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp < 8:
        steps = float(info.smallest_subnormal)
        subnormal = jnp.round(x / steps) * steps
        rounded = jnp.where(jnp.abs(x) < float(info.tiny), subnormal, rounded)
    return rounded.astype(dtype)


def _spacing(x: jax.Array) -> jax.Array:
    """The distance from `x` to the next number of its dtype, in float32.

    At least the smallest normal number of float32, because XLA flushes smaller ones to 0.
    """
    info = jnp.finfo(x.dtype)
    least = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
    finite = _wide(jnp.minimum(jnp.abs(x), info.max))
    exponent = jax.lax.bitcast_convert_type(finite, jnp.uint32) & np.uint32(0x7F800000)
    power = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    return jnp.maximum(power * 2.0**-info.nmant, least)


def _update_to(new: jax.Array, param: jax.Array) -> jax.Array:
    """The update from `param` to `new`. No update is -0: -0 + -0 is -0, and infinity stays."""
    return jnp.where(new == param, -0.0, _wide(new) - _wide(param))


def _check_params(stage: str, params: optax.Params) -> None:
    for path, param in jax.tree_util.tree_leaves_with_path(params):
        if _is_low(param) and jnp.finfo(jnp.result_type(param)).bits < 16:
            raise TypeError(
                f"{stage} rounds bfloat16 and float16 parameters, but the one{at(path)} is "
                f"{jnp.result_type(param)}: keep it in bfloat16 and cast it where it is used, or "
                f"leave it out with optax.masked or optax.partition."
            )


def _check_residual(residuals: Any, params: Any) -> None:
    """A state must be of the parameters that have a gradient now."""
    residual_at, param_at = leaves_by_path(residuals), leaves_by_path(params)
    for path in {**residual_at, **param_at}:
        residual, param = residual_at.get(path), param_at.get(path)
        if not _is_residual(residual, param):
            raise ValueError(
                f"compensate got a state of other parameters: it keeps {_described(residual)} for "
                f"the leaf{at(path)}, where {_described(param)} has a gradient now. Make the state "
                f"anew with init()."
            )


def _is_residual(residual: Any, param: Any) -> bool:
    if residual is None or param is None:
        return residual is param
    if not _is_low(param):
        return is_placeholder(residual)
    return not is_placeholder(residual) and jnp.shape(residual) == jnp.shape(param)


def _described(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{jnp.result_type(leaf)} of shape {jnp.shape(leaf)}"
