"""Stages from moments to a plain update: the division that makes a step of the averages."""

import math

import jax
import jax.numpy as jnp
import optax

from adam_jax import signals
from adam_jax.correction import debiased_mu, debiased_nu, stateless
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

    return stateless("bias_correct", lambda moments: corrected(moments, eps, eps_root, eps_hat))


def rectify(
    *,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    threshold: signals.Scalar = 5.0,
    eps_hat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""RAdam: trust the division as far as the second moment has seen enough gradients.

    .. math::

      u = r_t \frac{\hat m}{\sqrt{\hat v + \varepsilon_{root}} + \varepsilon}
      \text{ if } \rho_t \ge \text{threshold, else } \hat m, \qquad
      r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
                      {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}}

    with the length :math:`\rho_t` that the signal carries as `nu_length`, and
    :math:`\rho_\infty = 2 / (1 - b_2) - 1`. It works for any second moment and for moving rates:
    under a falling one :math:`\rho_\infty` is :math:`\rho_t` at least, so that :math:`r_t \le 1`.

    Args:
      eps: added to the root, finite and at least 0: a number or a 0-d array. Default 1e-8.
      eps_root: added under the root, likewise. Default 0.
      threshold: the length from which on to divide, at least 4. Default 5.
      eps_hat: whether the epsilons are those of the uncorrected second moment, as in PyTorch.
        Default False.

    Returns:
      A stateless gradient transformation from `Moments` to updates in the dtype of the gradient.

    Raises:
      ValueError: if `eps`, `eps_root` or `threshold` is out of its range or not a scalar.
      TypeError: if they are not numbers; in `update`, if it gets plain updates.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(), adam_jax.rectify())
      >>> update, _ = stages.update(jnp.array([-3.0]), stages.init(jnp.zeros(1)))
      >>> print(update)  # the first step is that of momentum
      [-3.0]

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (arXiv
    1908.03265), algorithm 2.
    """
    eps = signals.check_hyperparameter("eps", eps)
    eps_root = signals.check_hyperparameter("eps_root", eps_root)
    threshold = signals.check_hyperparameter("threshold", threshold)
    if isinstance(threshold, float) and threshold < 4:
        raise ValueError(f"threshold must be at least 4, got {threshold!r}.")

    def leaf(moments: Moments) -> jax.Array:
        length, limit = moments.nu_length, 2.0 / (1.0 - moments.nu_decay) - 1.0
        if isinstance(limit, float):
            limit = max(limit, 5.0)  # a shorter one is never long enough, but must have a root
        else:
            # Under a falling rate the average is longer than its rate of today will leave it.
            limit = jnp.maximum(jnp.maximum(limit, 5.0), signals.cast(length, limit.dtype))
        long_enough = length >= signals.cast(threshold, jnp.result_type(float))
        # A length below 4 has no root: it must reach neither the value nor the derivative.
        safe = jnp.where(long_enough, length, 5.0)
        ratio = (safe - 4.0) * (safe - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * safe)
        moments = debiased_mu(moments)
        scaled = signals.cast(jnp.sqrt(ratio), moments.mu.dtype) * moments.mu
        divided = corrected(moments._replace(mu=scaled), eps, eps_root, eps_hat)
        return jnp.where(long_enough, divided, moments.mu.astype(moments.grad.dtype))

    return stateless("rectify", leaf)


def atan2(*, scale: jax.typing.ArrayLike = 4 / math.pi) -> optax.GradientTransformationExtraArgs:
    r"""Divide without an epsilon: Adam-atan2.

    .. math:: u = a \operatorname{atan2}(\hat m, \sqrt{\hat v})

    At :math:`|\hat m| = \sqrt{\hat v}` the default makes it ±1, as Adam's; it never exceeds 2. It
    does not change when all gradients are scaled, however small they are.

    Args:
      scale: the factor :math:`a`, finite and at least 0: a number or a 0-d array. Default
        :math:`4 / \pi`.

    Returns:
      A stateless gradient transformation from `Moments` to updates in the dtype of the gradient.

    Raises:
      ValueError: if `scale` is negative, infinite, NaN or not a scalar.
      TypeError: if it is not a number; in `update`, if it gets plain updates.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(), adam_jax.atan2())
      >>> update, _ = stages.update(jnp.array([-1e-12]), stages.init(jnp.zeros(1)))
      >>> print(update)
      [-1.0]

    Source: Everett et al., "Scaling Exponents Across Parameterizations and Optimizers" (arXiv
    2407.05872), section 4.3.
    """
    scale = signals.check_hyperparameter("scale", scale)

    def leaf(moments: Moments) -> jax.Array:
        moments = debiased_nu(debiased_mu(moments))
        mu, root = moments.mu, sqrt(signals.second_moment(moments))
        # atan2(0, 0) is 0 with an undefined derivative, atan2(0, 1) is 0 with a derivative.
        root = jnp.where((root == 0) & (mu == 0), 1, root)
        if jnp.iscomplexobj(mu):
            angle = jnp.sign(mu) * jnp.arctan2(jnp.abs(mu), root).astype(mu.dtype)
        else:
            angle = jnp.arctan2(mu, root)
        # An infinite gradient has an angle, 0 times it has none: it shall not pass unseen.
        angle = angle + 0 * mu
        return (signals.cast(scale, mu.dtype) * angle).astype(moments.grad.dtype)

    return stateless("atan2", leaf)


def first_moment() -> optax.GradientTransformationExtraArgs:
    r"""Step along the first moment, without any division: momentum.

    .. math:: u = m

    Returns:
      A stateless gradient transformation from `Moments` to updates in the dtype of the gradient.

    Raises:
      TypeError: in `update`, if it gets plain updates instead of `Moments`.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(0.5, None), adam_jax.first_moment())
      >>> update, _ = stages.update(jnp.array([-3.0]), stages.init(jnp.zeros(1)))
      >>> print(update)
      [-1.5]

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods" (1964).
    """
    return stateless("first_moment", lambda moments: moments.mu.astype(moments.grad.dtype))


def corrected(
    moments: Moments, eps: jax.typing.ArrayLike, eps_root: jax.typing.ArrayLike, eps_hat: bool
) -> jax.Array:
    """`bias_correct` on one leaf."""
    if not eps_hat:
        return normalized(debiased_nu(debiased_mu(moments)), eps, eps_root)
    scale = jnp.sqrt(moments.nu_weight) / moments.mu_weight
    mu = moments.mu * signals.cast(scale, moments.mu.dtype)
    return normalized(moments._replace(mu=mu), eps, eps_root)


def normalized(
    moments: Moments, eps: jax.typing.ArrayLike, eps_root: jax.typing.ArrayLike
) -> jax.Array:
    """`normalize` on one leaf.

    A number known to be 0 is not added, and a divisor known not to be 0 is not guarded: XLA would
    find that out for every leaf, which a model of many leaves spends a fifth of its compilation on.
    """
    mu, nu = moments.mu, signals.second_moment(moments)
    dtype = nu.dtype
    if not isinstance(eps_root, float) or eps_root > 0:
        nu = nu + signals.cast(eps_root, dtype)
    denominator = (sqrt(nu) + signals.cast(eps, dtype)).astype(mu.dtype)
    positive = isinstance(eps, float) and eps >= jnp.finfo(dtype).tiny
    direction = mu / denominator if positive else divide(mu, denominator)
    return direction.astype(moments.grad.dtype)


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """The root, with derivative 0 at 0: infinity there would turn every meta-gradient to NaN."""
    return jax.lax.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    root = sqrt(primals[0])
    return root, divide(tangents[0], 2 * root)


def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """The quotient, and 0 where the divisor is 0.

    One select on the divisor: it stops the derivative too, and leaves XLA the division to simplify
    as it does for optax (a select on the quotient would cost the bitwise equality).
    """
    return x / jax.lax.select(y == 0, jax.lax.full_like(y, jnp.inf), y)
