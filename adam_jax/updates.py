"""Stages on plain updates: the direction becomes a step downhill."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax._checks import check_hyperparameter, check_scalar
from adam_jax._jit import once
from adam_jax._numerics import Scalar, accumulator, as_count, increment, scalar
from adam_jax.signal import map_updates


class CountState(NamedTuple):
    """The state of a stage that keeps nothing but the number of its steps.

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
      ValueError: if the rate is negative, infinite, NaN, not a scalar or in less than float32.
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
        del params, extra_args
        count, rate = as_count(state.count), learning_rate
        if callable(rate):
            rate = check_scalar("learning_rate", rate(count))
        updates = map_updates("scale_by_lr", lambda u: once(_scaled, u, rate), updates)
        return updates, CountState(increment(count))

    return optax.GradientTransformationExtraArgs(CountState.zero, update_fn)


def _scaled(update: jax.Array, rate: Scalar) -> jax.Array:
    dtype = accumulator(update.dtype)
    step = -scalar(rate, dtype) * update.astype(dtype)
    return step.astype(update.dtype)


def clip_by_schedule(limit: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    r"""Clip every element to a limit that moves (`optax.clip` is for one that stays).

    .. math:: u \mapsto \min(\max(u, -c_t), c_t)

    Args:
      limit: a schedule from the number of steps taken so far to the limit :math:`c_t`.

    Returns:
      A gradient transformation from real updates to updates of the same dtype, with a
      `CountState`.

    Raises:
      TypeError: if `limit` is not a schedule; in `update`, if it gets `Moments`.

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
        most = check_scalar("limit", limit(count))

        def clipped(update):
            if jnp.iscomplexobj(update):
                raise TypeError(f"clip_by_schedule takes real updates, got {update.dtype}.")
            bound = most.astype(update.dtype)
            return jnp.clip(update, -bound, bound)

        updates = map_updates("clip_by_schedule", clipped, updates)
        return updates, CountState(increment(count))

    return optax.GradientTransformationExtraArgs(CountState.zero, update_fn)
