"""Stages from moments to a plain update: the division that makes a step of the averages."""

import jax
import jax.numpy as jnp
import optax

from adam_jax import signals
from adam_jax.correction import debiased, stateless
from adam_jax.signals import Moments


def normalize(
    *, eps: jax.typing.ArrayLike = 1e-8, eps_root: jax.typing.ArrayLike = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Divide the first moment by the root of the second, both as they come.

    .. math:: u = m / (\sqrt{v + \varepsilon_{root}} + \varepsilon)

    Where the denominator is 0 the update is 0, and the derivative through a zero second moment is
    finite without an `eps_root`.

    Args:
      eps: added to the root, finite and at least 0: a number or a 0-d array. Default 1e-8.
      eps_root: added under the root, likewise. Default 0.

    Returns:
      A stateless gradient transformation from `Moments` to updates in the dtype of the gradient.

    Raises:
      ValueError: if `eps` or `eps_root` is negative, infinite, NaN or not a scalar.
      TypeError: if they are not numbers; in `update`, if it gets plain updates.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(0.9, 0.99), adam_jax.normalize())
      >>> update, _ = stages.update(jnp.array([-3.0]), stages.init(jnp.zeros(1)))
      >>> print(update)  # not debiased: 0.1 / sqrt(0.01)
      [-1.]

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1; without its bias correction.
    """
    eps = signals.check_hyperparameter("eps", eps)
    eps_root = signals.check_hyperparameter("eps_root", eps_root)
    return stateless("normalize", lambda moments: normalized(moments, eps, eps_root))


def bias_correct(
    *,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    eps_hat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Debias both moments and divide: Adam's direction, `debias` and `normalize` as one stage.

    .. math:: u = \hat m / (\sqrt{\hat v + \varepsilon_{root}} + \varepsilon)

    With ``eps_hat=True`` the epsilons join the moment before it is corrected, the convention of
    Keras and TensorFlow, which makes them larger by :math:`1 / \sqrt{w_2}` in the first steps:

    .. math:: u = \frac{\sqrt{w_2}}{w_1} m / (\sqrt{v + \varepsilon_{root}} + \hat\varepsilon)

    Args:
      eps: added to the root, finite and at least 0: a number or a 0-d array. Default 1e-8.
      eps_root: added under the root, likewise. Default 0.
      eps_hat: whether the epsilons are those of the uncorrected second moment. Default False.

    Returns:
      A stateless gradient transformation from `Moments` to updates in the dtype of the gradient.

    Raises:
      ValueError: if `eps` or `eps_root` is negative, infinite, NaN or not a scalar.
      TypeError: if they are not numbers, or are passed by position; in `update`, if it gets plain
        updates.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(0.9, 0.99), adam_jax.bias_correct())
      >>> update, _ = stages.update(jnp.array([-3.0]), stages.init(jnp.zeros(1)))
      >>> print(update)
      [-1.]

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1; `eps_hat` is the reordering at the
    end of its section 2.
    """
    eps = signals.check_hyperparameter("eps", eps)
    eps_root = signals.check_hyperparameter("eps_root", eps_root)

    def corrected(moments: Moments) -> jax.Array:
        if not eps_hat:
            return normalized(debiased(moments), eps, eps_root)
        scale = jnp.sqrt(moments.nu_weight) / moments.mu_weight
        mu = moments.mu * signals.cast(scale, moments.mu.dtype)
        return normalized(moments._replace(mu=mu), eps, eps_root)

    return stateless("bias_correct", corrected)


def normalized(
    moments: Moments, eps: jax.typing.ArrayLike, eps_root: jax.typing.ArrayLike
) -> jax.Array:
    """`normalize` on one leaf."""
    mu, nu = moments.mu, moments.nu
    root = sqrt(nu + signals.cast(eps_root, nu.dtype))
    denominator = (root + signals.cast(eps, nu.dtype)).astype(mu.dtype)
    return divide(mu, denominator).astype(moments.grad.dtype)


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """The root, with derivative 0 at 0: infinity there would turn every meta-gradient to NaN."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    root = sqrt(primals[0])
    return root, divide(tangents[0], 2 * root)


def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """The quotient, and 0 where the divisor is 0.

    One select on the divisor: it stops the derivative too, and leaves XLA the division to simplify
    as it does for optax (a select on the quotient would cost the bitwise equality).
    """
    return x / jnp.where(y == 0, jnp.inf, y)
