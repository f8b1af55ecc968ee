"""Stages from moments to moments: what is done to the averages before they are divided."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax import signals
from adam_jax import storage as storages
from adam_jax.moments import Weight, no_weight
from adam_jax.signals import Moments
from adam_jax.storage import Storage


def debias(*, mu: bool = True, nu: bool = True) -> optax.GradientTransformationExtraArgs:
    r"""Divide each moment by the weight it has gathered.

    .. math:: \hat m_t = m_t / w_1, \qquad \hat v_t = v_t / w_2, \qquad w_i = 1 - \prod b_i

    An average that starts at 0 is too small by exactly this weight. Afterwards the weights are 1,
    so that a second `debias` changes nothing.

    Args:
      mu: whether to debias the first moment. Default True.
      nu: whether to debias the second moment; False for one that is no average, such as that of
        `infinity`. Default True.

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      TypeError: in `update`, if it gets plain updates instead of `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(), adam_jax.debias())
      >>> moments, _ = stages.update(jnp.array([3.0]), stages.init(jnp.zeros(1)))
      >>> print(moments.mu, moments.nu, moments.mu_weight)
      [3.] [9.0] 1.0

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), section 3.
    """

    def leaf(moments: Moments) -> Moments:
        moments = debiased_mu(moments) if mu else moments
        return debiased_nu(moments) if nu else moments

    return stateless("debias", leaf)


def nesterov(
    momentum: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Look one step ahead with the first moment, as Nesterov's momentum does.

    .. math:: \hat m_t = b_{t+1} \frac{m_t}{w_{t+1}} + (1 - b_t) \frac{g_t}{w_t},
              \qquad w_t = 1 - \prod_{s \le t} b_s

    with the rates of the first moment, or with a momentum schedule of the look-ahead's own, as in
    PyTorch and Keras. The result is debiased (its weight is 1), the second moment is left alone. A
    rate that is injected step by step is not known one step ahead, so it is taken to stay.

    Args:
      momentum: a schedule from the number of steps taken so far to the rate :math:`b_{t+1}`; None
        takes the rates that the signal carries. Default None.

    Returns:
      A gradient transformation from `Moments` to `Moments`, stateless without `momentum`, with it
      with a `NesterovState`.

    Raises:
      TypeError: if `momentum` is not a schedule; in `update`, if it gets plain updates instead of
        `Moments`.

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
        return stateless("nesterov", looked_ahead)
    if not callable(momentum):
        raise TypeError(f"momentum must be a schedule or None, got {momentum!r}.")

    def init_fn(params):
        del params
        return NesterovState(jnp.zeros([], jnp.int32), no_weight())

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        step = optax.safe_increment(state.count)
        now, ahead = (signals.check_scalar("momentum", momentum(t)) for t in (state.count, step))
        weight = state.weight.gather(now)

        def leaf(moments: Moments) -> Moments:
            scheduled = moments._replace(
                mu_decay=now,
                mu_weight=weight.value,
                mu_next_decay=ahead,
                mu_next_weight=weight.gather(ahead).value,
            )
            return looked_ahead(scheduled)

        return signals.map_moments("nesterov", leaf, updates), NesterovState(step, weight)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class NesterovState(NamedTuple):
    """The state of `nesterov` with a momentum schedule.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates.
      weight: the weight gathered under the momentum schedule.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    weight: Weight


def running_max(*, nu_storage: Storage | None = None) -> optax.GradientTransformationExtraArgs:
    r"""AMSGrad: let the second moment never fall.

    .. math:: v^{max}_t = \max(v^{max}_{t-1}, v_t)

    Before `debias` the maximum is that of the raw moments, the order of the paper, of PyTorch and
    of Keras; after it that of the corrected ones, the order of optax.

    Args:
      nu_storage: how to keep the maximum between steps, from `adam_jax.storage` or your own; it may
        fall by as much as that rounds. None, the default, keeps it in at least float32.

    Returns:
      A gradient transformation from `Moments` to `Moments`, with a `RunningMaxState`.

    Raises:
      TypeError: if `nu_storage` is not a `Storage`; in `update`, if it gets plain updates instead
        of `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(b2=0.5), adam_jax.running_max())
      >>> state = stages.init(jnp.zeros(1))
      >>> for grad in (2.0, 0.0):
      ...     moments, state = stages.update(jnp.array([grad]), state)
      ...     print(moments.nu)
      [2.]
      [2.]

    Source: Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond" (ICLR 2018), algorithm 2.
    """

    nu_storage = storages.chosen("nu", nu_storage)

    def init_fn(params):
        nu_max = storages.initial(nu_storage, params, storages.leaves("nu", params))
        return RunningMaxState(jnp.zeros([], jnp.int32), nu_max)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        nu = signals.map_moments("running_max", signals.second_moment, updates)
        leaves = storages.leaves("nu", nu, state.count)
        largest = storages.loaded("running_max", nu_storage, state.nu_max, leaves)
        nu = jax.tree.map(lambda nu, most: jnp.maximum(most.astype(nu.dtype), nu), nu, largest)
        moments = signals.map_moments("running_max", lambda m, nu: m._replace(nu=nu), updates, nu)
        kept = storages.saved(nu_storage, nu, state.nu_max, leaves)
        return moments, RunningMaxState(optax.safe_increment(state.count), kept)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class RunningMaxState(NamedTuple):
    """The state of `running_max`.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates.
      nu_max: the largest second moments so far, a tree shaped like the parameters, real, each as
        its storage keeps it.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    nu_max: optax.Updates


