"""The first stage: gradients in, moments out. It holds the only large state of the pipeline."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax import signals
from adam_jax.signals import Moments

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
    return (1 - decay) * jnp.real(jnp.conj(grad) * grad) + decay * nu


class Weight(NamedTuple):
    r"""The weight :math:`1 - \prod b_s` that an average has gathered under a moving decay.

    Attributes:
      value: the weight, a scalar in the default float dtype.
      error: what rounding left out of `value`. Adding 10⁵ small terms in float32 is off by 1e-3;
        with the rounding error carried along (Kahan's summation) it stays within 1e-6.
    """

    value: jax.Array
    error: jax.Array

    def gather(self, decay: jax.typing.ArrayLike) -> "Weight":
        """One step on: the weight is the moving average of the constant 1."""
        missing = (1 - self.value) - self.error
        step = (1 - signals.cast(decay, self.value.dtype)) * missing + self.error
        value = self.value + step
        return Weight(value, step - (value - self.value))


class ScaleByMomentsState(NamedTuple):
    """The state of `scale_by_moments`.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates.
      mu: the first moments, a tree shaped like the parameters.
      nu: the second moments, a tree shaped like the parameters, real.
      mu_weight: the weight gathered by `mu` where `b1` is an array or a schedule; None where it is
        a number, because then the weight is `1 - b1**count`.
      nu_weight: likewise for `nu` and `b2`.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    mu: optax.Updates
    nu: optax.Updates
    mu_weight: Weight | None
    nu_weight: Weight | None


def scale_by_moments(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    *,
    second_moment: SecondMoment | None = None,
    mu_dtype: Any | None = None,
    nu_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace every gradient by its first and second moment.

    .. math::

      m_t = (1 - b_1) g_t + b_1 m_{t-1}, \qquad v_t = (1 - b_2) |g_t|^2 + b_2 v_{t-1}

    Both start at 0, so after t steps they have gathered only the weight
    :math:`w_t = 1 - \prod_{s \le t} b_s`. The emitted `Moments` carry the rates and the weights
    along, so a later stage can correct for them exactly, whatever schedule the rates follow.

    Args:
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array of at least float32,
        or a schedule from the number of steps taken so far to the rate. Default 0.9.
      b2: the decay rate of the second moment, likewise. Default 0.999.
      second_moment: the rule `(grad, mu, nu, decay) -> nu` for one leaf, a pure function; None is
        `squared`. (With `optax.inject_hyperparams`, name it in `static_args`: a function would be
        taken for a schedule.)
      mu_dtype: the dtype to keep the first moment in between steps. None keeps the dtype of the
        parameter, or float32 where that is smaller.
      nu_dtype: the dtype to keep the second moment in, likewise; real for complex parameters too.

    Returns:
      A gradient transformation from gradients to `Moments`, with a `ScaleByMomentsState`.
      Arithmetic is done in at least float32 whatever the moments are kept in, and the moments
      emitted are those of this step before they are rounded for keeping.

    Raises:
      ValueError: if a rate is outside [0, 1), not a scalar, or in less than float32; in `update`,
        if a gradient does not match the parameter that `init` was given, naming the leaf.
      TypeError: if a rate is not a number, an array or a schedule, or the rule not a function; in
        `init`, if a parameter is
        neither floating point nor complex, naming the leaf.

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
    b1 = signals.check_hyperparameter("b1", b1, upper=1, schedule=True)
    b2 = signals.check_hyperparameter("b2", b2, upper=1, schedule=True)
    mu_dtype = signals.check_dtype("mu_dtype", mu_dtype, jnp.inexact)
    nu_dtype = signals.check_dtype("nu_dtype", nu_dtype, jnp.floating)
    rule = squared if second_moment is None else second_moment
    if not callable(rule):
        raise TypeError(
            f"second_moment must be a function (grad, mu, nu, decay) -> nu, got {rule!r}."
        )

    def init_fn(params: optax.Params) -> ScaleByMomentsState:
        signals.check_params("scale_by_moments", params, mu_dtype)

        def mu(param):
            dtype = signals.accumulator(jnp.result_type(param))
            return jnp.zeros_like(param, dtype=dtype if mu_dtype is None else mu_dtype)

        def nu(param):
            dtype = signals.real(signals.accumulator(jnp.result_type(param)))
            return jnp.zeros_like(param, dtype=dtype if nu_dtype is None else nu_dtype)

        return ScaleByMomentsState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(mu, params),
            nu=jax.tree.map(nu, params),
            mu_weight=_no_weight(b1),
            nu_weight=_no_weight(b2),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByMomentsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMomentsState]:
        del params, extra_args
        signals.check_match("scale_by_moments", updates, state.mu)
        mu_now, mu_next, mu_weight = _rates("b1", b1, state.count, state.mu_weight)
        nu_now, _, nu_weight = _rates("b2", b2, state.count, state.nu_weight)

        def leaf(grad, mu, nu):
            grad = jnp.asarray(grad)
            dtype = signals.wider(signals.accumulator(grad.dtype), mu.dtype)
            g, mu, nu = grad.astype(dtype), mu.astype(dtype), nu.astype(signals.real(dtype))
            mu_decay = signals.cast(mu_now.decay, dtype)
            nu_decay = signals.cast(nu_now.decay, nu.dtype)
            mu = (1 - mu_decay) * g + mu_decay * mu
            nu = rule(g, mu, nu, nu_decay)
            return Moments(
                grad=grad,
                mu=mu,
                nu=nu,
                mu_decay=mu_decay,
                nu_decay=nu_decay,
                mu_weight=mu_now.weight,
                nu_weight=nu_now.weight,
                mu_next_decay=mu_next.decay,
                mu_next_weight=mu_next.weight,
            )

        moments = jax.tree.map(leaf, updates, state.mu, state.nu)
        return moments, ScaleByMomentsState(
            count=optax.safe_increment(state.count),
            mu=signals.pick("mu", moments, state.mu),
            nu=signals.pick("nu", moments, state.nu),
            mu_weight=mu_weight,
            nu_weight=nu_weight,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Rate(NamedTuple):
    decay: Any
    weight: Any


def _no_weight(decay: Any) -> Weight | None:
    if isinstance(decay, float):
        return None
    return Weight(jnp.zeros([], float), jnp.zeros([], float))


def _rates(
    name: str, decay: Any, count: jax.Array, weight: Weight | None
) -> tuple[_Rate, _Rate, Weight | None]:
    """The rate and the weight at this step, both at the next step, and the weight to keep."""
    step = optax.safe_increment(count)
    if isinstance(decay, float):
        base = jnp.asarray(decay, float)
        now, ahead = (1 - base ** t.astype(float) for t in (step, optax.safe_increment(step)))
        return _Rate(decay, now), _Rate(decay, ahead), None
    if weight is None:
        raise ValueError(
            f"{name} was a number when this state was made and is an array or a schedule now: the "
            f"weight gathered so far is unknown. Make the state anew with init()."
        )
    if callable(decay):
        now, ahead = (signals.check_scalar(name, decay(t)) for t in (count, step))
        weight = weight.gather(now)
        return _Rate(now, weight.value), _Rate(ahead, weight.gather(ahead).value), weight
    weight = weight.gather(decay)
    return _Rate(decay, weight.value), _Rate(None, None), weight
