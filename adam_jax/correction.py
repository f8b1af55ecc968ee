"""Stages from moments to moments: they change the averages before the division.

In `update` each of them raises a TypeError if it gets plain updates instead of `Moments`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax._checks import check_bool, check_hyperparameter, check_scalar
from adam_jax._jit import once
from adam_jax._numerics import Rate, Scalar, as_count, increment, scalar
from adam_jax.average import Average, mixed, no_weights, step_weights
from adam_jax.sharding import over_shards
from adam_jax.signal import Moments, map_moments, stateless
from adam_jax.storage._protocol import Slot, StorageLike


def debias(*, mu: bool = True, nu: bool = True) -> optax.GradientTransformationExtraArgs:
    r"""Divide each moment by the weight it has gathered.

    .. math:: \hat m_t = m_t / w_1, \qquad \hat v_t = v_t / w_2, \qquad w_i = 1 - \prod b_i

    with the product over the rates of all steps so far. An average that starts at 0 is too small by
    exactly the factor w. Afterwards the weights are 1, so that a second `debias` changes nothing.

    Args:
      mu: whether to debias the first moment. Default True.
      nu: whether to debias the second moment; False for one that is no average, such as that of
        `infinity`. Default True.

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      TypeError: if `mu` or `nu` is not a bool; in `update`, if it gets plain updates instead of
        `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(), adam_jax.debias())
      >>> moments, _ = stages.update(jnp.array([3.0]), stages.init(jnp.zeros(1)))
      >>> print(moments.mu.value, moments.nu.value, moments.mu.weight)
      [3.] [9.0] 1.0

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), section 3.
    """
    return stateless("debias", _debiased, check_bool("mu", mu), check_bool("nu", nu))


def _debiased(moments: Moments, mu: bool, nu: bool) -> Moments:
    if mu:
        moments = moments._replace(mu=moments.mu.debiased())
    if nu and moments.nu is not None:
        moments = moments._replace(nu=moments.nu.debiased())
    return moments


def nesterov(
    momentum: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Look one step ahead with the first moment, as Nesterov's momentum does.

    .. math:: \hat m_t = b_{t+1} \frac{m_t}{w_{t+1}} + (1 - b_t) \frac{g_t}{w_t},
              \qquad w_t = 1 - \prod_{s \le t} b_s

    with the rates of the first moment, or with a momentum schedule for the look-ahead alone, as in
    PyTorch and Keras. The resulting first moment is debiased (its weight is 1); the second moment
    stays as it is. A rate that is injected step by step is not known one step ahead, so the next
    rate is taken to be the same.

    Args:
      momentum: a schedule from the number of steps taken so far to the rate :math:`b_t` of a
        step. None, the default: the rates that the `Moments` carry.

    Returns:
      A gradient transformation from `Moments` to `Moments`: with a `NesterovState` if `momentum` is
      given, else stateless.

    Raises:
      TypeError: if `momentum` is neither a schedule nor None; in `update`, if it gets plain updates
        instead of `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> nadam = optax.chain(
      ...     adam_jax.scale_by_moments(b1=0.5),
      ...     adam_jax.nesterov(),
      ...     adam_jax.bias_correct(),
      ...     adam_jax.scale_by_lr(1.0),
      ... )
      >>> update, _ = nadam.update(jnp.array([3.0]), nadam.init(jnp.zeros(1)))
      >>> print(update)  # -(0.5 * 0.5 / 0.75 + 0.5 / 0.5)
      [-1.3333]

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (ICLR 2016 workshop), algorithm 2.
    """
    if momentum is None:
        return stateless("nesterov", _looked_ahead)
    if not callable(momentum):
        raise TypeError(f"momentum must be a schedule or None, got {momentum!r}.")

    def init_fn(params):
        del params
        return NesterovState(jnp.zeros([], jnp.int32), no_weights(1))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        count = as_count(state.count)
        averages, weights = step_weights("nesterov", state, {"momentum": momentum}, count)

        def looked_ahead(moments):
            rates = averages["momentum"]._replace(previous=moments.mu.previous)
            mu = once(_with_rates, moments.mu, rates)
            return moments._replace(mu=once(Average.looked_ahead, mu, moments.grad))

        moments = map_moments("nesterov", looked_ahead, updates)
        return moments, NesterovState(increment(count), weights)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _looked_ahead(moments: Moments) -> Moments:
    return moments._replace(mu=moments.mu.looked_ahead(moments.grad))


def _with_rates(mu: Average, rates: Average) -> Average:
    """A first moment with the weights of another schedule, or 1 if it has been debiased before."""
    debiased = jnp.asarray(mu.weight) == 1
    return rates._replace(
        value=mu.value,
        weight=jnp.where(debiased, 1, rates.weight),
        next_weight=jnp.where(debiased, 1, rates.next_weight),
    )


class NesterovState(NamedTuple):
    """The state of `nesterov` with a momentum schedule.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates.
      weights: the weight gathered under the momentum schedule, a float array of shape (5, 1).
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    weights: jax.Array