def center() -> optax.GradientTransformationExtraArgs:
    r"""Take the variance for the second moment, and the gradient for the first.

    .. math:: v \mapsto v - |m|^2, \qquad m \mapsto g

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      TypeError: in `update`, if it gets plain updates instead of `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(0.5, 0.5), adam_jax.center())
      >>> moments, _ = stages.update(jnp.array([2.0]), stages.init(jnp.zeros(1)))
      >>> print(moments.mu, moments.nu)  # 2 - 1
      [2.] [1.]

    Source: Graves, "Generating Sequences With Recurrent Neural Networks" (arXiv 1308.0850),
    equations 38 to 45.
    """

    def leaf(moments: Moments) -> Moments:
        mu = signals.first_moment(moments)
        # Of a steady gradient the difference is 0, and rounding may leave less.
        nu = jnp.maximum(signals.second_moment(moments) - jnp.real(jnp.conj(mu) * mu), 0)
        return moments._replace(mu=moments.grad.astype(mu.dtype), mu_weight=1.0, nu=nu)

    return stateless("center", leaf)


def delay() -> optax.GradientTransformationExtraArgs:
    r"""Take the second moment before this gradient joined it, so that the two are independent.

    .. math:: v_t \mapsto v_{t-1}, \qquad v_0 = \infty

    Before the first gradient nothing is known, and the infinite moment makes the first step 0. Put
    this stage directly after `scale_by_moments`: it takes up what came in there.

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      TypeError: in `update`, if it gets plain updates instead of `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(b2=0.5), adam_jax.delay())
      >>> state = stages.init(jnp.zeros(1))
      >>> for grad in (2.0, 5.0):
      ...     moments, state = stages.update(jnp.array([grad]), state)
      ...     print(moments.nu)
      [inf]
      [2.]

    Source: Taniguchi et al., "ADOPT" (arXiv 2411.02853), algorithm 1.
    """

    def leaf(moments: Moments) -> Moments:
        signals.second_moment(moments)
        nu, weight = moments.last.nu, moments.last.nu_weight
        unknown = jnp.asarray(weight) == 0
        return moments._replace(
            nu=jnp.where(unknown, jnp.inf, nu), nu_weight=jnp.where(unknown, 1, weight)
        )

    return stateless("delay", leaf)


