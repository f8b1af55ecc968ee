"""The first stage: from gradients to moments. It holds the only large state of the pipeline."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from adam_jax._checks import check_hyperparameter, check_params
from adam_jax._jit import once
from adam_jax._numerics import Rate, accumulator, as_count, increment, real, scalar, wider
from adam_jax._ownership import at
from adam_jax.average import Average, mixed, no_weights, step_weights
from adam_jax.rules import squared
from adam_jax.signal import INTACT, Moments, check_updates, map_values
from adam_jax.storage._protocol import Slot, StorageLike

SecondMoment: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | float], jax.Array]


class ScaleByMomentsState(NamedTuple):
    """The state of `scale_by_moments`: the same for rates that are numbers, arrays or schedules.

    All zeros are a fresh state, so ``jax.tree.map(jnp.zeros_like, state)`` starts anew, with the
    right bias correction. To start a group of leaves anew, give the group a state of its own with
    `optax.partition`, and set that to zero; to start rows of a leaf anew, give each row one with
    ``jax.vmap(tx.init)`` and ``jax.vmap(tx.update)``.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates; with a storage it goes on
        from 2**30 after 2**31 - 1, for the sake of its random bits.
      mu: the first moments, as their storage keeps them: a tree shaped like the parameters, or a
        NamedTuple of such trees. None if `b1` is None.
      nu: the second moments, likewise, real; None if `b2` is None.
      weights: what bias correction needs to know of the past rates, a float array of shape
        (5, moments), with a column for each moment that is kept (its rows are explained at
        `average.ROWS`). All zeros before the first step; zeros after some steps mean that the rates
        have never changed.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    mu: Any
    nu: Any
    weights: jax.Array


