"""Whole optimizers: one short chain of stages each.

Each function returns its chain, an `optax.GradientTransformationExtraArgs`, and its body is that
chain: with the same stages you get the same optimizer. Where optax has the name, its arguments come
first and its defaults hold. After the `*` come the same few options, which mean the same
everywhere.

Every hyperparameter is checked when the optimizer is built. With weight decay, `update` needs the
parameters.

In the signatures a `Scalar` is a number or a 0-d array of at least float32; a `Rate` is a `Scalar`
or a schedule, a function from the number of steps taken so far; a `Mask` says which leaves decay;
`StorageLike` is a storage of `adam_jax.storage`, your own, a dtype or None.
"""

import functools
import math
from typing import Any, TypeAlias, TypeGuard

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adam_jax import correction, rules
from adam_jax._checks import check_bool, check_hyperparameter
from adam_jax._numerics import Rate, Scalar
from adam_jax.correction import (
    cautious,
    center,
    debias,
    delay,
    floor,
    interpolate,
    mix_slow_moment,
    running_max,
)
from adam_jax.direction import atan2, bias_correct, first_moment, normalize, rectify
from adam_jax.moments import scale_by_moments
from adam_jax.storage._protocol import StorageLike
from adam_jax.updates import (
    Mask,
    accumulate,
    clip_by_schedule,
    decay_weights,
    scale_by_lr,
    scale_by_trust_ratio,
)

