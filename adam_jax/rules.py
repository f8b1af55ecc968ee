"""Rules for the second moment: from the gradient and the last one to the next one.

A rule is a pure function `(grad, mu, nu, decay) -> nu` of one leaf. `scale_by_moments` takes one of
these, or your own. `from_first_gradient` is a rate for one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_jax._checks import check_hyperparameter
from adam_jax._numerics import Rate, Scalar, scalar
from adam_jax.average import mixed


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
    r"""AdaBelief's second moment, the moving average of (gradient − first moment)².

    .. math:: v_t = (1 - b_2) |g_t - m_t|^2 + b_2 v_{t-1} + \varepsilon_{root}

    Args:
      grad: the gradient :math:`g_t` of one leaf, real or complex, at least float32.
      mu: the first moment :math:`m_t`, already updated, same shape.
      nu: the second moment :math:`v_{t-1}`, same shape, real.
      decay: the rate :math:`b_2`, a scalar.
      eps_root: added to the second moment at every step, so that it adds up: a number or a 0-d
        array. Default 0.

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
    r"""Yogi's second moment: it grows or shrinks by a fixed share of the squared gradient.

    .. math:: v_t = v_{t-1} - (1 - b_2) \operatorname{sign}(v_{t-1} - |g_t|^2) |g_t|^2

    Args:
      grad: the gradient :math:`g_t` of one leaf, real or complex, at least float32.
      mu: the first moment, same shape; not used by this rule.
      nu: the second moment :math:`v_{t-1}`, same shape, real.
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
    r"""Adamax's second moment, the square of a decaying maximum of the gradient's magnitude.

    .. math:: \sqrt{v_t} = \max(b_2 \sqrt{v_{t-1}}, |g_t| + \varepsilon)

    A maximum is not biased towards its start at 0: after `scale_by_moments` with this rule put
    ``debias(nu=False)`` and ``normalize(eps=0)``.

    Args:
      grad: the gradient :math:`g_t` of one leaf, real or complex, at least float32.
      mu: the first moment, same shape; not used by this rule.
      nu: the second moment :math:`v_{t-1}`, same shape, real.
      decay: the rate :math:`b_2`, a scalar.
      eps: added to the magnitude of the gradient: a number or a 0-d array. Default 0.

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

    A sum does not decay, and there is nothing to debias: give `scale_by_moments` ``b2=0``, by which
    the weight is 1 from the first step on.

    Args:
      grad: the gradient :math:`g_t` of one leaf, real or complex, at least float32.
      mu: the first moment, same shape; not used by this rule.
      nu: the second moment :math:`v_{t-1}`, same shape, real.
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


def from_first_gradient(b2: "Rate") -> optax.Schedule:
    r"""A rate for an average that starts with the first gradient, not with 0: ADOPT's.

    .. math:: b_{2,t} = 0 \text{ for } t = 1, \text{ else } b_2

    so that :math:`v_1 = |g_1|^2`, and there is nothing to debias.

    Args:
      b2: the rate :math:`b_2` from the second step on, in [0, 1): a number, a 0-d array of at least
        float32, or a schedule from the number of steps taken so far to the rate.

    Returns:
      A schedule for the `b2` of `scale_by_moments`.

    Raises:
      ValueError: if `b2` is outside [0, 1), not a scalar or in less than float32.
      TypeError: if `b2` is not a number, an array or a schedule.

    Example:
      >>> rate = from_first_gradient(0.9)
      >>> print(rate(0), rate(1))
      0.0 0.9

    Source: Taniguchi et al., "ADOPT" (arXiv 2411.02853), algorithm 2.
    """
    b2 = check_hyperparameter("b2", b2, upper=1, schedule=True)

    def schedule(count: Any) -> jax.Array:
        rate = jnp.asarray(b2(count) if callable(b2) else b2, float)
        return jnp.where(jnp.asarray(count) > 0, rate, 0.0)

    return schedule