def scale_by_moments(
    b1: "Rate | None" = 0.9,
    b2: "Rate | None" = 0.999,
    *,
    second_moment: "SecondMoment | None" = None,
    initial_mu: float = 0.0,
    initial_nu: float = 0.0,
    mu_storage: "StorageLike" = None,
    nu_storage: "StorageLike" = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace every gradient by its first and second moment.

    .. math::

      m_t = (1 - b_1) g_t + b_1 m_{t-1}, \qquad v_t = (1 - b_2) |g_t|^2 + b_2 v_{t-1}

    The moments start at 0. So after t steps the weights of the gradients in one sum to
    :math:`w_t = 1 - \prod_{s \le t} b_s` only, not to 1. The emitted `Moments` carry the rates and
    this weight along, so that a later stage can correct for it exactly, whatever schedule the rates
    follow. A running job may go on with another rate, or a schedule in the place of a number: the
    state is the same.

    Args:
      b1: the decay rate of the first moment, in [0, 1): a number, a 0-d array of at least float32,
        or a schedule from the number of steps taken so far to the rate. None keeps no first moment:
        the emitted one is the gradient. Default 0.9.
      b2: the decay rate of the second moment, likewise. None keeps no second moment. Default 0.999.
      second_moment: the rule `(grad, mu, nu, decay) -> nu` for one leaf, a pure function:
        `squared`, `belief`, `yogi`, `infinity`, `accumulated` or your own. None, the default:
        `squared`. (With `optax.inject_hyperparams`, name it in `static_args`: a function would be
        taken for a schedule.)
      initial_mu: the number that all first moments are before the first step. Default 0.
      initial_nu: the number that all second moments are before the first step, finite and at least
        0. Default 0.
      mu_storage: how to keep the first moment between steps: a dtype, one of `adam_jax.storage`, or
        your own `Storage`. None, the default: in the dtype of the parameter, at least float32.
      nu_storage: how to keep the second moment, likewise; it is real for complex parameters too.

    Returns:
      A gradient transformation from gradients to `Moments`, with a `ScaleByMomentsState`.
      Arithmetic is done in at least float32 however the moments are kept. The emitted moments are
      those of this step, before the storage rounds them.

    Raises:
      ValueError: if a rate is outside [0, 1), not a scalar, or in less than float32, if both rates
        are None, or if a storage is not for its moment; in `update`, if a gradient does not match
        the parameter that `init` was given, or the state was made with another storage, naming the
        leaf.
      TypeError: if a rate is not a number, an array or a schedule, the rule not a function, or a
        storage neither a `Storage` nor a dtype; in `init`, if a parameter is neither floating point
        nor complex, naming the leaf.

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
    rates = {
        name: check_hyperparameter(name, rate, upper=1, schedule=True)
        for name, rate in (("b1", b1), ("b2", b2))
        if rate is not None
    }
    initial_nu = check_hyperparameter("initial_nu", initial_nu)
    mu_slot = Slot.of("scale_by_moments", "mu", mu_storage)
    nu_slot = Slot.of("scale_by_moments", "nu", nu_storage)
    rule = squared if second_moment is None else second_moment
    if not callable(rule):
        raise TypeError(
            f"second_moment must be a function (grad, mu, nu, decay) -> nu, got {rule!r}."
        )
    if isinstance(rule, functools.partial):  # a pytree, whose arrays may be traced
        rule = jax.tree_util.Partial(rule.func, *rule.args, **rule.keywords)
    rounded = () if mu_slot.rounds or nu_slot.rounds else None

    def init_fn(params):
        check_params("scale_by_moments", params)
        return ScaleByMomentsState(
            count=jnp.zeros([], jnp.int32),
            mu=mu_slot.init(params, initial_mu) if "b1" in rates else None,
            nu=nu_slot.init(params, initial_nu) if "b2" in rates else None,
            weights=no_weights(len(rates)),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_updates("scale_by_moments", updates)
        count = as_count(state.count)
        averages, weights = step_weights("scale_by_moments", state, rates, count)
        mu, nu = (averages.get(name) for name in ("b1", "b2"))
        nothing = jax.tree.map(lambda _: None, updates), lambda moments: None
        old_mu, save_mu = mu_slot.load(state.mu, updates, count) if mu else nothing
        old_nu, save_nu = nu_slot.load(state.nu, updates, count) if nu else nothing

        def moments_of(path, grad, old_mu, old_nu):
            grad = jnp.asarray(grad)
            decays = mu and mu.decay, nu and nu.decay
            new_mu, new_nu = once(_averaged, rule, grad, old_mu, old_nu, *decays)
            if nu is not None:
                _check_nu(path, new_nu, new_mu)
            return Moments(
                grad=grad,
                mu=_of_leaf(mu, new_mu, old_mu) if mu else Average.memoryless(new_mu),
                nu=_of_leaf(nu, new_nu, old_nu) if nu else None,
                intact=INTACT,
                rounded=rounded,
            )

        moments = jax.tree_util.tree_map_with_path(moments_of, updates, old_mu, old_nu)
        return moments, ScaleByMomentsState(
            count=increment(count, draws=rounded is not None),
            mu=save_mu(map_values(lambda m: m.mu.value, moments)),
            nu=save_nu(map_values(lambda m: m.nu and m.nu.value, moments)),
            weights=weights,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _averaged(
    rule: SecondMoment, grad: jax.Array, old_mu: Any, old_nu: Any, b1: Any, b2: Any
) -> tuple[Any, Any]:
    """The moments of one leaf, None for one that is not kept."""
    dtype = accumulator(grad.dtype)
    for old in (old_mu, old_nu):
        dtype = dtype if old is None else wider(dtype, old.dtype)
    mu = grad.astype(dtype)
    nu = None if old_nu is None else old_nu.astype(real(dtype))
    if old_mu is not None:
        mu = mixed(old_mu.astype(dtype), mu, b1)
    if nu is not None:
        nu = rule(grad.astype(dtype), mu, nu, scalar(b2, nu.dtype))
    return mu, nu


def _of_leaf(average: Average, value: Any, old: Any) -> Average:
    """The average of a leaf, from the scalars of this step and of the last one."""
    return average._replace(value=value, previous=average.previous.with_value(old))


def _check_nu(path: tuple, nu: Any, mu: jax.Array) -> None:
    """A rule of one's own may return anything."""
    due = mu.shape, real(mu.dtype)
    got = getattr(nu, "shape", None), getattr(nu, "dtype", None)
    if got != due:
        returned = repr(nu) if got[1] is None else f"{got[0]} and {got[1]}"
        raise ValueError(
            f"second_moment must keep the shape and dtype of nu, {due[0]} and {due[1]}, but"
            f"{at(path)} it returned {returned}."
        )
