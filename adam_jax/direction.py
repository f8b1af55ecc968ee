"""Stages from moments to an update: most divide the first moment by the root of the second."""

import math

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from adam_jax._checks import check_bool, check_hyperparameter
from adam_jax._numerics import Scalar, quotient, scalar, sqrt
from adam_jax.average import Average
from adam_jax.signal import Moments, to_updates


def normalize(
    *, eps: Scalar = 1e-8, eps_root: Scalar = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Divide the first moment by the root of the second, without debiasing either.

    .. math:: u = m / (\sqrt{v + \varepsilon_{root}} + \varepsilon)

    Where the denominator is 0 the update is 0. The derivative of the update is finite where v is 0,
    even without an `eps_root`.

    Args:
      eps: added to the root, finite and at least 0: a number or a 0-d array. Default 1e-8.
      eps_root: added under the root, likewise. Default 0.

    Returns:
      A stateless gradient transformation from `Moments` to updates.

    Raises:
      ValueError: if `eps` or `eps_root` is negative, infinite, NaN or not a scalar.
      TypeError: if they are not numbers; in `update`, if it gets plain updates instead of
        `Moments`, or there is no second moment.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(0.9, 0.99), adam_jax.normalize())
      >>> update, _ = stages.update(jnp.array([-3.0]), stages.init(jnp.zeros(1)))
      >>> print(update)  # not debiased: 0.1 / sqrt(0.01)
      [-1.]

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1; without its bias correction.
    """
    eps = check_hyperparameter("eps", eps)
    eps_root = check_hyperparameter("eps_root", eps_root)

    return to_updates("normalize", _normalized, eps, eps_root)


def _normalized(moments: Moments, eps: Scalar, eps_root: Scalar) -> jax.Array:
    return quotient(moments.mu.value, moments.kept_nu().value, eps, eps_root)


def bias_correct(
    *,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    eps_hat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Debias both moments and divide: Adam's direction, `debias` and `normalize` as one stage.

    .. math:: u = \hat m / (\sqrt{\hat v + \varepsilon_{root}} + \varepsilon), \qquad
              \hat m = m / w_1, \qquad \hat v = v / w_2

    with the weights :math:`w_i` that the moments have gathered, :math:`1 - b_i^t` at constant
    rates. With ``eps_hat=True`` the epsilons are added before the correction, by the convention of
    Keras and TensorFlow, where they count for more in the first steps: :math:`\varepsilon` is in
    effect :math:`\varepsilon / \sqrt{w_2}`, and :math:`\varepsilon_{root}` is
    :math:`\varepsilon_{root} / w_2`.

    .. math:: u = \frac{\sqrt{w_2}}{w_1} m / (\sqrt{v + \varepsilon_{root}} + \varepsilon)

    Args:
      eps: added to the root, finite and at least 0: a number or a 0-d array. Default 1e-8.
      eps_root: added under the root, likewise. Default 0.
      eps_hat: whether the epsilons are added before the bias correction, not after it. Default
        False.

    Returns:
      A stateless gradient transformation from `Moments` to updates.

    Raises:
      ValueError: if `eps` or `eps_root` is negative, infinite, NaN or not a scalar.
      TypeError: if they are not numbers, `eps_hat` is not a bool, or an argument is passed by
        position; in `update`, if it gets plain updates instead of `Moments`, or there is no second
        moment.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(0.9, 0.99), adam_jax.bias_correct())
      >>> update, _ = stages.update(jnp.array([-3.0]), stages.init(jnp.zeros(1)))
      >>> print(update)
      [-1.]

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1; `eps_hat` is the reordering at the
    end of its section 2.
    """
    eps = check_hyperparameter("eps", eps)
    eps_root = check_hyperparameter("eps_root", eps_root)
    eps_hat = check_bool("eps_hat", eps_hat)

    return to_updates("bias_correct", _corrected, eps, eps_root, eps_hat)


def _corrected(moments: Moments, eps: Scalar, eps_root: Scalar, eps_hat: bool) -> jax.Array:
    mu, nu = moments.mu, moments.kept_nu()
    if eps_hat:
        return quotient(_rescaled(mu, nu), nu.value, eps, eps_root)
    return quotient(mu.debiased().value, nu.debiased().value, eps, eps_root)


