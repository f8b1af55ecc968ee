"""Stages from updates to updates: learning rate, weight decay, momentum, clipping."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._checks import (
    check_bool,
    check_dtype,
    check_hyperparameter,
    check_match,
    check_params,
    check_scalar,
)
from adam_jax._jit import once
from adam_jax._numerics import (
    Rate,
    Scalar,
    accumulator,
    as_count,
    increment,
    safe_divide,
    scalar,
    sqrt,
    wider,
)
from adam_jax.sharding import over_shards
from adam_jax.signal import check_updates, is_leaf, map_updates, params_of
from adam_jax.storage._protocol import Slot

Mask: TypeAlias = Any | Callable[[Any], Any] | None


class CountState(NamedTuple):
    """The state of a stage that keeps only its step count.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates. (Where random bits are drawn
        with it, it goes on from 2**30 after 2**31 - 1.) A constant rate counts too, so that a
        checkpoint fits when a schedule takes its place.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way

    @classmethod
    def zero(cls, params: Any = None) -> "CountState":
        """Before the first step: an `init`."""
        del params
        return cls(jnp.zeros([], jnp.int32))


def scale_by_lr(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Multiply every update by minus the learning rate.

    .. math:: u \mapsto -\alpha_t u

    Args:
      learning_rate: the step size :math:`\alpha`, finite and at least 0: a number, a 0-d array of
        at least float32, or a schedule from the number of steps taken so far to the rate.

    Returns:
      A gradient transformation from updates to updates of the same dtype, with a `CountState`.
      The product is computed in at least float32.

    Raises:
      ValueError: if the rate is negative, infinite, NaN, not a scalar or in less than float32; in
        `update`, if it gets the parameters and one has another shape than its update.
      TypeError: if it is not a number, an array or a schedule; in `update`, if it gets `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stage = adam_jax.scale_by_lr(optax.linear_schedule(1.0, 0.5, transition_steps=1))
      >>> state = stage.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     update, state = stage.update(jnp.array([1.0, -1.0]), state)
      ...     print(update)
      [-1.  1.]
      [-0.5  0.5]

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1, last line.
    """
    learning_rate = check_hyperparameter("learning_rate", learning_rate, schedule=True)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        count, rate = as_count(state.count), learning_rate
        if callable(rate):
            rate = check_scalar("learning_rate", rate(count))

        def scaled(update, param):
            if param is not None and not _alike(update, param):
                params_like("scale_by_lr", updates, params)
            return once(_scaled, update, rate)

        steps = map_updates("scale_by_lr", scaled, updates, params_of(updates, params))
        return steps, CountState(increment(count))

    return optax.GradientTransformationExtraArgs(CountState.zero, update_fn)


def _scaled(update: jax.Array, rate: Scalar) -> jax.Array:
    dtype = accumulator(update.dtype)
    step = -scalar(rate, dtype) * update.astype(dtype)
    return step.astype(update.dtype)


def decay_weights(rate: "Rate", *, mask: "Mask" = None) -> optax.GradientTransformationExtraArgs:
    r"""Add a multiple of the parameters to the updates: decoupled weight decay.

    .. math:: u \mapsto u + \lambda_t \theta

    Put it before `scale_by_lr`: then the learning rate multiplies the decay too, as in PyTorch's
    AdamW.

    Args:
      rate: the rate :math:`\lambda`, finite and at least 0: a number, a 0-d array of at least
        float32, or a schedule from the number of steps taken so far to the rate. The number 0
        leaves the updates as they are.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. In the other leaves the updates stay as they are. None,
        the default: all of them.

    Returns:
      A gradient transformation from updates to updates of the same dtype: with a `CountState` if
      the rate is a schedule, else stateless. `update` needs `params`. The sum is computed in at
      least float32.

    Raises:
      ValueError: if the rate is negative, infinite, NaN, not a scalar or in less than float32; in
        `update`, without `params`, if a parameter has another shape than its update, or if the
        mask is neither a tree like the updates nor a prefix of one.
      TypeError: if the rate is not a number, an array or a schedule, or the mask neither booleans
        nor a function; in `update`, if it gets `Moments`.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
      >>> stage = adam_jax.decay_weights(0.5, mask=matrices)
      >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
      >>> updates, _ = stage.update(params, stage.init(params), params)
      >>> print(updates["kernel"], updates["bias"])
      [[1.5]] [1.]

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101).
    """
    rate = check_hyperparameter("rate", rate, schedule=True)
    mask = True if mask is None else mask
    fixed = _is_mask_tree(mask)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        now = rate
        if callable(rate):
            count = as_count(state.count)
            now, state = check_scalar("rate", rate(count)), CountState(increment(count))
        params = params_like("decay_weights", updates, params)
        chosen = _broadcast(mask if fixed else mask(params), updates)  # type: ignore[operator]

        def decayed(update, param, chosen):
            if not chosen or (isinstance(now, float) and now == 0):
                return update
            return once(_decayed, update, param, now)

        return map_updates("decay_weights", decayed, updates, params, chosen), state

    init_fn = CountState.zero if callable(rate) else optax.init_empty_state
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _decayed(update: jax.Array, param: jax.Array, rate: Scalar) -> jax.Array:
    dtype = wider(accumulator(update.dtype), jnp.result_type(param))
    decay = scalar(rate, dtype) * jnp.asarray(param).astype(dtype)
    return (update.astype(dtype) + decay).astype(update.dtype)


def _is_mask_tree(mask: Any) -> bool:
    """True for a tree of booleans, False for a function that makes one, else an error.

    A model is both a tree and a function: one with booleans for leaves is a mask.
    """
    leaves = jax.tree.leaves(mask)
    if all(isinstance(leaf, bool | np.bool_) for leaf in leaves) and (leaves or not callable(mask)):
        return True
    if callable(mask):
        return False
    raise TypeError(
        f"mask must be a tree of booleans, or a function from the parameters to one, got {mask!r}."
    )


def _broadcast(mask: Any, updates: optax.Updates) -> Any:
    """The mask with a boolean for each update."""
    if not _is_mask_tree(mask):
        raise TypeError(f"mask must return a tree of booleans, got {mask!r}.")
    try:
        return jax.tree.map(lambda chosen, of: jax.tree.map(lambda _: chosen, of), mask, updates)
    except ValueError as error:
        raise ValueError(f"mask must be a tree like the parameters, or a prefix: {error}") from None


# --- Parameters beside their updates --------------------------------------------------------------


def params_like(stage: str, updates: optax.Updates, params: optax.Params | None) -> Any:
    """The parameters that have an update, each of the shape of its update: none is broadcast."""
    if params is None:
        raise ValueError(f"{stage} needs the parameters: pass params to update().")
    check_updates(stage, updates)
    with contextlib.suppress(ValueError):  # of another tree, which check_match will tell
        with_update = lambda update, param: None if update is None else param  # noqa: E731
        params = jax.tree.map(with_update, updates, params, is_leaf=is_leaf)
    check_match(stage, params, updates)
    return params


def _alike(update: Any, param: Any) -> bool:
    is_real = jnp.iscomplexobj(update) == jnp.iscomplexobj(param)
    return is_real and jnp.shape(update) == jnp.shape(param)


# --- Momentum, the trust ratio, clipping ----------------------------------------------------------


class AccumulateState(NamedTuple):
    """The state of `accumulate`.

    Attributes:
      trace: the decaying sums :math:`a`, a tree shaped like the parameters, in at least float32 or
        in the dtype that was asked for.
    """

    trace: optax.Params


def accumulate(
    decay: Scalar, *, nesterov: bool = False, dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Sum up all updates, each weighted less with every step: momentum, the heavy ball.

    .. math:: a_t = \mu a_{t-1} + u_t, \qquad u_t \mapsto a_t

    or with Nesterov's look-ahead :math:`u_t \mapsto u_t + \mu a_t`. Unlike the first moment of
    `scale_by_moments` this is a sum and not a mean: under a steady gradient it grows to
    :math:`1 / (1 - \mu)` times the gradient.

    Args:
      decay: the rate :math:`\mu`, in [0, 1): a number or a 0-d array of at least float32.
      nesterov: whether to look one step ahead. Default False.
      dtype: the dtype to keep :math:`a` in, complex for complex parameters. None, the default: that
        of the parameter, at least float32.

    Returns:
      A gradient transformation from updates to updates of the same dtype, with an
      `AccumulateState`. The sum is computed in at least float32.

    Raises:
      ValueError: if the rate is outside [0, 1), not a scalar or in less than float32, or `dtype`
        is neither a floating-point nor a complex dtype; in `update`, if an update does not match
        the parameter that `init` was given, naming the leaf.
      TypeError: if the rate is not a number or an array, or `nesterov` not a bool; in `init`, if a
        parameter is neither floating point nor complex, or complex and `dtype` is not; in
        `update`, if it gets `Moments`.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.accumulate(0.5)
      >>> state = stage.init(jnp.zeros(1))
      >>> for _ in range(3):
      ...     update, state = stage.update(jnp.ones(1), state)
      ...     print(update)
      [1.]
      [1.5]
      [1.75]

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods" (1964);
    `nesterov` as in Sutskever et al., "On the importance of initialization and momentum" (ICML
    2013).
    """
    decay = check_hyperparameter("decay", decay, upper=1)
    nesterov = check_bool("nesterov", nesterov)
    if dtype is not None:
        dtype = check_dtype("dtype", dtype, jnp.inexact)

    slot = Slot.of("accumulate", "mu", dtype)

    def init_fn(params):
        check_params("accumulate", params)
        return AccumulateState(slot.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_updates("accumulate", updates)
        trace, save = slot.load(state.trace, updates, count=0)

        def added(update, trace):
            return once(_added, update, trace, decay)

        def step(update, trace):
            return (added(update, trace) if nesterov else trace).astype(update.dtype)

        trace = map_updates("accumulate", added, updates, trace)
        updates = map_updates("accumulate", step, updates, trace)
        return updates, AccumulateState(save(trace))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _added(update: jax.Array, trace: jax.Array, decay: Scalar) -> jax.Array:
    dtype = wider(accumulator(update.dtype), trace.dtype)
    return update.astype(dtype) + scalar(decay, dtype) * trace.astype(dtype)


def scale_by_trust_ratio() -> optax.GradientTransformationExtraArgs:
    r"""Give the update of every leaf the norm of its parameter, as LAMB does.

    .. math:: u \mapsto \frac{\|\theta\|}{\|u\|} u

    The norms are those of a leaf. Where one of them is 0 the update stays as it is, and the
    derivative is finite.

    Returns:
      A stateless gradient transformation from updates to updates of the same dtype; `update` needs
      `params`. The norms are computed in at least float32.

    Raises:
      ValueError: in `update`, without `params`, or if a parameter has another shape than its
        update.
      TypeError: in `update`, if it gets `Moments`.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.scale_by_trust_ratio()
      >>> params = jnp.array([6.0, 8.0])
      >>> update, _ = stage.update(jnp.array([0.0, 2.0]), stage.init(params), params)
      >>> print(update)
      [ 0. 10.]

    Source: You et al., "Large Batch Optimization for Deep Learning" (arXiv 1904.00962), algorithm
    2, with the identity for :math:`\phi`.
    """

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = params_like("scale_by_trust_ratio", updates, params)
        rescaled = lambda update, param: once(_rescaled, update, param)  # noqa: E731
        return map_updates("scale_by_trust_ratio", rescaled, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _rescaled(update: jax.Array, param: jax.Array) -> jax.Array:
    dtype = wider(accumulator(update.dtype), jnp.result_type(param))
    step = update.astype(dtype)
    due, norm = _norm(jnp.asarray(param).astype(dtype)), _norm(step)
    ratio = jnp.where((due == 0) | (norm == 0), 1, safe_divide(due, norm))
    return (step * ratio.astype(dtype)).astype(update.dtype)


def _norm(x: jax.Array) -> jax.Array:
    return sqrt(over_shards(jax.lax.psum, jnp.sum(jnp.real(x * jnp.conj(x))), x))


def clip_by_schedule(limit: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    r"""Clip every element to a limit that moves (`optax.clip` is for one that stays).

    .. math:: u \mapsto \min(\max(u, -c_t), c_t)

    Args:
      limit: a schedule from the number of steps taken so far to the limit :math:`c_t`, at least 0.

    Returns:
      A gradient transformation from real updates to updates of the same dtype, with a
      `CountState`. The limit is compared in at least float32.

    Raises:
      TypeError: if `limit` is not a schedule; in `update`, if it gets `Moments` or complex updates.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.clip_by_schedule(lambda count: count.astype(float) ** 0.25)
      >>> state = stage.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     update, state = stage.update(jnp.array([2.0, -0.5]), state)
      ...     print(update)
      [ 0. -0.]
      [ 1.  -0.5]

    Source: Taniguchi et al., "ADOPT" (arXiv 2411.02853), algorithm 2.
    """
    if not callable(limit):
        raise TypeError(f"limit must be a schedule, got {limit!r}; for a constant use optax.clip.")

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        count = as_count(state.count)
        now = check_scalar("limit", limit(count))
        updates = map_updates("clip_by_schedule", lambda u: once(_clipped, u, now), updates)
        return updates, CountState(increment(count))

    return optax.GradientTransformationExtraArgs(CountState.zero, update_fn)


def _clipped(update: jax.Array, limit: Scalar) -> jax.Array:
    if jnp.iscomplexobj(update):
        raise TypeError(f"clip_by_schedule takes real updates, got {update.dtype}.")
    dtype = accumulator(update.dtype)
    most = scalar(limit, dtype)
    return jnp.clip(update.astype(dtype), -most, most).astype(update.dtype)