def floor(*, eps: jax.typing.ArrayLike) -> optax.GradientTransformationExtraArgs:
    r"""Let the root of the second moment be at least `eps`.

    .. math:: v \mapsto \max(v, \varepsilon^2)

    Followed by ``normalize(eps=0)`` this is a division by :math:`\max(\sqrt v, \varepsilon)`.

    Args:
      eps: the least root, finite and at least 0: a number or a 0-d array.

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      ValueError: if `eps` is negative, infinite, NaN or not a scalar.
      TypeError: if `eps` is not a number; in `update`, if it gets plain updates.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(b2=0.5), adam_jax.floor(eps=3.0))
      >>> moments, _ = stages.update(jnp.array([2.0]), stages.init(jnp.zeros(1)))
      >>> print(moments.nu)
      [9.]

    Source: Taniguchi et al., "ADOPT" (arXiv 2411.02853), algorithm 1.
    """
    eps = signals.check_hyperparameter("eps", eps)

    def leaf(moments: Moments) -> Moments:
        nu = signals.second_moment(moments)
        return moments._replace(nu=jnp.maximum(nu, signals.cast(eps, nu.dtype) ** 2))

    return stateless("floor", leaf)


def interpolate(b1: signals.Scalar) -> optax.GradientTransformationExtraArgs:
    r"""Step with another average than the one that is kept.

    .. math:: m_t \mapsto (1 - b_1) g_t + b_1 m_{t-1}

    Args:
      b1: the rate of the step's average, in [0, 1): a number or a 0-d array.

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      ValueError: if `b1` is outside [0, 1) or not a scalar.
      TypeError: if `b1` is not a number; in `update`, if it gets plain updates.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(b1=0.5), adam_jax.interpolate(0.75))
      >>> moments, state = stages.update(jnp.array([4.0]), stages.init(jnp.zeros(1)))
      >>> print(moments.mu, state[0].mu)
      [1.] [2.]

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675),
    algorithm 2 (Lion).
    """
    b1 = signals.check_hyperparameter("b1", b1, upper=1)

    def leaf(moments: Moments) -> Moments:
        signals.first_moment(moments)
        dtype = moments.mu.dtype
        decay = signals.cast(b1, dtype)
        mu = (1 - decay) * moments.grad.astype(dtype) + decay * moments.last.mu
        weight = 1 - b1 * (1 - moments.last.mu_weight)
        return moments._replace(mu=mu, mu_weight=weight)

    return stateless("interpolate", leaf)