def rectify(
    *,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    eps_hat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide by the second moment only as far as it has seen enough gradients: RAdam.

    .. math::

      u = r_t \frac{\hat m}{\sqrt{\hat v + \varepsilon_{root}} + \varepsilon}
      \text{ if } \rho_t \ge \text{threshold, else } \hat m, \qquad
      r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
                      {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}}

    with the effective window length :math:`\rho_t` that the second moment carries
    (`Average.length`) and its limit :math:`\rho_\infty = 2 / (1 - b_2) - 1`. This works for any
    second moment and for rates on a schedule: while a rate falls, :math:`\rho_\infty` is taken to
    be at least :math:`\rho_t`, so that :math:`r_t \le 1`.

    Args:
      eps: added to the root, finite and at least 0: a number or a 0-d array. Default 1e-8.
      eps_root: added under the root, likewise. Default 0.
      threshold: the least :math:`\rho_t` at which to divide, at least 4: a number or a 0-d array.
        Default 5.
      eps_hat: whether the epsilons are added before the bias correction, as in PyTorch, and not
        after it. Default False.

    Returns:
      A stateless gradient transformation from `Moments` to updates.

    Raises:
      ValueError: if `eps`, `eps_root` or `threshold` is out of its range or not a scalar.
      TypeError: if they are not numbers, or `eps_hat` is not a bool; in `update`, if it gets plain
        updates instead of `Moments`, or there is no second moment.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(), adam_jax.rectify())
      >>> update, _ = stages.update(jnp.array([-3.0]), stages.init(jnp.zeros(1)))
      >>> print(update)  # the first step is that of momentum
      [-3.0]

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (arXiv
    1908.03265), algorithm 2.
    """
    eps = check_hyperparameter("eps", eps)
    eps_root = check_hyperparameter("eps_root", eps_root)
    threshold = check_hyperparameter("threshold", threshold)
    if not isinstance(threshold, Tracer) and threshold < 4:
        raise ValueError(f"threshold must be at least 4, got {float(threshold)!r}.")
    eps_hat = check_bool("eps_hat", eps_hat)
    return to_updates("rectify", _rectified, eps, eps_root, threshold, eps_hat)


def _rectified(
    moments: Moments, eps: Scalar, eps_root: Scalar, threshold: Scalar, eps_hat: bool
) -> jax.Array:
    mu, nu = moments.mu.debiased(), moments.kept_nu()
    length, long_enough = nu.length, nu.length >= scalar(threshold, jnp.result_type(nu.length))
    limit = _limit(nu)
    # A length below 4 has no root: it must reach neither the value nor the derivative.
    safe = jnp.where(long_enough, length, 5.0)
    ratio = (safe - 4.0) * (safe - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * safe)
    scaled = mu.with_value(scalar(jnp.sqrt(ratio), mu.value.dtype) * mu.value)
    if eps_hat:
        divided = quotient(_rescaled(scaled, nu), nu.value, eps, eps_root)
    else:
        divided = quotient(scaled.value, nu.debiased().value, eps, eps_root)
    return jnp.where(long_enough, divided, mu.value)


def _limit(nu: Average) -> Scalar:
    """The length that an average has in the end, at least 5: a shorter one has no root."""
    if isinstance(nu.decay, float):
        return max(2.0 / (1.0 - nu.decay) - 1.0, 5.0)
    decay = jnp.asarray(nu.decay)
    least = jnp.finfo(decay.dtype).epsneg  # a rate of exactly 1 has no limit
    limit = 2.0 / jnp.maximum(1.0 - decay, least) - 1.0
    # Under a falling rate the average is longer than its rate of today will leave it.
    return jnp.maximum(jnp.maximum(limit, 5.0), scalar(nu.length, limit.dtype))


def atan2(*, scale: Scalar = 4 / math.pi) -> optax.GradientTransformationExtraArgs:
    r"""Divide without an epsilon: Adam-atan2.

    .. math:: u = a \operatorname{atan2}(\hat m, \sqrt{\hat v})

    with the debiased moments. With the default scale the update is ±1 where
    :math:`|\hat m| = \sqrt{\hat v}`, as Adam's is, and its magnitude never exceeds 2. The update
    does not change when all gradients are scaled, however small they are.

    Args:
      scale: the factor :math:`a`, finite and at least 0: a number or a 0-d array. Default
        :math:`4 / \pi`.

    Returns:
      A stateless gradient transformation from `Moments` to updates.

    Raises:
      ValueError: if `scale` is negative, infinite, NaN or not a scalar.
      TypeError: if `scale` is not a number; in `update`, if it gets plain updates instead of
        `Moments`, or there is no second moment.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> stages = optax.chain(adam_jax.scale_by_moments(), adam_jax.atan2())
      >>> update, _ = stages.update(jnp.array([-1e-12]), stages.init(jnp.zeros(1)))
      >>> print(update)
      [-1.0]

    Source: Everett et al., "Scaling Exponents Across Parameterizations and Optimizers" (arXiv
    2407.05872), section 4.3.
    """
    scale = check_hyperparameter("scale", scale)

    return to_updates("atan2", _angle, scale)


def _angle(moments: Moments, scale: Scalar) -> jax.Array:
    mu, root = moments.mu.debiased().value, sqrt(moments.kept_nu().debiased().value)
    # atan2(0, 0) is 0 with an undefined derivative, atan2(0, 1) is 0 with a derivative.
    root = jnp.where((root == 0) & (mu == 0), 1, root)
    if jnp.iscomplexobj(mu):
        angle = jnp.sign(mu) * jnp.arctan2(jnp.abs(mu), root).astype(mu.dtype)
    else:
        angle = jnp.arctan2(mu, root)
    # An infinite gradient has an angle, 0 times it has none: it shall not pass unseen.
    return scalar(scale, mu.dtype) * (angle + 0 * mu)


def first_moment() -> optax.GradientTransformationExtraArgs:
    r"""Step along the first moment, without any division: momentum.

    .. math:: u = m

    Returns:
      A stateless gradient transformation from `Moments` to updates.

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
    return to_updates("first_moment", _first_moment)


def _first_moment(moments: Moments) -> jax.Array:
    return moments.mu.value


def _rescaled(mu: Average, nu: Average) -> jax.Array:
    """The first moment corrected for both weights, the second being left as it is."""
    return mu.value * scalar(jnp.sqrt(nu.weight) / mu.weight, mu.value.dtype)