Optimizer: TypeAlias = optax.GradientTransformationExtraArgs


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar | None" = None,
    nesterov: bool = False,
    accumulator_dtype: "DTypeLike | None" = None,
    *,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""Stochastic gradient descent, plain or with momentum.

    .. math:: a_t = \mu a_{t-1} + g_t, \qquad u_t = -\alpha_t a_t

    Without momentum :math:`a_t` is the gradient :math:`g_t`.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      momentum: the rate :math:`\mu`, in [0, 1): a number or a 0-d array; None for plain descent.
        Default None.
      nesterov: whether to step with Nesterov's :math:`g_t + \mu a_t` in place of :math:`a_t`; True
        needs `momentum`. Default False.
      accumulator_dtype: the dtype to keep :math:`a` in; None, the default: that of the parameter,
        at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage. Without
      momentum it keeps step counts only; with momentum `state[0].trace` is shaped like the
      parameters, 4 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, if `nesterov` is without `momentum`, or if `mask`
        is without `weight_decay`; in `update`, if a gradient does not match its parameter, naming
        the leaf, or if weights decay and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.sgd(0.1, momentum=0.9, nesterov=True)

    Source: Robbins and Monro, "A Stochastic Approximation Method" (1951).
    """
    return optax.chain(
        *(
            [accumulate(momentum, nesterov=nesterov, dtype=accumulator_dtype)]
            if _accumulates(momentum, nesterov)
            else []
        ),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def momentum(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar" = 0.9,
    *,
    accumulator_dtype: "DTypeLike | None" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""Descent along a decaying sum of gradients: the heavy ball.

    .. math:: a_t = \mu a_{t-1} + g_t, \qquad u_t = -\alpha_t a_t

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      momentum: the rate :math:`\mu`, in [0, 1): a number or a 0-d array. Default 0.9.
      accumulator_dtype: the dtype to keep :math:`a` in; None, the default: that of the parameter,
        at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].trace`
      is shaped like the parameters, 4 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, or if `mask` is without `weight_decay`; in
        `update`, if a gradient does not match its parameter, naming the leaf, or if weights decay
        and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.momentum(0.1, 0.9)

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods" (1964).
    """
    check_hyperparameter("momentum", momentum, upper=1)
    return optax.chain(
        accumulate(momentum, dtype=accumulator_dtype),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def nesterov_momentum(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar" = 0.9,
    *,
    accumulator_dtype: "DTypeLike | None" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""Nesterov's accelerated gradient: the heavy ball that looks one step ahead.

    .. math:: a_t = \mu a_{t-1} + g_t, \qquad u_t = -\alpha_t (g_t + \mu a_t)

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      momentum: the rate :math:`\mu`, in [0, 1): a number or a 0-d array. Default 0.9.
      accumulator_dtype: the dtype to keep :math:`a` in; None, the default: that of the parameter,
        at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].trace`
      is shaped like the parameters, 4 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, or if `mask` is without `weight_decay`; in
        `update`, if a gradient does not match its parameter, naming the leaf, or if weights decay
        and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.nesterov_momentum(0.1, 0.9)

    Source: Sutskever et al., "On the importance of initialization and momentum" (ICML 2013).
    """
    check_hyperparameter("momentum", momentum, upper=1)
    return optax.chain(
        accumulate(momentum, nesterov=True, dtype=accumulator_dtype),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def adagrad(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: float = 0.1,
    eps: "Scalar" = 1e-7,
    *,
    eps_in_sqrt: bool = True,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""Adagrad: the gradient over the root of the sum of all its squares.

    .. math:: u_t = -\alpha_t g_t / \sqrt{v_t + \varepsilon}, \qquad v_t = v_{t-1} + |g_t|^2

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      initial_accumulator_value: the sum before the first step, finite and at least 0: a number.
        Default 0.1.
      eps: added to the sum, or to its root, at least 0: a number or a 0-d array. Default 1e-7.
      eps_in_sqrt: whether `eps` is under the root (optax), or added to it (PyTorch). Default True.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].nu` is
      shaped like the parameters, 4 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, or if `mask` is without `weight_decay`; in
        `update`, if a gradient does not match its parameter, naming the leaf, or if weights decay
        and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.adagrad(1e-2, 0.0, 1e-10, eps_in_sqrt=False)  # the defaults of PyTorch

    Source: Duchi et al., "Adaptive Subgradient Methods" (JMLR 12, 2011).
    """
    check_hyperparameter("initial_accumulator_value", initial_accumulator_value)
    check_hyperparameter("eps", eps)
    check_bool("eps_in_sqrt", eps_in_sqrt)
    return optax.chain(
        scale_by_moments(
            None,
            0.0,
            second_moment=rules.accumulated,
            initial_nu=initial_accumulator_value,
            nu_storage=nu_storage,
        ),
        normalize(eps=0.0, eps_root=eps) if eps_in_sqrt else normalize(eps=eps),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: "Rate" = 0.9,
    eps: "Scalar" = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: "Scalar | None" = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""RMSProp: the gradient over the root of the mean of its recent squares.

    .. math:: u_t = -\alpha_t g_t / \sqrt{v_t + \varepsilon},
              \qquad v_t = (1 - b) |g_t|^2 + b v_{t-1}

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      decay: the decay rate :math:`b`, in [0, 1): a number, a 0-d array or a schedule. Default 0.9.
      eps: added to the second moment, or to its root, at least 0: a number or a 0-d array. Default
        1e-8.
      initial_scale: the second moment before the first step, finite and at least 0: a number.
        Default 0.
      eps_in_sqrt: whether `eps` is under the root (optax), or added to it (PyTorch). Default True.
      centered: whether to divide by the standard deviation instead. True needs `nu_storage=None`:
        the variance is the small difference of two moments, of which rounding would leave noise.
        Default False.
      momentum: the rate of a decaying sum of the steps, in [0, 1): a number or a 0-d array. None,
        the default: no such sum.
      nesterov: whether that sum looks one step ahead; True needs `momentum`. Default False.
      bias_correction: whether to debias the moments. Default False.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. With `momentum`
        the decay is part of what is summed. None, the default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].nu` is
      shaped like the parameters, 4 bytes a parameter in float32. `centered` adds `state[0].mu`, and
      `momentum` adds `state[-1].trace`, each of the same size.

    Raises:
      ValueError: if a number is out of its range, if `nesterov` is without `momentum`, if
        `centered` and `nu_storage` are both given, or if `mask` is without `weight_decay`; in
        `update`, if a gradient does not match its parameter, naming the leaf, or if weights decay
        and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.rmsprop(1e-3, 0.99, eps_in_sqrt=False, centered=True)  # as PyTorch

    Source: Hinton, "Neural Networks for Machine Learning" (2012), lecture 6e.
    """
    if centered and nu_storage is not None:
        raise ValueError(
            "centered=True subtracts the squared mean from the second moment, and a stored moment "
            "is rounded by more than is left: keep it in full, leave nu_storage None."
        )
    check_hyperparameter("decay", decay, upper=1, schedule=True)
    check_hyperparameter("initial_scale", initial_scale)
    check_hyperparameter("eps", eps)
    check_bool("eps_in_sqrt", eps_in_sqrt)
    return optax.chain(
        scale_by_moments(
            decay if centered else None, decay, initial_nu=initial_scale, nu_storage=nu_storage
        ),
        *([debias()] if check_bool("bias_correction", bias_correction) else []),
        *([center()] if check_bool("centered", centered) else []),
        normalize(eps=0.0, eps_root=eps) if eps_in_sqrt else normalize(eps=eps),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
        *([accumulate(momentum, nesterov=nesterov)] if _accumulates(momentum, nesterov) else []),
    )


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-8,
    eps_root: "Scalar" = 0.0,
    mu_dtype: "DTypeLike | None" = None,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""Adam: the mean of recent gradients over the root of the mean of their squares.

    .. math::

      m_t = (1 - b_1) g_t + b_1 m_{t-1}, \qquad v_t = (1 - b_2) |g_t|^2 + b_2 v_{t-1}, \\
      u_t = -\alpha_t \frac{m_t}{1 - b_1^t} \Big/
            \Big( \sqrt{\frac{v_t}{1 - b_2^t} + \varepsilon_{root}} + \varepsilon \Big)

    If a rate follows a schedule, its product over the steps so far takes the place of :math:`b^t`.

    A drop-in replacement for `optax.adam`: under jit, in float32 and float64, its updates are bit
    for bit the same.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        1e-8.
      eps_root: added to the second moment under the root, at least 0: a number or a 0-d array.
        Default 0.
      mu_dtype: optax's name for a dtype given as `mu_storage`; give one of the two. Default None.
      nesterov: whether to look one step ahead with the first moment. Default False.
      eps_hat: whether the epsilons are added before the bias correction, by the convention of
        Keras, and not after it. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, if `mu_dtype` and `mu_storage` are both given, or
        if `mask` is without `weight_decay`; in `update`, if a gradient does not match its
        parameter, naming the leaf, or if weights decay and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> import optax, jax
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
        scale_by_moments(b1, b2, mu_storage=_either(mu_dtype, mu_storage), nu_storage=nu_storage),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        bias_correct(eps=eps, eps_root=eps_root, eps_hat=eps_hat),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-8,
    eps_root: "Scalar" = 0.0,
    mu_dtype: "DTypeLike | None" = None,
    weight_decay: "Rate" = 1e-4,
    mask: "Mask" = None,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
) -> Optimizer:
    r"""Adam with decoupled weight decay, which is added to the direction and not to the gradient.

    .. math:: u_t = -\alpha_t (d_t + \lambda \theta_{t-1}), \qquad
              d_t = \hat m_t / (\sqrt{\hat v_t + \varepsilon_{root}} + \varepsilon)

    with the parameters :math:`\theta` and Adam's debiased averages
    :math:`\hat m_t = m_t / (1 - b_1^t)` of the gradients and :math:`\hat v_t = v_t / (1 - b_2^t)`
    of their squares.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        1e-8.
      eps_root: added to the second moment under the root, at least 0: a number or a 0-d array.
        Default 0.
      mu_dtype: optax's name for a dtype given as `mu_storage`; give one of the two. Default None.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` needs `params`. Default 1e-4, as in
        optax; PyTorch's is 1e-2.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.
      nesterov: whether to look one step ahead with the first moment. Default False.
      eps_hat: whether the epsilons are added before the bias correction, by the convention of
        Keras, and not after it. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, or if `mu_dtype` and `mu_storage` are both given;
        in `update`, if a gradient does not match its parameter, naming the leaf, or if `params` is
        missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> import jax
      >>> no_biases = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
      >>> tx = adam_jax.adamw(0.1, weight_decay=0.5, mask=no_biases)
      >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"], updates["bias"])
      [[-0.15]] [-0.1]

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101).
    """
    return optax.chain(
        scale_by_moments(b1, b2, mu_storage=_either(mu_dtype, mu_storage), nu_storage=nu_storage),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        bias_correct(eps=eps, eps_root=eps_root, eps_hat=eps_hat),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-8,
    eps_root: "Scalar" = 0.0,
    mu_dtype: "DTypeLike | None" = None,
    *,
    nesterov: bool = True,
    momentum_decay: "Scalar | None" = None,
    eps_hat: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""Adam with Nesterov's momentum.

    .. math:: u_t = -\alpha_t \hat m_t / (\sqrt{\hat v_t} + \varepsilon), \qquad
              \hat m_t = b_1 \frac{m_t}{1 - b_1^{t+1}} + (1 - b_1) \frac{g_t}{1 - b_1^t}

    with Adam's moments :math:`m_t` and :math:`v_t`, and :math:`\hat v_t = v_t / (1 - b_2^t)`.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        1e-8.
      eps_root: added to the second moment under the root, at least 0: a number or a 0-d array.
        Default 0.
      mu_dtype: optax's name for a dtype given as `mu_storage`; give one of the two. Default None.
      nesterov: whether to look one step ahead with the first moment; False gives plain Adam.
        Default True.
      momentum_decay: :math:`\psi`, at least 0, of Dozat's momentum schedule: a number or a 0-d
        array. The look-ahead then uses the rate :math:`b_1 (1 - 0.96^{t \psi} / 2)` in place of
        :math:`b_1`, which must be no schedule. PyTorch's is 4e-3. None, the default: the rate stays
        :math:`b_1`.
      eps_hat: whether the epsilons are added before the bias correction, by the convention of
        Keras, and not after it. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32. The updates
      are bit for bit those of `optax.nadam`, except that on a CPU the updates of leaves of a few
      elements may differ in the last bit.

    Raises:
      ValueError: if a number is out of its range, if `mu_dtype` and `mu_storage` are both given, if
        `momentum_decay` is without `nesterov` or with a schedule for `b1`, or if `mask` is without
        `weight_decay`; in `update`, if a gradient does not match its parameter, naming the leaf, or
        if weights decay and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.nadam(2e-3, momentum_decay=4e-3)  # the defaults of PyTorch

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (ICLR 2016 workshop), algorithm 2.
    """
    _check_look_ahead(nesterov, momentum_decay)
    return optax.chain(
        scale_by_moments(b1, b2, mu_storage=_either(mu_dtype, mu_storage), nu_storage=nu_storage),
        *([correction.nesterov(_dozat(b1, momentum_decay))] if nesterov else []),
        bias_correct(eps=eps, eps_root=eps_root, eps_hat=eps_hat),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def nadamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-8,
    eps_root: "Scalar" = 0.0,
    mu_dtype: "DTypeLike | None" = None,
    weight_decay: "Rate" = 1e-4,
    mask: "Mask" = None,
    *,
    nesterov: bool = True,
    momentum_decay: "Scalar | None" = None,
    eps_hat: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
) -> Optimizer:
    r"""AdamW with Nesterov's momentum.

    .. math:: u_t = -\alpha_t \Big( \frac{\hat m_t}{\sqrt{\hat v_t} + \varepsilon}
                                    + \lambda \theta_{t-1} \Big), \qquad
              \hat m_t = b_1 \frac{m_t}{1 - b_1^{t+1}} + (1 - b_1) \frac{g_t}{1 - b_1^t}

    with the parameters :math:`\theta`, Adam's moments :math:`m_t` and :math:`v_t`, and
    :math:`\hat v_t = v_t / (1 - b_2^t)`.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        1e-8.
      eps_root: added to the second moment under the root, at least 0: a number or a 0-d array.
        Default 0.
      mu_dtype: optax's name for a dtype given as `mu_storage`; give one of the two. Default None.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` needs `params`. Default 1e-4.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.
      nesterov: whether to look one step ahead with the first moment; False gives plain AdamW.
        Default True.
      momentum_decay: :math:`\psi`, at least 0, of Dozat's momentum schedule: a number or a 0-d
        array. The look-ahead then uses the rate :math:`b_1 (1 - 0.96^{t \psi} / 2)` in place of
        :math:`b_1`, which must be no schedule. PyTorch's is 4e-3. None, the default: the rate stays
        :math:`b_1`.
      eps_hat: whether the epsilons are added before the bias correction, by the convention of
        Keras, and not after it. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, if `mu_dtype` and `mu_storage` are both given, or
        if `momentum_decay` is without `nesterov` or with a schedule for `b1`; in `update`, if a
        gradient does not match its parameter, naming the leaf, or if `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.nadamw(1e-3, weight_decay=0.01)

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (ICLR 2016 workshop), algorithm 2.
    """
    _check_look_ahead(nesterov, momentum_decay)
    return optax.chain(
        scale_by_moments(b1, b2, mu_storage=_either(mu_dtype, mu_storage), nu_storage=nu_storage),
        *([correction.nesterov(_dozat(b1, momentum_decay))] if nesterov else []),
        bias_correct(eps=eps, eps_root=eps_root, eps_hat=eps_hat),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def amsgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-8,
    eps_root: "Scalar" = 0.0,
    mu_dtype: "DTypeLike | None" = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    max_before_correction: bool = False,
    eps_hat: bool = False,
    nesterov: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""AMSGrad: Adam whose second moment never falls, so that it forgets no rare large gradient.

    .. math:: u_t = -\alpha_t \hat m_t / (\sqrt{\max_{s \le t} \hat v_s} + \varepsilon)

    with Adam's debiased averages :math:`\hat m_t = m_t / (1 - b_1^t)` of the gradients and
    :math:`\hat v_t = v_t / (1 - b_2^t)` of their squares.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        1e-8.
      eps_root: added to the second moment under the root, at least 0: a number or a 0-d array.
        Default 0.
      mu_dtype: optax's name for a dtype given as `mu_storage`; give one of the two. Default None.
      bias_correction_mu: whether to debias the first moment; False in the paper. Default True.
      bias_correction_nu: whether to debias the second moment; False in the paper. Default True.
      max_before_correction: whether to take the maximum of the raw second moments and correct that
        (PyTorch, Keras), or the maximum of the corrected ones (optax). Default False.
      eps_hat: whether the epsilons are added before the bias correction, by the convention of
        Keras, and not after it. True needs `max_before_correction` and both bias corrections.
        Default False.
      nesterov: whether to look one step ahead with the first moment; True needs
        `bias_correction_mu`. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment, and its maximum, between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`,
      `state[0].nu` and `state[2].nu_max` are shaped like the parameters, 12 bytes a parameter in
      float32. (`nu_max` is one place earlier with `max_before_correction`, one later with
      `nesterov`.)

    Raises:
      ValueError: if a number is out of its range, if `mu_dtype` and `mu_storage` are both given, if
        `eps_hat` or `nesterov` is without what it needs, or if `mask` is without `weight_decay`; in
        `update`, if a gradient does not match its parameter, naming the leaf, or if weights decay
        and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.amsgrad(1e-3, max_before_correction=True)  # as PyTorch

    Source: Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond" (ICLR 2018), algorithm 2.
    """
    check_bool("max_before_correction", max_before_correction)
    check_bool("bias_correction_mu", bias_correction_mu)
    check_bool("bias_correction_nu", bias_correction_nu)
    if check_bool("eps_hat", eps_hat) and not max_before_correction:
        raise ValueError(
            "eps_hat joins the raw second moment: it needs max_before_correction=True, as in Keras."
        )
    if ((eps_hat or nesterov) and not bias_correction_mu) or (eps_hat and not bias_correction_nu):
        raise ValueError("eps_hat and nesterov imply the bias correction: leave it on.")
    return optax.chain(
        scale_by_moments(b1, b2, mu_storage=_either(mu_dtype, mu_storage), nu_storage=nu_storage),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        *([running_max(nu_storage=nu_storage)] if max_before_correction else []),
        debias(mu=bias_correction_mu, nu=bias_correction_nu and not eps_hat),
        *([] if max_before_correction else [running_max(nu_storage=nu_storage)]),
        bias_correct(eps=eps, eps_root=eps_root, eps_hat=True)
        if eps_hat
        else normalize(eps=eps, eps_root=eps_root),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def radam(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-8,
    eps_root: "Scalar" = 0.0,
    threshold: "Scalar" = 5.0,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""Rectified Adam: momentum until the second moment has seen enough gradients, then Adam.

    .. math::

      u_t = -\alpha_t r_t \frac{\hat m_t}{\sqrt{\hat v_t} + \varepsilon}
      \text{ if } \rho_t \ge \text{threshold, else } -\alpha_t \hat m_t, \qquad
      r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
                      {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}}

    with Adam's debiased averages :math:`\hat m_t = m_t / (1 - b_1^t)` of the gradients and
    :math:`\hat v_t = v_t / (1 - b_2^t)` of their squares. The length
    :math:`\rho_t = \rho_\infty - 2 t b_2^t / (1 - b_2^t)` is the number of gradients that v
    averages in effect, and :math:`\rho_\infty = 2 / (1 - b_2) - 1` its limit.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        1e-8.
      eps_root: added to the second moment under the root, at least 0: a number or a 0-d array.
        Default 0.
      threshold: the least :math:`\rho_t` at which to divide, at least 4: a number or a 0-d array.
        Default 5.
      nesterov: whether to look one step ahead with the first moment. Default False.
      eps_hat: whether the epsilons are added before the bias correction, as in PyTorch, and not
        after it. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, or if `mask` is without `weight_decay`; in
        `update`, if a gradient does not match its parameter, naming the leaf, or if weights decay
        and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.radam(1e-3)

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate" (arXiv 1908.03265).
    """
    return optax.chain(
        scale_by_moments(b1, b2, mu_storage=mu_storage, nu_storage=nu_storage),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        rectify(eps=eps, eps_root=eps_root, threshold=threshold, eps_hat=eps_hat),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def adabelief(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-16,
    eps_root: "Scalar" = 1e-16,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""AdaBelief: divide by how far the gradients are from their moving average.

    .. math:: v_t = (1 - b_2) |g_t - m_t|^2 + b_2 v_{t-1} + \varepsilon_{root}, \qquad
              u_t = -\alpha_t \hat m_t / (\sqrt{\hat v_t} + \varepsilon)

    with Adam's first moment :math:`m_t`, :math:`\hat m_t = m_t / (1 - b_1^t)` and
    :math:`\hat v_t = v_t / (1 - b_2^t)`.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        1e-16.
      eps_root: added to the stored second moment at every step, at least 0: a number or a 0-d
        array. Default 1e-16.
      nesterov: whether to look one step ahead with the first moment. Default False.
      eps_hat: whether `eps` is added before the bias correction, by the convention of Keras, and
        not after it. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, or if `mask` is without `weight_decay`; in
        `update`, if a gradient does not match its parameter, naming the leaf, or if weights decay
        and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.adabelief(1e-3)

    Source: Zhuang et al., "AdaBelief Optimizer" (arXiv 2010.07468), algorithm 2.
    """
    check_hyperparameter("eps_root", eps_root)
    return optax.chain(
        scale_by_moments(
            b1,
            b2,
            second_moment=functools.partial(rules.belief, eps_root=eps_root),
            mu_storage=mu_storage,
            nu_storage=nu_storage,
        ),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        bias_correct(eps=eps, eps_hat=eps_hat),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def adamax(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-8,
    *,
    nesterov: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""Adamax: Adam with a decaying maximum of the gradient in place of the root of v.

    .. math:: u_t = -\alpha_t \hat m_t / n_t, \qquad n_t = \max(b_2 n_{t-1}, |g_t| + \varepsilon)

    with Adam's debiased first moment :math:`\hat m_t = m_t / (1 - b_1^t)`.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the maximum :math:`n`, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the magnitude of the gradient, at least 0: a number or a 0-d array. Default
        1e-8.
      nesterov: whether to look one step ahead with the first moment. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32. `nu`
      keeps :math:`n^2`.

    Raises:
      ValueError: if a number is out of its range, or if `mask` is without `weight_decay`; in
        `update`, if a gradient does not match its parameter, naming the leaf, or if weights decay
        and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.adamax(2e-3)

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 2.
    """
    check_hyperparameter("eps", eps)
    return optax.chain(
        scale_by_moments(
            b1,
            b2,
            second_moment=functools.partial(rules.infinity, eps=eps),
            mu_storage=mu_storage,
            nu_storage=nu_storage,
        ),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        debias(nu=False),
        normalize(eps=0.0),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def adamaxw(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-8,
    weight_decay: "Rate" = 1e-4,
    mask: "Mask" = None,
    *,
    nesterov: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
) -> Optimizer:
    r"""Adamax with decoupled weight decay.

    .. math:: u_t = -\alpha_t (\hat m_t / n_t + \lambda \theta_{t-1}), \qquad
              n_t = \max(b_2 n_{t-1}, |g_t| + \varepsilon)

    with Adam's debiased first moment :math:`\hat m_t = m_t / (1 - b_1^t)` and the parameters
    :math:`\theta`.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the maximum :math:`n`, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the magnitude of the gradient, at least 0: a number or a 0-d array. Default
        1e-8.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` needs `params`. Default 1e-4.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.
      nesterov: whether to look one step ahead with the first moment. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32. `nu`
      keeps :math:`n^2`.

    Raises:
      ValueError: if a number is out of its range; in `update`, if a gradient does not match its
        parameter, naming the leaf, or if `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.adamaxw(2e-3, weight_decay=0.01)

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 2.
    """
    check_hyperparameter("eps", eps)
    return optax.chain(
        scale_by_moments(
            b1,
            b2,
            second_moment=functools.partial(rules.infinity, eps=eps),
            mu_storage=mu_storage,
            nu_storage=nu_storage,
        ),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        debias(nu=False),
        normalize(eps=0.0),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def yogi(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-3,
    *,
    eps_root: "Scalar" = 0.0,
    eps_hat: bool = False,
    nesterov: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""Yogi: Adam whose second moment grows or shrinks by a fixed share of the squared gradient.

    .. math:: v_t = v_{t-1} - (1 - b_2) \operatorname{sign}(v_{t-1} - |g_t|^2) |g_t|^2, \qquad
              u_t = -\alpha_t \hat m_t / (\sqrt{\hat v_t} + \varepsilon)

    with Adam's first moment :math:`m_t`, :math:`\hat m_t = m_t / (1 - b_1^t)` and
    :math:`\hat v_t = v_t / (1 - b_2^t)`. Both moments start at 1e-6, as in optax.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        0.001.
      eps_root: added to the second moment under the root, at least 0: a number or a 0-d array.
        Default 0.
      eps_hat: whether the epsilons are added before the bias correction, by the convention of
        Keras, and not after it. Default False.
      nesterov: whether to look one step ahead with the first moment. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, or if `mask` is without `weight_decay`; in
        `update`, if a gradient does not match its parameter, naming the leaf, or if weights decay
        and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.yogi(1e-2)

    Source: Zaheer et al., "Adaptive Methods for Nonconvex Optimization" (NeurIPS 2018).
    """
    return optax.chain(
        scale_by_moments(
            b1,
            b2,
            second_moment=rules.yogi,
            initial_mu=1e-6,
            initial_nu=1e-6,
            mu_storage=mu_storage,
            nu_storage=nu_storage,
        ),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        bias_correct(eps=eps, eps_root=eps_root, eps_hat=eps_hat),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def lamb(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-6,
    eps_root: "Scalar" = 0.0,
    weight_decay: "Rate" = 0.0,
    mask: "Mask" = None,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
) -> Optimizer:
    r"""LAMB: AdamW whose direction is scaled, leaf by leaf, to the norm of the parameters.

    .. math:: u_t = -\alpha_t \frac{\|\theta\|}{\|d_t + \lambda \theta\|} (d_t + \lambda \theta)

    with the parameters :math:`\theta` before the step and Adam's direction
    :math:`d_t = \hat m_t / (\sqrt{\hat v_t} + \varepsilon)`, where
    :math:`\hat m_t = m_t / (1 - b_1^t)` is the debiased average of the gradients and
    :math:`\hat v_t = v_t / (1 - b_2^t)` that of their squares. Where one of the two norms is 0,
    their ratio is taken to be 1.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        1e-6.
      eps_root: added to the second moment under the root, at least 0: a number or a 0-d array.
        Default 0.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the trust ratio
        and the learning rate multiply both; `update` needs `params`. Default 0.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.
      nesterov: whether to look one step ahead with the first moment. Default False.
      eps_hat: whether the epsilons are added before the bias correction, by the convention of
        Keras, and not after it. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range; in `update`, if a gradient does not match its
        parameter, naming the leaf, or if `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.lamb(1e-3, weight_decay=0.01)

    Source: You et al., "Large Batch Optimization for Deep Learning" (arXiv 1904.00962).
    """
    return optax.chain(
        scale_by_moments(b1, b2, mu_storage=mu_storage, nu_storage=nu_storage),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        bias_correct(eps=eps, eps_root=eps_root, eps_hat=eps_hat),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_trust_ratio(),
        scale_by_lr(learning_rate),
    )


def adam_atan2(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    scale: "Scalar" = 4 / math.pi,
    *,
    nesterov: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""Adam without an epsilon: the division is an arc tangent.

    .. math:: u_t = -\alpha_t a \operatorname{atan2}(\hat m_t, \sqrt{\hat v_t})

    with Adam's debiased averages :math:`\hat m_t = m_t / (1 - b_1^t)` of the gradients and
    :math:`\hat v_t = v_t / (1 - b_2^t)` of their squares.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      scale: the factor :math:`a`, at least 0: a number or a 0-d array. The default,
        :math:`4 / \pi`, makes the first update :math:`\pm \alpha`, as Adam's is.
      nesterov: whether to look one step ahead with the first moment. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, or if `mask` is without `weight_decay`; in
        `update`, if a gradient does not match its parameter, naming the leaf, or if weights decay
        and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.adam_atan2(1e-3, weight_decay=0.1)

    Source: Everett et al., "Scaling Exponents Across Parameterizations" (arXiv 2407.05872).
    """
    return optax.chain(
        scale_by_moments(b1, b2, mu_storage=mu_storage, nu_storage=nu_storage),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        atan2(scale=scale),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def laprop(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-15,
    eps_root: "Scalar" = 0.0,
    *,
    eps_hat: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""LaProp: first divide the gradient, then average.

    .. math:: m_t = (1 - b_1) \frac{g_t}{\sqrt{\hat v_t} + \varepsilon} + b_1 m_{t-1},
              \qquad u_t = -\alpha_t \hat m_t

    with Adam's second moment :math:`v_t`, :math:`\hat v_t = v_t / (1 - b_2^t)` and
    :math:`\hat m_t = m_t / (1 - b_1^t)`.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        1e-15.
      eps_root: added to the second moment under the root, at least 0: a number or a 0-d array.
        Default 0.
      eps_hat: whether the epsilons are added before the bias correction, by the convention of
        Keras, and not after it. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].nu`
      and `state[2].mu` are shaped like the parameters, 8 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, or if `mask` is without `weight_decay`; in
        `update`, if a gradient does not match its parameter, naming the leaf, or if weights decay
        and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.laprop(4e-4)

    Source: Ziyin, Wang and Ueda, "LaProp" (arXiv 2002.04839), algorithm 1.
    """
    return optax.chain(
        scale_by_moments(None, b2, nu_storage=nu_storage),
        bias_correct(eps=eps, eps_root=eps_root, eps_hat=eps_hat),
        scale_by_moments(b1, None, mu_storage=mu_storage),
        debias(),
        first_moment(),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def adopt(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.9999,
    eps: "Scalar" = 1e-6,
    mu_dtype: "DTypeLike | None" = None,
    *,
    use_clipping: bool = True,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
    weight_decay: "Rate | None" = None,
    mask: "Mask" = None,
) -> Optimizer:
    r"""ADOPT: divide by the second moment of the earlier gradients, then average.

    .. math::

      m_t = (1 - b_1) \operatorname{clip}(g_t / \max(\sqrt{v_{t-1}}, \varepsilon),
            (t - 1)^{1/4}) + b_1 m_{t-1}, \qquad u_t = -\alpha_t m_t, \\
      v_1 = |g_1|^2, \qquad v_t = (1 - b_2) |g_t|^2 + b_2 v_{t-1}

    where :math:`\operatorname{clip}(x, c)` limits every element to :math:`[-c, c]`. The first
    gradient only starts v: the update of step 1 is 0.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9999.
      eps: the least divisor, at least 0: a number or a 0-d array. Default 1e-6.
      mu_dtype: optax's name for a dtype given as `mu_storage`; give one of the two. Default None.
      use_clipping: whether to clip at :math:`(t - 1)^{1/4}`. Default True.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` then needs `params`. None, the
        default: no decay.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].nu`
      and `state[5].mu` (`state[4].mu` without clipping) are shaped like the parameters, 8 bytes a
      parameter in float32.

    Raises:
      ValueError: if a number is out of its range, if `mu_dtype` and `mu_storage` are both given, or
        if `mask` is without `weight_decay`; in `update`, if a gradient does not match its
        parameter, naming the leaf, or if weights decay and `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf, or if `use_clipping` meets
        a complex gradient.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> tx = adam_jax.adopt(0.1)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.array([3.0]), state)
      ...     print(updates)
      [-0.]
      [-0.01]

    Source: Taniguchi et al., "ADOPT" (arXiv 2411.02853), algorithm 2.
    """
    check_bool("use_clipping", use_clipping)
    return optax.chain(
        scale_by_moments(None, rules.from_first_gradient(b2), nu_storage=nu_storage),
        delay(),
        floor(eps=eps),
        normalize(eps=0.0),
        *([clip_by_schedule(lambda t: jnp.asarray(t, float) ** 0.25)] if use_clipping else []),
        scale_by_moments(b1, None, mu_storage=_either(mu_dtype, mu_storage)),
        first_moment(),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def ademamix(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    b3: "Rate" = 0.9999,
    alpha: "Rate" = 5.0,
    eps: "Scalar" = 1e-8,
    eps_root: "Scalar" = 0.0,
    mu_dtype: "DTypeLike | None" = None,
    weight_decay: "Rate" = 0.0,
    mask: "Mask" = None,
    *,
    nesterov: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
) -> Optimizer:
    r"""AdEMAMix: Adam with a second, slower first moment mixed in.

    .. math:: u_t = -\alpha_t (\hat m_t + a s_t) / (\sqrt{\hat v_t} + \varepsilon), \qquad
              s_t = (1 - b_3) g_t + b_3 s_{t-1}

    with Adam's debiased averages :math:`\hat m_t = m_t / (1 - b_1^t)` of the gradients and
    :math:`\hat v_t = v_t / (1 - b_2^t)` of their squares. The
    slow moment s is not debiased.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      b3: the decay rate of the slow moment :math:`s`, in [0, 1): a number, a 0-d array or a
        schedule. Default 0.9999.
      alpha: the factor :math:`a` of the slow moment, at least 0: a number, a 0-d array or a
        schedule. Default 5.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        1e-8.
      eps_root: added to the second moment under the root, at least 0: a number or a 0-d array.
        Default 0.
      mu_dtype: optax's name for a dtype given as `mu_storage`; give one of the two. Default None.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` needs `params`. Default 0.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.
      nesterov: whether to look one step ahead with the first moment. Default False.
      mu_storage: how to keep both first moments between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`,
      `state[0].nu` and `state[2].mu_slow` are shaped like the parameters, 12 bytes a parameter in
      float32. (With `nesterov` it is `state[3].mu_slow`.)

    Raises:
      ValueError: if a number is out of its range, or if `mu_dtype` and `mu_storage` are both given;
        in `update`, if a gradient does not match its parameter, naming the leaf, or if `params` is
        missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax, optax
      >>> tx = adam_jax.ademamix(1e-3, alpha=optax.linear_schedule(0.0, 5.0, 10_000))

    Source: Pagliardini et al., "The AdEMAMix Optimizer" (arXiv 2409.03137), algorithm 1.
    """
    return optax.chain(
        scale_by_moments(b1, b2, mu_storage=_either(mu_dtype, mu_storage), nu_storage=nu_storage),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        debias(),
        mix_slow_moment(b3, alpha, mu_storage=_either(mu_dtype, mu_storage)),
        normalize(eps=eps, eps_root=eps_root),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Scalar" = 0.9,
    b2: "Rate" = 0.99,
    mu_dtype: "DTypeLike | None" = None,
    weight_decay: "Rate" = 1e-3,
    mask: "Mask" = None,
    *,
    mu_storage: "StorageLike" = None,
) -> Optimizer:
    r"""Lion: the sign of the first moment, kept at one rate and mixed with the gradient at another.

    .. math::

      u_t = -\alpha_t (\operatorname{sign}((1 - b_1) g_t + b_1 m_{t-1}) + \lambda \theta_{t-1}), \\
      m_t = (1 - b_2) g_t + b_2 m_{t-1}

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the average whose sign is taken, in [0, 1): a number or a 0-d array.
        Default 0.9.
      b2: the decay rate of the average that is kept, in [0, 1): a number, a 0-d array or a
        schedule. Default 0.99.
      mu_dtype: optax's name for a dtype given as `mu_storage`; give one of the two. Default None.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` needs `params`. Default 0.001.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu` is
      shaped like the parameters, 4 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range, or if `mu_dtype` and `mu_storage` are both given;
        in `update`, if a gradient does not match its parameter, naming the leaf, or if `params` is
        missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.lion(1e-4, weight_decay=0.1)

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675).
    """
    check_hyperparameter("b2", b2, upper=1, schedule=True)
    return optax.chain(
        scale_by_moments(b2, None, mu_storage=_either(mu_dtype, mu_storage)),
        interpolate(b1),
        first_moment(),
        optax.scale_by_sign(),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


def cautious_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: "Rate" = 0.9,
    b2: "Rate" = 0.999,
    eps: "Scalar" = 1e-8,
    eps_root: "Scalar" = 0.0,
    weight_decay: "Rate" = 1e-4,
    mask: "Mask" = None,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
) -> Optimizer:
    r"""AdamW that moves only where its direction agrees with the gradient of this step.

    .. math:: u_t = -\alpha_t (d_t \phi_t / \operatorname{mean} \phi_t + \lambda \theta_{t-1}),
              \qquad \phi_t = [d_t \cdot g_t > 0]

    with Adam's direction :math:`d_t` and the parameters :math:`\theta`. Element by element
    :math:`\phi_t` is 1 where :math:`d_t` and the gradient :math:`g_t` have the same sign, and 0
    elsewhere; its mean is over the leaf, and at least 1e-3.

    Args:
      learning_rate: the step size :math:`\alpha`, at least 0: a number, a 0-d array or a schedule
        from the number of steps taken so far to the rate.
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.9.
      b2: the decay rate of the second moment, in [0, 1): a number, a 0-d array or a schedule.
        Default 0.999.
      eps: added to the root of the second moment, at least 0: a number or a 0-d array. Default
        1e-8.
      eps_root: added to the second moment under the root, at least 0: a number or a 0-d array.
        Default 0.
      weight_decay: the rate :math:`\lambda` of decoupled weight decay, at least 0: a number, a 0-d
        array or a schedule. It adds :math:`\lambda \theta` to the direction before the learning
        rate multiplies both, as PyTorch's AdamW does; `update` needs `params`. Default 1e-4.
      mask: which leaves decay: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. None, the default: all of them.
      nesterov: whether to look one step ahead with the first moment. Default False.
      eps_hat: whether the epsilons are added before the bias correction, by the convention of
        Keras, and not after it. Default False.
      mu_storage: how to keep the first moment between two steps: a storage, from `adam_jax.storage`
        or your own, or a dtype. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment between two steps: a storage, from
        `adam_jax.storage` or your own, or a dtype. None, the default: in the dtype of the
        parameter, at least float32.

    Returns:
      A gradient transformation. Its state is a tuple with an entry for each stage: `state[0].mu`
      and `state[0].nu` are shaped like the parameters, 8 bytes a parameter in float32.

    Raises:
      ValueError: if a number is out of its range; in `update`, if a gradient does not match its
        parameter, naming the leaf, or if `params` is missing.
      TypeError: if an argument is of the wrong kind; in `init` or `update`, if a parameter or a
        gradient is neither floating point nor complex, naming the leaf.

    Example:
      >>> import adam_jax
      >>> tx = adam_jax.cautious_adamw(1e-3, weight_decay=0.1)

    Source: Liang et al., "Cautious Optimizers" (arXiv 2411.16085), algorithm 1.
    """
    return optax.chain(
        scale_by_moments(b1, b2, mu_storage=mu_storage, nu_storage=nu_storage),
        *([correction.nesterov()] if check_bool("nesterov", nesterov) else []),
        cautious(),
        bias_correct(eps=eps, eps_root=eps_root, eps_hat=eps_hat),
        *([decay_weights(weight_decay, mask=mask)] if _decays(weight_decay, mask) else []),
        scale_by_lr(learning_rate),
    )


# --- Arguments of stages --------------------------------------------------------------------------


def _either(mu_dtype: DTypeLike | None, mu_storage: StorageLike) -> StorageLike:
    """How to keep the first moment: optax's `mu_dtype` is a dtype for `mu_storage`."""
    if mu_dtype is not None and mu_storage is not None:
        raise ValueError("mu_dtype and mu_storage both say how to keep the first moment: give one.")
    return mu_storage if mu_dtype is None else mu_dtype


def _decays(weight_decay: Rate | None, mask: Mask) -> TypeGuard[Rate]:
    if weight_decay is None and mask is not None:
        raise ValueError("mask says which leaves decay, but weight_decay is None.")
    if weight_decay is not None:
        check_hyperparameter("weight_decay", weight_decay, schedule=True)
    return weight_decay is not None


def _accumulates(momentum: Scalar | None, nesterov: bool) -> TypeGuard[Scalar]:
    if momentum is None and check_bool("nesterov", nesterov):
        raise ValueError("nesterov looks ahead along the momentum, but momentum is None.")
    if momentum is not None:
        check_hyperparameter("momentum", momentum, upper=1)
    return momentum is not None


def _check_look_ahead(nesterov: bool, momentum_decay: Scalar | None) -> None:
    if not check_bool("nesterov", nesterov) and momentum_decay is not None:
        raise ValueError("momentum_decay needs nesterov=True.")


def _dozat(b1: Any, momentum_decay: Scalar | None) -> optax.Schedule | None:
    """The momentum schedule of Dozat's section 2.2, if one is asked for."""
    if momentum_decay is None:
        return None
    decay = check_hyperparameter("momentum_decay", momentum_decay)
    if callable(b1):
        raise ValueError("momentum_decay needs a b1 that is no schedule.")
    return lambda t: b1 * (1 - 0.5 * 0.96 ** (decay * (jnp.asarray(t, float) + 1)))
