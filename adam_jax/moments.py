"""The first stage: gradients in, moments out. It holds the only large state of the pipeline."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax import signals
from adam_jax import storage as storages
from adam_jax.signals import Last, Moments
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
    return (1 - decay) * jnp.real(jnp.conj(grad) * grad) + decay * nu


def belief(
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    decay: jax.Array | float,
    *,
    eps_root: signals.Scalar = 0.0,
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
    return squared(grad - mu, mu, nu, decay) + signals.cast(eps_root, nu.dtype)


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
    eps: signals.Scalar = 0.0,
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
    return jnp.maximum(decay**2 * nu, jnp.square(jnp.abs(grad) + signals.cast(eps, nu.dtype)))


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
    r"""The weight :math:`1 - \prod b_s` that an average has gathered under a moving decay.

    Attributes:
      value: the weight, a scalar in the default float dtype.
      error: what rounding left out of `value`. Adding 10⁵ small terms in float32 is off by 1e-3;
        with the rounding error carried along (Kahan's summation) it stays within 1e-6.
      age: the sum of weight times age over the gradients gathered.
    """

    value: jax.Array
    error: jax.Array
    age: jax.Array

    def gather(self, decay: jax.typing.ArrayLike) -> "Weight":
        """One step on: the weight is the moving average of the constant 1."""
        decay = jnp.asarray(decay).astype(self.value.dtype)
        missing = (1 - self.value) - self.error
        step = (1 - decay) * missing + self.error
        value = self.value + step
        error = step - (value - self.value)
        return Weight(value, error, decay * (self.age + self.value))


class ScaleByMomentsState(NamedTuple):
    """The state of `scale_by_moments`.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates.
      mu: the first moments, a tree shaped like the parameters, each as its storage keeps it; None
        if `b1` is None.
      nu: the second moments, likewise, real; None if `b2` is None.
      mu_weight: the weight gathered by `mu` where `b1` is an array or a schedule; None where it is
        a number, because then the weight is `1 - b1**count`.
      nu_weight: likewise for `nu` and `b2`.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    mu: optax.Updates | None
    nu: optax.Updates | None
    mu_weight: Weight | None
    nu_weight: Weight | None


def scale_by_moments(
    b1: optax.ScalarOrSchedule | None = 0.9,
    b2: optax.ScalarOrSchedule | None = 0.999,
    *,
    second_moment: SecondMoment | None = None,
    initial_mu: float = 0.0,
    initial_nu: float = 0.0,
    mu_dtype: Any | None = None,
    nu_dtype: Any | None = None,
    mu_storage: Storage | None = None,
    nu_storage: Storage | None = None,
    recompute: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace every gradient by its first and second moment.

    .. math::

      m_t = (1 - b_1) g_t + b_1 m_{t-1}, \qquad v_t = (1 - b_2) |g_t|^2 + b_2 v_{t-1}

    Started at 0, after t steps they have gathered only the weight
    :math:`w_t = 1 - \prod_{s \le t} b_s`. The emitted `Moments` carry the rates and the weights
    along, so a later stage can correct for them exactly, whatever schedule the rates follow.

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
      mu_dtype: the dtype to keep the first moment in between steps. None keeps the dtype of the
        parameter, or float32 where that is smaller.
      nu_dtype: the dtype to keep the second moment in, likewise; real for complex parameters too.
      mu_storage: another way to keep the first moment, from `adam_jax.storage` or your own, instead
        of `mu_dtype`. Default None.
      nu_storage: another way to keep the second moment, likewise.
      recompute: whether to compute the emitted moments apart from those that are kept; the two
        differ in the last digit at most. A parameter then does not wait for its moments to be
        written, and XLA's CPU backend (of jaxlib 0.10 or newer), if it is told to with
        ``XLA_FLAGS=--xla_backend_extra_options=xla_cpu_use_multi_output_fusion``, makes one kernel
        of a leaf, which moves 28 bytes a parameter instead of 40. Without that flag the CPU backend
        copies the old moments first and is three times slower. Default False.

    Returns:
      A gradient transformation from gradients to `Moments`, with a `ScaleByMomentsState`.
      Arithmetic is done in at least float32 however the moments are kept, and the moments emitted
      are those of this step before they are saved.

    Raises:
      ValueError: if a rate is outside [0, 1), not a scalar, or in less than float32; in `update`,
        if a gradient does not match the parameter that `init` was given, naming the leaf.
      TypeError: if a rate is not a number, an array or a schedule, the rule not a function, or a
        storage not a `Storage`; in `init`, if a parameter is neither floating point nor complex,
        naming the leaf.

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
    b1 = None if b1 is None else signals.check_hyperparameter("b1", b1, upper=1, schedule=True)
    b2 = None if b2 is None else signals.check_hyperparameter("b2", b2, upper=1, schedule=True)
    initial_nu = signals.check_hyperparameter("initial_nu", initial_nu)
    mu_dtype = signals.check_dtype("mu_dtype", mu_dtype, jnp.inexact)
    nu_dtype = signals.check_dtype("nu_dtype", nu_dtype, jnp.floating)
    mu_storage = storages.chosen("mu", mu_storage, mu_dtype)
    nu_storage = storages.chosen("nu", nu_storage, nu_dtype)
    rule = squared if second_moment is None else second_moment
    if not callable(rule):
        raise TypeError(
            f"second_moment must be a function (grad, mu, nu, decay) -> nu, got {rule!r}."
        )

    def init_fn(params: optax.Params) -> ScaleByMomentsState:
        signals.check_params("scale_by_moments", params, mu_dtype)
        mu, nu = (storages.leaves(moment, params) for moment in ("mu", "nu"))
        return ScaleByMomentsState(
            count=jnp.zeros([], jnp.int32),
            mu=None if b1 is None else storages.initial(mu_storage, params, mu, initial_mu),
            nu=None if b2 is None else storages.initial(nu_storage, params, nu, initial_nu),
            mu_weight=None if b1 is None or isinstance(b1, float) else no_weight(),
            nu_weight=None if b2 is None or isinstance(b2, float) else no_weight(),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByMomentsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMomentsState]:
        del params, extra_args
        signals.check_plain("scale_by_moments", updates)
        mu_leaves, nu_leaves = (storages.leaves(m, updates, state.count) for m in ("mu", "nu"))
        last_mu = storages.loaded("scale_by_moments", mu_storage, state.mu, mu_leaves)
        last_nu = storages.loaded("scale_by_moments", nu_storage, state.nu, nu_leaves)
        mu_rates, mu_weight = _rates("b1", b1, state.count, state.mu_weight)
        nu_rates, nu_weight = _rates("b2", b2, state.count, state.nu_weight)

        @signals.shared
        def averaged(grad, last_mu, last_nu, mu_decay, nu_decay):
            mu, nu = grad, None
            if last_mu is not None:
                mu_decay = signals.cast(mu_decay, last_mu.dtype)
                mu = (1 - mu_decay) * grad + mu_decay * last_mu
            if last_nu is not None:
                nu = rule(grad, mu, last_nu, signals.cast(nu_decay, last_nu.dtype))
            return mu, nu

        def leaf(grad, last_mu, last_nu):
            grad = jnp.asarray(grad)
            dtype = signals.accumulator(grad.dtype)
            for moment in (last_mu, last_nu):
                dtype = dtype if moment is None else signals.wider(dtype, moment.dtype)
            last_mu = None if last_mu is None else last_mu.astype(dtype)
            last_nu = None if last_nu is None else last_nu.astype(signals.real(dtype))
            decays = mu_rates.decay, nu_rates.decay
            mu, nu = averaged(grad.astype(dtype), last_mu, last_nu, *decays)
            return Moments(
                grad=grad,
                mu=mu,
                nu=nu,
                mu_decay=mu_rates.decay,
                nu_decay=nu_rates.decay,
                mu_weight=mu_rates.weight,
                nu_weight=nu_rates.weight,
                mu_next_decay=mu_rates.next_decay,
                mu_next_weight=mu_rates.next_weight,
                nu_length=nu_rates.length,
                last=Last(last_mu, last_nu, mu_rates.last_weight, nu_rates.last_weight),
            )

        absent = jax.tree.map(lambda _: None, updates)
        inputs = (
            updates,
            absent if last_mu is None else last_mu,
            absent if last_nu is None else last_nu,
        )
        moments = jax.tree.map(leaf, *inputs)
        new_mu, new_nu = (signals.picked(moment, moments) for moment in ("mu", "nu"))
        if recompute:
            # XLA would merge what is computed twice if it knew that no count is negative.
            same = signals.shared(lambda x, count: jnp.where(count >= 0, x, jnp.zeros_like(x)))
            inputs = jax.tree.map(lambda x: same(x, state.count), inputs)
            moments = jax.tree.map(leaf, *inputs)
        return moments, ScaleByMomentsState(
            count=optax.safe_increment(state.count),
            mu=storages.saved(mu_storage, new_mu, state.mu, mu_leaves),
            nu=storages.saved(nu_storage, new_nu, state.nu, nu_leaves),
            mu_weight=mu_weight,
            nu_weight=nu_weight,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Rates(NamedTuple):
    """What the signal tells about one moment: scalars, those not known None."""

    decay: Any
    weight: Any
    last_weight: Any
    length: Any
    next_decay: Any = None
    next_weight: Any = None


def no_weight() -> Weight:
    """Nothing gathered yet."""
    return Weight(*(jnp.zeros([], float) for _ in Weight._fields))


def _rates(
    name: str, decay: Any, count: jax.Array, kept: Weight | None
) -> tuple[_Rates, Weight | None]:
    """The rate and the weight at this step, at the last and the next, and the weight to keep."""
    if decay is None:
        return _Rates(0.0, 1.0, 1.0, 1.0, 0.0, 1.0), None
    step = optax.safe_increment(count)
    if isinstance(decay, float) != (kept is None):
        kinds = ["a number", "an array or a schedule"]
        before, today = kinds if kept is None else reversed(kinds)
        raise ValueError(
            f"{name} was {before} when this state was made and is {today} now: the weight gathered "
            f"so far is unknown. Make the state anew with init()."
        )
    if kept is None:
        # optax's arithmetic to the letter, so that the results are bitwise its results.
        power = lambda t: jnp.asarray(decay, float) ** t.astype(float)  # noqa: E731
        last, now, ahead = (1 - power(t) for t in (count, step, optax.safe_increment(step)))
        length = 2 / (1 - decay) - 1 - 2 * step.astype(float) * power(step) / (1 - power(step))
        return _Rates(decay, now, last, length, decay, ahead), None
    if callable(decay):
        now, ahead = (signals.check_scalar(name, decay(t)) for t in (count, step))
    else:
        now, ahead = decay, None
    weight = kept.gather(now)
    rates = _Rates(now, weight.value, kept.value, 2 * weight.age / weight.value + 1)
    if ahead is not None:
        rates = rates._replace(next_decay=ahead, next_weight=weight.gather(ahead).value)
    return rates, weight