def running_max(*, nu_storage: "StorageLike" = None) -> optax.GradientTransformationExtraArgs:
    r"""AMSGrad: let the second moment never fall.

    .. math:: v^{max}_t = \max(v^{max}_{t-1}, v_t)

    Put before `debias`, it takes the maximum of the raw moments, as the paper, PyTorch and Keras
    do; put after `debias`, that of the corrected moments, as optax does.

    Args:
      nu_storage: how to keep the maximum between steps: a dtype, one of `adam_jax.storage`, or your
        own `Storage`; the maximum may then fall by as much as the storage rounds. None, the
        default: in the dtype of the parameter, at least float32.

    Returns:
      A gradient transformation from `Moments` to `Moments`, with a `RunningMaxState`.

    Raises:
      TypeError: if `nu_storage` is neither a `Storage` nor a dtype; in `update`, if it gets plain
        updates instead of `Moments`, or there is no second moment.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(b2=0.5), adam_jax.running_max())
      >>> state = stages.init(jnp.zeros(1))
      >>> for grad in (2.0, 0.0):
      ...     moments, state = stages.update(jnp.array([grad]), state)
      ...     print(moments.nu.value)
      [2.]
      [2.]

    Source: Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond" (ICLR 2018), algorithm 2.
    """
    slot = Slot.of("running_max", "nu", nu_storage)

    def init_fn(params):
        return RunningMaxState(jnp.zeros([], jnp.int32), slot.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        count = as_count(state.count)
        nu = map_moments("running_max", lambda moments: moments.kept_nu().value, updates)
        nu_max, save = slot.load(state.nu_max, nu, count)
        nu_max = jax.tree.map(jnp.maximum, nu_max, nu)
        moments = map_moments("running_max", _with_nu, updates, nu_max)
        return moments, RunningMaxState(increment(count, draws=slot.rounds), save(nu_max))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _with_nu(moments: Moments, nu: jax.Array) -> Moments:
    return moments._replace(nu=moments.kept_nu().with_value(nu))


class RunningMaxState(NamedTuple):
    """The state of `running_max`.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates; with a storage it goes on
        from 2**30 after 2**31 - 1.
      nu_max: the largest second moments so far, real, as their storage keeps them: a tree shaped
        like the parameters, or a NamedTuple of such trees.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    nu_max: Any


def center() -> optax.GradientTransformationExtraArgs:
    r"""Use the variance as the second moment, and the gradient as the first.

    .. math:: v \mapsto v - |m|^2, \qquad m \mapsto g

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      ValueError: in `update`, if a storage rounds the moments: little but the rounding error would
        be left of the difference.
      TypeError: in `update`, if it gets plain updates instead of `Moments`, or one moment is
        missing.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(0.5, 0.5), adam_jax.center())
      >>> moments, _ = stages.update(jnp.array([2.0]), stages.init(jnp.zeros(1)))
      >>> print(moments.mu.value, moments.nu.value)  # 2 - 1
      [2.] [1.]

    Source: Graves, "Generating Sequences With Recurrent Neural Networks" (arXiv 1308.0850),
    equations 38 to 45.
    """
    return stateless("center", _centered)


def _centered(moments: Moments) -> Moments:
    if moments.rounded is not None:
        raise ValueError(
            "center takes the difference of two moments that are nearly equal, which is noise if "
            "they were rounded between two steps: give adam_jax.scale_by_moments no mu_storage and "
            "no nu_storage."
        )
    mu, nu = moments.kept_mu(), moments.kept_nu()
    # Of a steady gradient the difference is 0, and rounding may leave less.
    variance = jnp.maximum(nu.value - jnp.real(jnp.conj(mu.value) * mu.value), 0)
    grad = Average.memoryless(moments.grad.astype(mu.value.dtype), mu.previous)
    return moments._replace(mu=grad, nu=nu.with_value(variance))


def delay() -> optax.GradientTransformationExtraArgs:
    r"""Use the second moment from before this gradient, so that the two are independent.

    .. math:: v_t \mapsto v_{t-1}, \qquad v_0 = \infty

    Before the first gradient nothing is known, and the infinite moment makes the first step 0. Put
    this stage directly after `scale_by_moments`: it takes the second moment that was kept there,
    and what a stage in between did to it is lost.

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      TypeError: in `update`, if there is a `delay` before it, if there is no second moment, or if
        it gets plain updates instead of `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(b2=0.5), adam_jax.delay())
      >>> state = stages.init(jnp.zeros(1))
      >>> for grad in (2.0, 5.0):
      ...     moments, state = stages.update(jnp.array([grad]), state)
      ...     print(moments.nu.value)
      [inf]
      [2.]

    Source: Taniguchi et al., "ADOPT" (arXiv 2411.02853), algorithm 1.
    """
    return stateless("delay", _delayed)


def _delayed(moments: Moments) -> Moments:
    nu = moments.kept_nu().previous
    if nu is None:
        raise TypeError(
            "delay takes up what came into scale_by_moments, and an earlier delay has taken it "
            "already: leave one of the two out."
        )
    unknown = jnp.asarray(nu.weight) == 0
    nu = nu._replace(
        value=jnp.where(unknown, jnp.inf, nu.value),
        weight=jnp.where(unknown, 1, nu.weight),
        next_weight=jnp.where(unknown, 1, nu.next_weight),
    )
    return moments._replace(nu=nu)


def floor(*, eps: Scalar) -> optax.GradientTransformationExtraArgs:
    r"""Let the root of the second moment be at least `eps`.

    .. math:: v \mapsto \max(v, \varepsilon^2)

    Followed by ``normalize(eps=0)`` this is a division by :math:`\max(\sqrt v, \varepsilon)`.

    Args:
      eps: the least root, finite and at least 0: a number or a 0-d array.

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      ValueError: if `eps` is negative, infinite, NaN or not a scalar.
      TypeError: if `eps` is not a number; in `update`, if it gets plain updates instead of
        `Moments`, or there is no second moment.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(b2=0.5), adam_jax.floor(eps=3.0))
      >>> moments, _ = stages.update(jnp.array([2.0]), stages.init(jnp.zeros(1)))
      >>> print(moments.nu.value)
      [9.]

    Source: Taniguchi et al., "ADOPT" (arXiv 2411.02853), algorithm 1.
    """
    return stateless("floor", _floored, check_hyperparameter("eps", eps))


def _floored(moments: Moments, eps: Scalar) -> Moments:
    nu = moments.kept_nu()
    least = scalar(eps, nu.value.dtype) ** 2
    return moments._replace(nu=nu.with_value(jnp.maximum(nu.value, least)))


def interpolate(b1: Scalar) -> optax.GradientTransformationExtraArgs:
    r"""Replace the first moment by the previous one, mixed with the gradient at another rate: Lion.

    .. math:: m_t \mapsto (1 - b_1) g_t + b_1 m_{t-1}

    Args:
      b1: the decay rate of this mixture, in [0, 1): a number or a 0-d array.

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      ValueError: if `b1` is outside [0, 1) or not a scalar.
      TypeError: if `b1` is not a number; in `update`, if it gets plain updates instead of
        `Moments`, or there is no first moment.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(b1=0.5), adam_jax.interpolate(0.75))
      >>> moments, state = stages.update(jnp.array([4.0]), stages.init(jnp.zeros(1)))
      >>> print(moments.mu.value, state[0].mu)
      [1.] [2.]

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675),
    algorithm 2 (Lion).
    """
    return stateless("interpolate", _interpolated, check_hyperparameter("b1", b1, upper=1))


def _interpolated(moments: Moments, b1: Scalar) -> Moments:
    return moments._replace(mu=moments.kept_mu().previous.stepped(moments.grad, b1))


def mix_slow_moment(
    b3: "Rate" = 0.9999,
    alpha: "Rate" = 5.0,
    *,
    mu_storage: "StorageLike" = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Add a second, slower first moment, which is not debiased: AdEMAMix.

    .. math:: s_t = (1 - b_3) g_t + b_3 s_{t-1}, \qquad m_t \mapsto m_t + \alpha s_t

    Args:
      b3: the decay rate of the slow moment in [0, 1): a number, a 0-d array or a schedule. Default
        0.9999.
      alpha: the factor of the slow moment, finite and at least 0: a number, a 0-d array or a
        schedule. Default 5.
      mu_storage: how to keep the slow moment between steps: a dtype, one of `adam_jax.storage`, or
        your own `Storage`. None, the default: in the dtype of the parameter, at least float32.

    Returns:
      A gradient transformation from `Moments` to `Moments`, with a `MixSlowMomentState`.

    Raises:
      ValueError: if `b3` or `alpha` is out of its range or not a scalar.
      TypeError: if they are not numbers, arrays or schedules, or `mu_storage` is neither a
        `Storage` nor a dtype; in `update`, if it gets plain updates instead of `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(
      ...     adam_jax.scale_by_moments(), adam_jax.debias(), adam_jax.mix_slow_moment(0.5, 2.0)
      ... )
      >>> moments, _ = stages.update(jnp.array([3.0]), stages.init(jnp.zeros(1)))
      >>> print(moments.mu.value)  # 3 + 2 * 1.5
      [6.]

    Source: Pagliardini et al., "The AdEMAMix Optimizer" (arXiv 2409.03137), equation AdEMAMix.
    """
    b3 = check_hyperparameter("b3", b3, upper=1, schedule=True)
    alpha = check_hyperparameter("alpha", alpha, schedule=True)
    slot = Slot.of("mix_slow_moment", "mu", mu_storage)

    def init_fn(params):
        return MixSlowMomentState(jnp.zeros([], jnp.int32), slot.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        count = as_count(state.count)
        decay, share = (
            check_scalar(name, value(count)) if callable(value) else value
            for name, value in (("b3", b3), ("alpha", alpha))
        )
        mu = map_moments("mix_slow_moment", lambda moments: moments.mu.value, updates)
        slow, save = slot.load(state.mu_slow, mu, count)

        def slower(moments, slow):
            return once(mixed, slow, moments.grad.astype(slow.dtype), decay)

        def added(moments, slow):
            return moments._replace(mu=once(_added, moments.mu, slow, share))

        slow = map_moments("mix_slow_moment", slower, updates, slow)
        moments = map_moments("mix_slow_moment", added, updates, slow)
        return moments, MixSlowMomentState(increment(count, draws=slot.rounds), save(slow))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _added(mu: Average, slow: jax.Array, share: Scalar) -> Average:
    slow = slow.astype(mu.value.dtype)
    return mu.with_value(mu.value + scalar(share, slow.dtype) * slow)


class MixSlowMomentState(NamedTuple):
    """The state of `mix_slow_moment`.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates; with a storage it goes on
        from 2**30 after 2**31 - 1.
      mu_slow: the slow first moments, as their storage keeps them: a tree shaped like the
        parameters, or a NamedTuple of such trees.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    mu_slow: Any


