"""Whole optimizers: one short chain of stages each, with optax's names, signatures and defaults."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from adam_jax import correction
from adam_jax.direction import bias_correct
from adam_jax.learning_rate import scale_by_lr
from adam_jax.moments import scale_by_moments
from adam_jax.signals import check_hyperparameter


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam: the mean of recent gradients over the root of the mean of their squares.

    .. math::

      m_t = (1 - b_1) g_t + b_1 m_{t-1}, \qquad v_t = (1 - b_2) |g_t|^2 + b_2 v_{t-1}, \\
      u_t = -\alpha_t \frac{m_t}{1 - b_1^t} \Big/
            \Big( \sqrt{\frac{v_t}{1 - b_2^t} + \varepsilon_{root}} + \varepsilon \Big)

    A drop-in for `optax.adam`: bit for bit the same under jit in float32 and float64.

    Args:
      learning_rate: the step size :math:`\alpha`: a number, a 0-d array or a schedule.
      b1: the decay rate of the first moment in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, likewise. Default 0.999.
      eps: added to the root: a number or a 0-d array. Default 1e-8.
      eps_root: added under the root, likewise. Default 0.
      mu_dtype: the dtype to keep the first moment in. Default: that of the parameter, at least
        float32.
      nesterov: whether to look one step ahead with the first moment (NAdam). Default False.
      nu_dtype: the dtype to keep the second moment in. Default: likewise.

    Returns:
      The chain of stages, a gradient transformation whose updates are added to the parameters.

    Raises:
      ValueError: if a hyperparameter is out of its range.
      TypeError: if a hyperparameter is of the wrong kind.

    Example:
      >>> import adam_jax, optax, jax, jax.numpy as jnp
      >>> tx = adam_jax.adam(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads = jax.grad(lambda x: jnp.sum(x**2))(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params)
      [ 0.7 -1.7]

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1.
    """
    return optax.chain(
        scale_by_moments(b1, b2, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        *([correction.nesterov()] if nesterov else []),
        bias_correct(eps=eps, eps_root=eps_root),
        scale_by_lr(learning_rate),
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with decoupled weight decay: the decay joins after the division, not the gradient.

    .. math:: u_t = -\alpha_t (d_t + \lambda \theta_{t-1})

    with Adam's direction :math:`d_t` and the parameters :math:`\theta`, which `update` needs.

    Args:
      learning_rate: the step size :math:`\alpha`: a number, a 0-d array or a schedule.
      b1: the decay rate of the first moment in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, likewise. Default 0.999.
      eps: added to the root: a number or a 0-d array. Default 1e-8.
      eps_root: added under the root, likewise. Default 0.
      mu_dtype: the dtype to keep the first moment in. Default: that of the parameter, at least
        float32.
      weight_decay: the rate :math:`\lambda`, multiplied with the learning rate as in PyTorch: a
        number, a 0-d array or a schedule. Default 1e-4.
      mask: a tree of booleans (or a prefix of one), or a function from the parameters to it: which
        leaves decay. Default None, all of them.
      nesterov: whether to look one step ahead with the first moment (NAdamW). Default False.
      nu_dtype: the dtype to keep the second moment in. Default: that of the parameter, at least
        float32.

    Returns:
      The chain of stages, a gradient transformation whose updates are added to the parameters.

    Raises:
      ValueError: if a hyperparameter is out of its range; in `update`, without `params`.
      TypeError: if a hyperparameter is of the wrong kind.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> no_biases = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
      >>> tx = adam_jax.adamw(0.1, weight_decay=0.5, mask=no_biases)
      >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"], updates["bias"])
      [[-0.15]] [-0.1]

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101),
    algorithm 2.
    """
    check_hyperparameter("weight_decay", weight_decay, schedule=True)
    return optax.chain(
        scale_by_moments(b1, b2, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        *([correction.nesterov()] if nesterov else []),
        bias_correct(eps=eps, eps_root=eps_root),
        optax.add_decayed_weights(weight_decay, mask),
        scale_by_lr(learning_rate),
    )


def nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    *,
    nesterov: bool = True,
    nu_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with Nesterov's momentum: `adam` with the stage `nesterov` after the moments.

    .. math:: \hat m_t = b_1 \frac{m_t}{1 - b_1^{t+1}} + (1 - b_1) \frac{g_t}{1 - b_1^t}

    Args:
      learning_rate: see `adam`, and so for the other arguments.
      b1: the decay rate of the first moment. Default 0.9.
      b2: the decay rate of the second moment. Default 0.999.
      eps: added to the root. Default 1e-8.
      eps_root: added under the root. Default 0.
      mu_dtype: the dtype to keep the first moment in. Default: at least float32.
      nesterov: False gives plain `adam`, as in optax. Default True.
      nu_dtype: the dtype to keep the second moment in. Default: at least float32.

    Returns:
      The chain of stages, a gradient transformation whose updates are added to the parameters.

    Raises:
      ValueError: if a hyperparameter is out of its range.
      TypeError: if a hyperparameter is of the wrong kind.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> tx = adam_jax.nadam(0.1)
      >>> updates, _ = tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))
      >>> print(updates)  # -0.1 * (0.9 * 0.1 / 0.19 + 0.1 / 0.1)
      [-0.1474]

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (ICLR 2016 workshop), algorithm 2.
    """
    return adam(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype
    )


def nadamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = True,
    nu_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with Nesterov's momentum: `adamw` with the stage `nesterov` after the moments.

    .. math:: u_t = -\alpha_t (d_t + \lambda \theta_{t-1})

    with NAdam's direction :math:`d_t` and the parameters :math:`\theta`, which `update` needs.

    Args:
      learning_rate: see `adamw`, and so for the other arguments.
      b1: the decay rate of the first moment. Default 0.9.
      b2: the decay rate of the second moment. Default 0.999.
      eps: added to the root. Default 1e-8.
      eps_root: added under the root. Default 0.
      mu_dtype: the dtype to keep the first moment in. Default: at least float32.
      weight_decay: the rate :math:`\lambda`. Default 1e-4.
      mask: which leaves decay. Default None, all of them.
      nesterov: False gives plain `adamw`, as in optax. Default True.
      nu_dtype: the dtype to keep the second moment in. Default: at least float32.

    Returns:
      The chain of stages, a gradient transformation whose updates are added to the parameters.

    Raises:
      ValueError: if a hyperparameter is out of its range; in `update`, without `params`.
      TypeError: if a hyperparameter is of the wrong kind.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> tx = adam_jax.nadamw(0.1, weight_decay=0.5)
      >>> params = jnp.ones(1)
      >>> updates, _ = tx.update(jnp.array([3.0]), tx.init(params), params)
      >>> print(updates)
      [-0.1974]

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (ICLR 2016 workshop), algorithm 2,
    with Loshchilov and Hutter's decay (arXiv 1711.05101).
    """
    return adamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        weight_decay,
        mask,
        nesterov=nesterov,
        nu_dtype=nu_dtype,
    )
