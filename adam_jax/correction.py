"""Stages from moments to moments: what is done to the averages before they are divided."""

from typing import Any

import optax

from adam_jax import signals
from adam_jax.signals import Moments


def debias() -> optax.GradientTransformationExtraArgs:
    r"""Divide each moment by the weight it has gathered.

    .. math:: \hat m_t = m_t / w_1, \qquad \hat v_t = v_t / w_2, \qquad w_i = 1 - \prod b_i

    An average that starts at 0 is too small by exactly this weight. Afterwards the weights are 1,
    so that a second `debias` changes nothing.

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      TypeError: in `update`, if it gets plain updates instead of `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(), adam_jax.debias())
      >>> moments, _ = stages.update(jnp.array([3.0]), stages.init(jnp.zeros(1)))
      >>> print(moments.mu, moments.nu, moments.mu_weight)
      [3.] [9.] 1.0

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), section 3.
    """
    return stateless("debias", debiased)


def nesterov() -> optax.GradientTransformationExtraArgs:
    r"""Look one step ahead with the first moment, as Nesterov's momentum does.

    .. math:: \hat m_t = b_{t+1} \frac{m_t}{w_{t+1}} + (1 - b_t) \frac{g_t}{w_t}

    with the rate :math:`b` and the gathered weight :math:`w` of the first moment. The result is
    debiased (its weight is 1), the second moment is left alone. A rate that is injected step by
    step is not known one step ahead, so it is taken to stay.

    Returns:
      A stateless gradient transformation from `Moments` to `Moments`.

    Raises:
      TypeError: in `update`, if it gets plain updates instead of `Moments`.

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
    return stateless("nesterov", looked_ahead)


def debiased(moments: Moments) -> Moments:
    """`debias` on one leaf."""
    mu, nu = moments.mu, moments.nu
    return moments._replace(
        mu=mu / signals.cast(moments.mu_weight, mu.dtype),
        nu=nu / signals.cast(moments.nu_weight, nu.dtype),
        mu_weight=1.0,
        nu_weight=1.0,
        mu_next_weight=1.0,
    )


def looked_ahead(moments: Moments) -> Moments:
    """`nesterov` on one leaf."""
    grad, mu, dtype = moments.grad, moments.mu, moments.mu.dtype
    decay, weight = moments.mu_decay, signals.cast(moments.mu_weight, dtype)
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
        return signals.map_moments(stage, leaf, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
