"""The first stage: gradients in, moments out. It holds the only large state of the pipeline."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax._numbers import (
    Scalar,
    accumulator,
    check_hyperparameter,
    check_scalar,
    increment,
    real,
    scalar,
    wider,
)
from adam_jax._slot import Slot
from adam_jax._tree import at, check_params, traced_once
from adam_jax.signal import Average, Moments, check_updates, kept_nu, map_values, mixed, sealed
from adam_jax.storage import Storage

SecondMoment = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | float], jax.Array]


def squared(grad: jax.Array, mu: jax.Array, nu: jax.Array, decay: jax.Array | float) -> jax.Array:
    r"""Adam's second moment, the moving average of the squared gradient.

    .. math:: v_t = (1 - b_2) |g_t|^2 + b_2 v_{t-1}

    Args:
      grad: the gradient :math:`g_t` of one leaf, real or complex, at least float32.
      mu: the first moment :math:`m_t`, already updated, same shape; not used by this rule.
      nu: the second moment :math:`v_{t-1}`, same shape, real.
      decay: the rate :math:`b_2`, a scalar.

    Returns:
      The second moment :math:`v_t`, shape and dtype of `nu`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(squared(jnp.array([2.0]), jnp.zeros(1), jnp.array([1.0]), 0.75))
      [1.75]

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1.
    """
    del mu
    return mixed(nu, jnp.real(jnp.conj(grad) * grad), decay)


def belief(
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    decay: jax.Array | float,
    *,
    eps_root: Scalar = 0.0,
) -> jax.Array:
    r"""AdaBelief's second moment: how far the gradient is from what the first moment expects.

    .. math:: v_t = (1 - b_2) |g_t - m_t|^2 + b_2 v_{t-1} + \varepsilon_{root}

    Args:
      grad: the gradient :math:`g_t` of one leaf.
      mu: the first moment :math:`m_t`, already updated.
      nu: the second moment :math:`v_{t-1}`, real.
      decay: the rate :math:`b_2`, a scalar.
      eps_root: added at every step, to the moment that is kept. Default 0.

    Returns:
      The second moment :math:`v_t`, shape and dtype of `nu`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(belief(jnp.array([2.0]), jnp.array([1.0]), jnp.array([0.0]), 0.75))
      [0.25]

    Source: Zhuang et al., "AdaBelief Optimizer" (arXiv 2010.07468), algorithm 2.
    """
    return squared(grad - mu, mu, nu, decay) + scalar(eps_root, nu.dtype)


def yogi(grad: jax.Array, mu: jax.Array, nu: jax.Array, decay: jax.Array | float) -> jax.Array:
    r"""Yogi's second moment: it moves by a share of the squared gradient, however far it is off.

    .. math:: v_t = v_{t-1} - (1 - b_2) \operatorname{sign}(v_{t-1} - |g_t|^2) |g_t|^2

    Args:
      grad: the gradient :math:`g_t` of one leaf.
      mu: the first moment, not used by this rule.
      nu: the second moment :math:`v_{t-1}`, real.
      decay: the rate :math:`b_2`, a scalar.

    Returns:
      The second moment :math:`v_t`, shape and dtype of `nu`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(yogi(jnp.array([2.0]), jnp.zeros(1), jnp.array([1.0]), 0.75))
      [2.]

    Source: Zaheer et al., "Adaptive Methods for Nonconvex Optimization" (NeurIPS 2018), section 4.
    """
    del mu
    square = jnp.real(jnp.conj(grad) * grad)
    return nu - (1 - decay) * jnp.sign(nu - square) * square


def infinity(
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    decay: jax.Array | float,
    *,
    eps: Scalar = 0.0,
) -> jax.Array:
    r"""Adamax's second moment, the square of the decaying maximum of the gradient.

    .. math:: \sqrt{v_t} = \max(b_2 \sqrt{v_{t-1}}, |g_t| + \varepsilon)

    A maximum gathers no weight: follow it with ``debias(nu=False)`` and ``normalize(eps=0)``.

    Args:
      grad: the gradient :math:`g_t` of one leaf.
      mu: the first moment, not used by this rule.
      nu: the second moment :math:`v_{t-1}`, real.
      decay: the rate :math:`b_2`, a scalar.
      eps: added to the magnitude of the gradient. Default 0.

    Returns:
      The second moment :math:`v_t`, shape and dtype of `nu`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(infinity(jnp.array([2.0]), jnp.zeros(1), jnp.array([36.0]), 0.5))
      [9.]

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), section 7.1.
    """
    del mu
    return jnp.maximum(decay**2 * nu, jnp.square(jnp.abs(grad) + scalar(eps, nu.dtype)))


def accumulated(
    grad: jax.Array, mu: jax.Array, nu: jax.Array, decay: jax.Array | float
) -> jax.Array:
    r"""Adagrad's second moment, the sum of all squared gradients.

    .. math:: v_t = v_{t-1} + |g_t|^2

    A sum does not decay: with ``b2=0`` its weight is 1 from the first step on.

    Args:
      grad: the gradient :math:`g_t` of one leaf.
      mu: the first moment, not used by this rule.
      nu: the second moment :math:`v_{t-1}`, real.
      decay: not used by this rule.

    Returns:
      The second moment :math:`v_t`, shape and dtype of `nu`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(accumulated(jnp.array([2.0]), jnp.zeros(1), jnp.array([1.0]), 0.0))
      [5.]

    Source: Duchi et al., "Adaptive Subgradient Methods" (JMLR 12, 2011), figure 1.
    """
    del mu, decay
    return nu + jnp.real(jnp.conj(grad) * grad)


class Weight(NamedTuple):
    r"""The weight :math:`1 - \prod b_s` that an average has gathered, whatever its rates were.

    Attributes:
      value: the weight, a scalar in the default float dtype.
      error: what rounding left out of `value`. Adding 10⁵ small terms in float32 is off by 1e-3;
        with the rounding error carried along (Kahan's summation) it stays within 1e-6.
      age: the sum of weight times age over the gradients gathered.
      decay: the rate of the last step, or of the first before it; negative once it has moved.
      ahead: the weight after the next step, if that has the same rate.
    """

    value: jax.Array
    error: jax.Array
    age: jax.Array
    decay: jax.Array
    ahead: jax.Array

    @classmethod
    def none(cls, decay: Any) -> "Weight":
        """Nothing gathered yet."""
        value, error, age = (jnp.zeros([], float) for _ in range(3))  # each may be donated
        decay = jnp.asarray(decay if isinstance(decay, float) else 0.0, float)
        # As in a step, by the device: its power may be inexact, which one that XLA folds is not.
        one = jax.lax.optimization_barrier(jnp.ones([], float))
        return cls(value, error, age, decay, 1 - decay**one)

    def gather(self, decay: Scalar) -> "Weight":
        """One step on: the moving average of the constant 1."""
        decay = jnp.asarray(decay).astype(self.value.dtype)
        missing = (1 - self.value) - self.error
        step = (1 - decay) * missing + self.error
        value = self.value + step
        error = step - (value - self.value)
        return self._replace(value=value, error=error, age=decay * (self.age + self.value))

    @property
    def positive(self) -> jax.Array:
        """The weight to divide by: rates of exactly 1 have gathered none, and moments of 0.

        The least weight that a rate below 1 can gather in this dtype, so that no other is changed.
        """
        return jnp.maximum(self.value, jnp.finfo(self.value.dtype).epsneg)

    @property
    def length(self) -> jax.Array:
        """The `Average.length` of what has been gathered."""
        return 2 * self.age / self.positive + 1

    def average(self, name: str, decay: Any, count: jax.Array) -> tuple[Average, "Weight"]:
        """An average of this step, but for its value, and the weight to keep.

        As long as the rate is one number the weight is `1 - decay**t`, optax's arithmetic to the
        letter, so that the results are bitwise its results. It is computed a step ahead, so that
        the kernels of the leaves only read it.
        """
        step = increment(count)
        now = check_scalar(name, decay(count)) if callable(decay) else decay
        next_decay = check_scalar(name, decay(step)) if callable(decay) else decay
        rate = jnp.asarray(now).astype(self.value.dtype)
        steady = (count == 0) | (self.decay == rate)
        kept = self.gather(rate)
        weights = [self.value, kept.positive, kept.gather(next_decay).positive]
        length, ahead = kept.length, kept.gather(rate).value
        if isinstance(decay, float):
            before, t, after = (jnp.asarray(i, float) for i in (count, step, increment(step)))
            power = lambda t: rate**t  # noqa: E731
            moved = rate - jnp.abs(self.decay)  # since the last step: 0, most of the time
            weights = [
                jnp.where(steady, 1 - power(before), self.value),
                self.ahead - moved * (1 - self.value),
                jnp.where(steady, 1 - power(after), weights[2]),
            ]
            closed = 2 / (1 - decay) - 1 - 2 * t * power(t) / (1 - power(t))
            length, ahead = jnp.where(steady, closed, length), weights[2]
            # XLA divides by what has one use in another way than by what has several, and in optax
            # the weight is used by the leaves alone, not kept for the next step.
            weights[2] = jax.lax.optimization_barrier(weights[2])
        previous = Average(None, now, weights[0], now, weights[1], self.length)
        average = Average(None, now, weights[1], next_decay, weights[2], length, previous)
        return average, kept._replace(decay=jnp.where(steady, rate, -rate), ahead=ahead)


class ScaleByMomentsState(NamedTuple):
    """The state of `scale_by_moments`: the same for rates that are numbers, arrays or schedules.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates; with a storage it goes on
        from 2**30 after 2**31 - 1, for the sake of its random bits.
      mu: the first moments, as their storage keeps them: a tree shaped like the parameters, or a
        NamedTuple of such trees. None if `b1` is None.
      nu: the second moments, likewise, real; None if `b2` is None.
      mu_weight: the weight that `mu` has gathered; None if `b1` is None.
      nu_weight: likewise for `nu` and `b2`.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    mu: Any
    nu: Any
    mu_weight: Any
    nu_weight: Any


def scale_by_moments(
    b1: optax.ScalarOrSchedule | None = 0.9,
    b2: optax.ScalarOrSchedule | None = 0.999,
    *,
    second_moment: SecondMoment | None = None,
    initial_mu: float = 0.0,
    initial_nu: float = 0.0,
    mu_storage: Storage | Any | None = None,
    nu_storage: Storage | Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace every gradient by its first and second moment.

    .. math::

      m_t = (1 - b_1) g_t + b_1 m_{t-1}, \qquad v_t = (1 - b_2) |g_t|^2 + b_2 v_{t-1}

    Started at 0, after t steps they have gathered only the weight
    :math:`w_t = 1 - \prod_{s \le t} b_s`. The emitted `Moments` carry the rates and the weights
    along, so a later stage can correct for them exactly, whatever schedule the rates follow. A
    running job may go on with another rate, or a schedule in the place of a number: the state is
    the same.

    Args:
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array of at least float32,
        or a schedule from the number of steps taken so far to the rate. None keeps no first moment:
        the emitted one is the gradient. Default 0.9.
      b2: the decay rate of the second moment, likewise; with None there is none. Default 0.999.
      second_moment: the rule `(grad, mu, nu, decay) -> nu` for one leaf, a pure function:
        `squared`, `belief`, `yogi`, `infinity`, `accumulated` or your own; None is `squared`. (With
        `optax.inject_hyperparams`, name it in `static_args`: a function would be taken for a
        schedule.)
      initial_mu: the first moment before the first step. Default 0.
      initial_nu: the second moment before the first step, finite and at least 0. Default 0.
      mu_storage: how to keep the first moment between steps: a dtype, one of `adam_jax.storage`, or
        your own `Storage`. None keeps the dtype of the parameter, or float32 where that is smaller.
      nu_storage: how to keep the second moment, likewise; real for complex parameters too.

    Returns:
      A gradient transformation from gradients to `Moments`, with a `ScaleByMomentsState`.
      Arithmetic is done in at least float32 however the moments are kept, and the moments emitted
      are those of this step before they are saved.

    Raises:
      ValueError: if a rate is outside [0, 1), not a scalar, or in less than float32; in `update`,
        if a gradient does not match the parameter that `init` was given, or the state was made with
        another storage, naming the leaf.
      TypeError: if a rate is not a number, an array or a schedule, the rule not a function, or a
        storage neither a `Storage` nor a dtype; in `init`, if a parameter is neither floating point
        nor complex, naming the leaf.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> adam = optax.chain(
      ...     adam_jax.scale_by_moments(b1=0.9, b2=0.999),
      ...     adam_jax.bias_correct(eps=1e-8),
      ...     adam_jax.scale_by_lr(1e-3),
      ... )
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> updates, state = adam.update({"w": jnp.array([0.5, -3.0])}, adam.init(params))
      >>> print(updates["w"])
      [-0.001  0.001]

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1.
    """
    if b1 is None and b2 is None:
        raise ValueError("b1 and b2 are both None: there is no moment left to keep.")
    b1 = None if b1 is None else check_hyperparameter("b1", b1, upper=1, schedule=True)
    b2 = None if b2 is None else check_hyperparameter("b2", b2, upper=1, schedule=True)
    initial_nu = check_hyperparameter("initial_nu", initial_nu)
    mu_slot = Slot.of("scale_by_moments", "mu", mu_storage)
    nu_slot = Slot.of("scale_by_moments", "nu", nu_storage)
    rule = squared if second_moment is None else second_moment
    if not callable(rule):
        raise TypeError(
            f"second_moment must be a function (grad, mu, nu, decay) -> nu, got {rule!r}."
        )
    seal = sealed(rounded=mu_slot.rounds or nu_slot.rounds)

    def init_fn(params):
        check_params("scale_by_moments", params)
        return ScaleByMomentsState(
            count=jnp.zeros([], jnp.int32),
            mu=None if b1 is None else mu_slot.initial(params, initial_mu),
            nu=None if b2 is None else nu_slot.initial(params, initial_nu),
            mu_weight=None if b1 is None else Weight.none(b1),
            nu_weight=None if b2 is None else Weight.none(b2),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_updates("scale_by_moments", updates)
        mu = nu = keep_mu = keep_nu = mu_weight = nu_weight = None
        last_mu = last_nu = jax.tree.map(lambda _: None, updates)
        if b1 is not None:
            last_mu, keep_mu = mu_slot.open(state.mu, updates, state.count)
            mu, mu_weight = state.mu_weight.average("b1", b1, state.count)
        if b2 is not None:
            last_nu, keep_nu = nu_slot.open(state.nu, updates, state.count)
            nu, nu_weight = state.nu_weight.average("b2", b2, state.count)

        @traced_once
        def averaged(grad, last_mu, last_nu, b1, b2):
            mu = grad if last_mu is None else mixed(last_mu, grad, b1)
            nu = None if last_nu is None else rule(grad, mu, last_nu, scalar(b2, last_nu.dtype))
            return mu, nu

        def moments_of(path, grad, last_mu, last_nu):
            grad = jnp.asarray(grad)
            dtype = accumulator(grad.dtype)
            for last in (last_mu, last_nu):
                dtype = dtype if last is None else wider(dtype, last.dtype)
            last_mu = None if last_mu is None else last_mu.astype(dtype)
            last_nu = None if last_nu is None else last_nu.astype(real(dtype))
            rates = mu and mu.decay, nu and nu.decay
            new_mu, new_nu = averaged(grad.astype(dtype), last_mu, last_nu, *rates)
            due = grad.shape, real(dtype)
            got = getattr(new_nu, "shape", None), getattr(new_nu, "dtype", None)
            if last_nu is not None and got != due:
                returned = f"{got[0]} and {got[1]}" if got[1] is not None else repr(new_nu)
                raise ValueError(
                    f"second_moment must keep the shape and dtype of nu, {due[0]} and {due[1]}, "
                    f"but{at(path)} it returned {returned}."
                )
            return Moments(
                grad=grad,
                mu=_filled(mu, new_mu, last_mu) if mu else Average(new_mu, 0.0, 1.0, 0.0, 1.0),
                nu=_filled(nu, new_nu, last_nu) if nu else None,
                seal=seal,
            )

        moments = jax.tree_util.tree_map_with_path(moments_of, updates, last_mu, last_nu)
        return moments, ScaleByMomentsState(
            count=increment(state.count, draws=mu_slot.rounds or nu_slot.rounds),
            mu=keep_mu and keep_mu(map_values(lambda m: m.mu.value, moments)),
            nu=keep_nu and keep_nu(map_values(lambda m: kept_nu(m).value, moments)),
            mu_weight=mu_weight,
            nu_weight=nu_weight,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _filled(average: Average, value: Any, last: Any) -> Average:
    """An average of scalars with the values of a leaf, of this step and the last."""
    return average._replace(value=value, previous=average.previous.with_value(last))
