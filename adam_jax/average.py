r"""A moving average and the weight it has gathered, which is all that bias correction needs.

.. math:: a_t = (1 - b_t) x_t + b_t a_{t-1}, \qquad w_t = 1 - \prod_{s \le t} b_s

Started at 0, an average has gathered the weight :math:`w_t` only, and dividing by that is all of
Adam's bias correction. `Average` is what flows between the stages; `step_weights` is how a stage
keeps the weights between two steps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._checks import check_scalar
from adam_jax._numerics import Scalar, accumulator, increment, scalar


class Average(NamedTuple):
    r"""A moving average of one leaf, with its rates and the weight it has gathered.

    After every stage the next weight is :math:`w_{t+1} = 1 - b_{t+1} (1 - w_t)`.

    Attributes:
      value: the average :math:`a_t`, shape of the leaf, at least float32.
      decay: the decay rate :math:`b_t` of this step, a scalar.
      weight: the gathered weight :math:`w_t`, a scalar in (0, 1]; exactly 1 once debiased.
      next_decay: the rate of the next step; `decay` where that cannot be known (a rate that is
        injected step by step).
      next_weight: the weight after the next step.
      length: the effective length of the window, a scalar that grows from 1: twice the mean age of
        the gradients plus 1. RAdam's :math:`\rho_t`.
      previous: the average before this gradient joined it, which Lion and ADOPT use: an `Average`
        of weight 0 at the first gradient. None for a first moment that is not kept.
    """

    value: Any
    decay: Scalar
    weight: Scalar
    next_decay: Scalar
    next_weight: Scalar
    length: Scalar = 1.0
    previous: Any = None

    @classmethod
    def memoryless(cls, value: jax.Array, previous: Any = None) -> "Average":
        """An average with a rate of 0, which is the gradient itself."""
        return cls(value, 0.0, 1.0, 0.0, 1.0, previous=previous)

    def with_value(self, value: jax.Array) -> "Average":
        """The same weights for another value."""
        return self._replace(value=value)

    def debiased(self) -> "Average":
        """The value divided by its weight; the weights are 1 afterwards."""
        value = self.value / scalar(self.weight, self.value.dtype)
        return self._replace(value=value, weight=1.0, next_weight=1.0)

    def stepped(self, grad: jax.Array, decay: Scalar) -> "Average":
        """The average after one more gradient, at a constant rate."""
        b = scalar(decay, jnp.result_type(self.weight))
        weight = 1 - b * (1 - self.weight)
        return Average(
            value=mixed(self.value, grad.astype(self.value.dtype), decay),
            decay=decay,
            weight=weight,
            next_decay=decay,
            next_weight=1 - b * (1 - weight),
            length=b * self.weight * (self.length + 1) / weight + 1,
            previous=self,
        )

    def looked_ahead(self, grad: jax.Array) -> "Average":
        """Dozat's look-ahead, debiased: what the average becomes if `grad` comes once more."""
        dtype = self.value.dtype
        decay, weight, next_decay, next_weight = (
            scalar(x, dtype) for x in (self.decay, self.weight, self.next_decay, self.next_weight)
        )
        value = next_decay * (self.value / next_weight) + (1 - decay) * (
            grad.astype(dtype) / weight
        )
        return self._replace(value=value, weight=1.0, next_weight=1.0)


def mixed(average: jax.Array, new: jax.Array, decay: Scalar) -> jax.Array:
    """The moving average of one more number."""
    decay = scalar(decay, average.dtype)
    return (1 - decay) * new + decay * average


# --- The weights that a state keeps ---------------------------------------------------------------

# A column for each moment, and these rows. All zeros mean that the rate has been what it is now
# since the first step.
#   the weight that the moment has gathered;
#   the weight after the next step: no step reads it from the state. It stands here because XLA
#     orders the arithmetic of a leaf otherwise if a scalar that the leaf uses is not kept, and then
#     the last bit of nadam is not optax's;
#   what rounding left out of the weight: adding 1e5 small terms in float32 is off by 1e-3; with the
#     error carried along (Kahan's summation) it stays within 1e-6;
#   the sum of weight times age over the gradients gathered;
#   the rate of the last step, with a minus sign if the rate has ever changed.
ROWS = 5


def no_weights(moments: int) -> jax.Array:
    """The weights of moments that have gathered nothing yet."""
    return jnp.zeros((ROWS, moments), float)