def mix_slow_moment(
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 5.0,
    *,
    mu_dtype: Any | None = None,
    mu_storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Add a second, slower first moment, which fills up without correction.

    .. math:: s_t = (1 - b_3) g_t + b_3 s_{t-1}, \qquad m_t \mapsto m_t + \alpha s_t

    Args:
      b3: the decay rate of the slow moment in [0, 1): a number, a 0-d array or a schedule. Default
        0.9999.
      alpha: its share, finite and at least 0, likewise. Default 5.
      mu_dtype: the dtype to keep the slow moment in. None keeps the dtype of the parameter, or
        float32 where that is smaller.
      mu_storage: another way to keep it, from `adam_jax.storage` or your own, instead of
        `mu_dtype`. Default None.

    Returns:
      A gradient transformation from `Moments` to `Moments`, with a `MixSlowMomentState`.

    Raises:
      ValueError: if `b3` or `alpha` is out of its range or not a scalar.
      TypeError: if they are not numbers, arrays or schedules; in `update`, if it gets plain
        updates.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(
      ...     adam_jax.scale_by_moments(), adam_jax.debias(), adam_jax.mix_slow_moment(0.5, 2.0)
      ... )
      >>> moments, _ = stages.update(jnp.array([3.0]), stages.init(jnp.zeros(1)))
      >>> print(moments.mu)  # 3 + 2 * 1.5
      [6.]

    Source: Pagliardini et al., "The AdEMAMix Optimizer" (arXiv 2409.03137), equation AdEMAMix.
    """
    b3 = signals.check_hyperparameter("b3", b3, upper=1, schedule=True)
    alpha = signals.check_hyperparameter("alpha", alpha, schedule=True)
    mu_dtype = signals.check_dtype("mu_dtype", mu_dtype, jnp.inexact)
    mu_storage = storages.chosen("mu", mu_storage, mu_dtype)

    def init_fn(params):
        slow = storages.initial(mu_storage, params, storages.leaves("mu", params))
        return MixSlowMomentState(jnp.zeros([], jnp.int32), slow)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        decay, share = (
            signals.check_scalar(name, value(state.count)) if callable(value) else value
            for name, value in (("b3", b3), ("alpha", alpha))
        )

        def slower(moments, slow):
            dtype = moments.mu.dtype
            b = signals.cast(decay, dtype)
            return (1 - b) * moments.grad.astype(dtype) + b * slow.astype(dtype)

        def mixed(moments, slow):
            return moments._replace(mu=moments.mu + signals.cast(share, slow.dtype) * slow)

        mu = signals.map_moments("mix_slow_moment", lambda moments: moments.mu, updates)
        leaves = storages.leaves("mu", mu, state.count)
        slow = storages.loaded("mix_slow_moment", mu_storage, state.mu_slow, leaves)
        slow = signals.map_moments("mix_slow_moment", slower, updates, slow)
        moments = signals.map_moments("mix_slow_moment", mixed, updates, slow)
        kept = storages.saved(mu_storage, slow, state.mu_slow, leaves)
        return moments, MixSlowMomentState(optax.safe_increment(state.count), kept)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class MixSlowMomentState(NamedTuple):
    """The state of `mix_slow_moment`.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates.
      mu_slow: the slow first moments, a tree shaped like the parameters, each as its storage keeps
        it.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    mu_slow: optax.Updates


def cautious() -> optax.GradientTransformationExtraArgs:
    r"""Move only the elements whose first moment agrees in sign with the gradient of this step.

    .. math:: m \mapsto m \cdot \frac{\phi}{\max(\operatorname{mean} \phi, 10^{-3})},
              \qquad \phi = [m \cdot g > 0]

    with the mean over the leaf, so that the step keeps its size. Whatever divides the moment later
    is positive, so this is the caution of the whole direction.

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
      >>> print(moments.mu)
      [4. 0.]

    Source: Liang et al., "Cautious Optimizers" (arXiv 2411.16085), algorithm 1.
    """

    def leaf(moments: Moments) -> Moments:
        mu = moments.mu
        product = jnp.real(jnp.conj(mu) * moments.grad.astype(mu.dtype))
        agrees = (product > 0).astype(product.dtype)
        share = jnp.mean(agrees) if mu.size else 1.0
        scale = agrees / jnp.maximum(share, 1e-3)
        return moments._replace(mu=mu * scale.astype(mu.dtype))

    return stateless("cautious", leaf)


def debiased_mu(moments: Moments) -> Moments:
    """The first moment of one leaf over its weight."""
    mu = moments.mu / signals.cast(moments.mu_weight, moments.mu.dtype)
    return moments._replace(mu=mu, mu_weight=1.0, mu_next_weight=1.0)


def debiased_nu(moments: Moments) -> Moments:
    """The second moment of one leaf, where there is one, over its weight."""
    if moments.nu is None:
        return moments
    nu = moments.nu / signals.cast(moments.nu_weight, moments.nu.dtype)
    return moments._replace(nu=nu, nu_weight=1.0)


def looked_ahead(moments: Moments) -> Moments:
    """`nesterov` on one leaf."""
    grad, mu, dtype = moments.grad, moments.mu, moments.mu.dtype
    decay, weight = (signals.cast(x, dtype) for x in (moments.mu_decay, moments.mu_weight))
    next_decay, next_weight = moments.mu_next_decay, moments.mu_next_weight
    if next_decay is None:
        next_decay = decay
    if next_weight is None:
        next_weight = 1 - next_decay * (1 - weight)
    next_decay, next_weight = signals.cast(next_decay, dtype), signals.cast(next_weight, dtype)
    ahead = next_decay * (mu / next_weight) + (1 - decay) * (grad.astype(mu.dtype) / weight)
    return moments._replace(mu=ahead, mu_weight=1.0, mu_next_weight=1.0)


def stateless(stage: str, leaf: Any) -> optax.GradientTransformationExtraArgs:
    """A stage without state: `leaf` on every `Moments` of the tree."""

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return signals.map_moments(stage, signals.shared(leaf), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