def cautious() -> optax.GradientTransformationExtraArgs:
    r"""Move only the elements whose first moment agrees in sign with the gradient of this step.

    .. math:: m \mapsto m \cdot \frac{\phi}{\max(\operatorname{mean} \phi, 10^{-3})},
              \qquad \phi = [m \cdot g > 0]

    The mask :math:`\phi` is 1 where the signs agree and 0 elsewhere. The division by its mean over
    the leaf makes up for the elements that do not move. What divides the moment later is positive
    and changes no sign, so the whole direction agrees with the gradient.

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      TypeError: in `update`, if it gets plain updates instead of `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(b1=0.5), adam_jax.cautious())
      >>> state = stages.init(jnp.zeros(2))
      >>> _, state = stages.update(jnp.array([4.0, 4.0]), state)
      >>> moments, _ = stages.update(jnp.array([2.0, -1.0]), state)
      >>> print(moments.mu.value)
      [4. 0.]

    Source: Liang et al., "Cautious Optimizers" (arXiv 2411.16085), algorithm 1.
    """
    return stateless("cautious", _agreeing)


def _agreeing(moments: Moments) -> Moments:
    mu = moments.mu.value
    product = jnp.real(jnp.conj(mu) * moments.grad.astype(mu.dtype))
    agrees = (product > 0).astype(product.dtype)
    share = over_shards(jax.lax.pmean, jnp.mean(agrees), mu) if mu.size else 1.0
    scale = agrees / jnp.maximum(share, 1e-3)
    return moments._replace(mu=moments.mu.with_value(mu * scale.astype(mu.dtype)))