def step_weights(
    stage: str, state: Any, rates: dict[str, Any], count: jax.Array
) -> tuple[dict[str, Average], jax.Array]:
    """One step on: an `Average` for each moment, without its value, and the weights to keep.

    Args:
      stage: the name of the stage, for messages.
      state: the state of the stage, with `weights` of shape (ROWS, moments).
      rates: by their names, for each moment a Python number, a 0-d array, or a schedule.
      count: the number of steps taken so far, an integer scalar.
    """
    weights: Any = getattr(state, "weights", None)
    if isinstance(weights, jax.ShapeDtypeStruct) or jnp.shape(weights) != (ROWS, len(rates)):
        raise ValueError(
            f"{stage} needs weights of shape {(ROWS, len(rates))} in its state, got {weights!r}: "
            f"make the state with init(), where zeros stand for weights under rates that never "
            f"changed. One of adam_jax 0.1.0 goes on by adam_jax.from_optax."
        )
    t = increment(count)
    now, following = list(rates.values()), list(rates.values())
    for i, (name, b) in enumerate(rates.items()):
        if callable(b):
            now[i], following[i] = check_scalar(name, b(count)), check_scalar(name, b(t))
    constants = tuple([b if isinstance(b, float) else None for b in rates.values()])
    weights, columns = _step(weights, now, following, t, constants=constants)
    averages = {}
    for name, b, next_b, column in zip(rates, now, following, columns, strict=True):
        before, weight, next_weight, length_before, length = column
        previous = Average(None, b, before, b, weight, length_before)
        averages[name] = Average(None, b, weight, next_b, next_weight, length, previous)
    return averages, weights


@functools.partial(jax.jit, static_argnames="constants", inline=True)
def _step(weights: jax.Array, now: Any, following: Any, t: jax.Array, *, constants: Any) -> Any:
    """The weights after step t, and for each moment five scalars.

    All moments at once: a device takes longer to start a kernel than to do this arithmetic.
    """
    dtype = accumulator(weights.dtype)  # whatever a state was cast to
    now, following = (
        jnp.stack([scalar(jnp.asarray(b), dtype) for b in rates]) for rates in (now, following)
    )
    value, _, error, age, last = jnp.where(t == 1, 0, weights.astype(dtype))
    unchanged = (value == 0) | (last == now)
    # As long as a rate is one number the weight is 1 - b**t, optax's arithmetic to the letter, so
    # that the results are bitwise its results.
    closed = unchanged & np.array([b is not None for b in constants])
    b = np.array([b or 0.0 for b in constants])
    limit, b, at = (2 / (1 - b) - 1).astype(dtype), b.astype(dtype), t.astype(dtype)
    value = jnp.where(closed, 1 - b ** (at - 1), value)
    error = jnp.where(closed, 0, error)
    # Zeros after steps: a state made by hand, such as one that was taken over from optax.
    age = jnp.where(closed & (last == 0), _age(_length(limit, b, at - 1), value), age)
    length_before = 2 * age / _divisor(value) + 1
    gathered, error, age = _gathered(value, error, age, now)
    next_weight, _, _ = _gathered(gathered, error, age, following)
    length = jnp.where(closed, _length(limit, b, at), 2 * age / _divisor(gathered) + 1)
    gathered = jnp.where(closed, 1 - b**at, gathered)
    next_weight = jnp.where(closed, 1 - b ** (at + 1), next_weight)
    rate = jnp.where(unchanged, now, -now)
    kept = jnp.stack([gathered, next_weight, error, age, rate])
    kept = jax.lax.optimization_barrier(kept)
    rows = value, kept[0], kept[1], length_before, length
    columns = [tuple(row[i] for row in rows) for i in range(len(constants))]
    return kept, [
        (value, _divisor(weight), _divisor(next_weight), length_before, length)
        for value, weight, next_weight, length_before, length in columns
    ]


def _gathered(value: Any, error: Any, age: Any, b: Any) -> tuple[Any, Any, Any]:
    """The moving average of the constant 1 with Kahan's summation, and its weight times age."""
    step = (1 - b) * ((1 - value) - error) + error
    new = value + step
    return new, step - (new - value), b * (age + value)


def _divisor(weight: jax.Array) -> jax.Array:
    """At least what a rate below 1 gathers: a rate of exactly 1 gathers none."""
    return jnp.maximum(weight, jnp.finfo(weight.dtype).epsneg)


def _length(limit: Any, b: Any, t: jax.Array) -> jax.Array:
    """`Average.length` after t steps at a constant rate, after many of which it is `limit`."""
    power = b**t
    return limit - 2 * t * power / _divisor(1 - power)


def _age(length: jax.Array, weight: jax.Array) -> jax.Array:
    """The sum of weight times age."""
    return (length - 1) * weight / 2
