"""What flows between the stages, and how a stage of one leaf becomes a stage of a tree.

A gradient transformation maps a tree of updates to a tree of updates. Here a leaf of that tree is
either a plain array or one `Moments`: the outer tree never changes, so every optax wrapper that
selects leaves (`optax.masked`, `optax.partition`) works around one stage as well as around a chain.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._numbers import Scalar, scalar, wider
from adam_jax._tree import at, check_inexact, traced_once


class Average(NamedTuple):
    r"""A moving average of one leaf, and what later stages must know of it.

    .. math:: a_t = (1 - b_t) x_t + b_t a_{t-1}, \qquad w_t = 1 - \prod_{s \le t} b_s

    Started at 0, it has gathered the weight :math:`w_t` only, and dividing by that is all of Adam's
    bias correction. After every stage :math:`w_{t+1} = 1 - b_{t+1} (1 - w_t)`.

    Attributes:
      value: the average :math:`a_t`, shape of the leaf, at least float32.
      decay: the decay rate :math:`b_t` of this step, a scalar.
      weight: the gathered weight :math:`w_t`, a scalar in (0, 1]; exactly 1 once debiased.
      next_decay: the rate of the next step; `decay` where that cannot be known (a rate that is
        injected step by step).
      next_weight: the weight after the next step.
      length: how many equally weighted gradients it averages in effect, a scalar that grows from 1:
        twice their mean age plus 1. RAdam's :math:`\rho_t`.
      previous: the average before this gradient joined it, for Lion and ADOPT; its weight is 0
        before the first gradient. None for a first moment that is not kept.
    """

    value: Any
    decay: Scalar
    weight: Scalar
    next_decay: Scalar
    next_weight: Scalar
    length: Scalar = 1.0
    previous: Any = None

    def with_value(self, value: jax.Array) -> "Average":
        """The same weights for another value."""
        return self._replace(value=value)

    def debiased(self) -> "Average":
        """The value over its weight."""
        value = self.value / scalar(self.weight, self.value.dtype)
        return self._replace(value=value, weight=1.0, next_weight=1.0)

    def stepped(self, grad: jax.Array, decay: Scalar) -> "Average":
        """One step on, with a rate that stays."""
        weight = 1 - decay * (1 - self.weight)
        return Average(
            value=mixed(self.value, grad.astype(self.value.dtype), decay),
            decay=decay,
            weight=weight,
            next_decay=decay,
            next_weight=1 - decay * (1 - weight),
            length=decay * self.weight * (self.length + 1) / weight + 1,
            previous=self,
        )

    def looked_ahead(self, grad: jax.Array) -> "Average":
        """Dozat's look-ahead, debiased: this average as it will be, if `grad` comes once more."""
        dtype = self.value.dtype
        decay, weight, next_decay, next_weight = (
            scalar(x, dtype) for x in (self.decay, self.weight, self.next_decay, self.next_weight)
        )
        value = next_decay * (self.value / next_weight) + (1 - decay) * (
            grad.astype(dtype) / weight
        )
        return self._replace(value=value, weight=1.0, next_weight=1.0)


def mixed(kept: jax.Array, new: jax.Array, decay: Scalar) -> jax.Array:
    """The moving average of one more number."""
    decay = scalar(decay, kept.dtype)
    return (1 - decay) * new + decay * kept


class Moments(NamedTuple):
    r"""The moments of one leaf: what `scale_by_moments` emits and the later stages read.

    The averages carry their own rates and weights, so that no later stage repeats a decay rate.

    Attributes:
      grad: the gradient of this step, shape and dtype of the leaf.
      mu: the first moment, an `Average` whose value is at least float32 (or complex64). Where
        `scale_by_moments` was told to keep none, its value is the gradient.
      nu: the second moment, an `Average` whose value is real; None where none is kept.
      seal: empty arrays of dtype bool, one for each moment, which arithmetic would turn into
        another dtype: so the next stage knows whether a stage in between took the moments for
        updates. They stand under "rounded" if the moments lose digits between two steps, else
        under "full".

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.scale_by_moments(b1=0.5, b2=0.75)
      >>> params = jnp.zeros(2)
      >>> moments, state = stage.update(jnp.array([1.0, 2.0]), stage.init(params))
      >>> print(moments.mu.value, moments.nu.value)
      [0.5 1. ] [0.25 1.  ]
      >>> print(moments.mu.weight, moments.nu.weight)
      0.5 0.25

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1 and section 3.
    """

    grad: jax.Array
    mu: Average
    nu: Average | None
    seal: Any = None


def sealed(rounded: bool) -> dict[str, np.ndarray]:
    """The seal of new moments."""
    return {"rounded" if rounded else "full": np.zeros(0, bool)}


def kept_mu(moments: Moments) -> Average:
    """The first moment, which a chain without a `b1` does not have."""
    if moments.mu.previous is None:
        raise TypeError("There is no first moment: give adam_jax.scale_by_moments a b1.")
    return moments.mu


def kept_nu(moments: Moments) -> Average:
    """The second moment, which a chain without a `b2` does not have."""
    if moments.nu is None:
        raise TypeError(
            "There is no second moment: give adam_jax.scale_by_moments a b2, or step along the "
            "first moment with adam_jax.first_moment()."
        )
    return moments.nu


# --- From a leaf to a tree ------------------------------------------------------------------------


def map_moments(stage: str, fn: Callable[..., Any], updates: optax.Updates, *rest: Any) -> Any:
    """`fn` on every `Moments` of the tree; a plain update is an error that names `stage`."""

    def checked(path, moments, *others):
        if not _is_moments(moments):
            raise TypeError(
                f"{stage} takes the Moments that adam_jax.scale_by_moments emits, but got a plain "
                f"update{at(path)}: put adam_jax.scale_by_moments(...) before {stage}."
            )
        if any(part.dtype != bool for part in jax.tree.leaves(moments.seal)):
            raise TypeError(
                f"{stage} got Moments{at(path)} that a stage in between took for updates and did "
                f"arithmetic on, such as optax.scale or optax.clip: put it before "
                f"adam_jax.scale_by_moments(...), where it acts on the gradients, or after "
                f"adam_jax.bias_correct(...), where it acts on the update."
            )
        return fn(moments, *others)

    return jax.tree_util.tree_map_with_path(checked, updates, *rest, is_leaf=_is_moments)


def map_updates(stage: str, fn: Callable[..., Any], updates: optax.Updates, *rest: Any) -> Any:
    """`fn` on every plain update of the tree; a `Moments` is an error that names `stage`."""

    def checked(path, update, *others):
        check_plain(stage, path, update)
        return fn(jnp.asarray(update), *others)

    return jax.tree_util.tree_map_with_path(checked, updates, *rest, is_leaf=_is_moments)


def check_plain(stage: str, path: tuple, update: Any) -> None:
    """A leaf must be a floating-point or complex array."""
    if _is_moments(update):
        raise TypeError(
            f"{stage} takes plain updates, but got the Moments of adam_jax.scale_by_moments"
            f"{at(path)}: put adam_jax.bias_correct(...) between the two."
        )
    check_inexact(stage, path, update)


def check_updates(stage: str, updates: optax.Updates) -> None:
    """Every leaf must be one."""
    leaves = jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_moments)
    for path, update in leaves:
        check_plain(stage, path, update)


def map_values(fn: Callable[[Moments], Any], updates: optax.Updates) -> Any:
    """A tree of arrays, one of every `Moments`."""
    return jax.tree.map(fn, updates, is_leaf=_is_moments)


def stateless(
    stage: str, fn: Callable[[Moments], Moments]
) -> optax.GradientTransformationExtraArgs:
    """A stage without state from moments to moments: `fn` of one leaf on every one."""
    once = traced_once(fn)

    def inside(moments):
        return once(_unsealed(moments))._replace(seal=moments.seal)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return map_moments(stage, inside, updates), state

    return optax.GradientTransformationExtraArgs(_no_state, update_fn)


def to_updates(
    stage: str, fn: Callable[[Moments], jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """A stage without state from moments to updates: `fn` of one leaf on every one.

    An update is as wide as the gradient and the parameter, so that float32 parameters with bfloat16
    gradients do not get rounded updates. Without the parameters it is as wide as the moments.
    """
    once = traced_once(fn)

    def inside(moments, param):
        update = once(_unsealed(moments))
        if param is None:
            return update.astype(moments.mu.value.dtype)
        return update.astype(wider(moments.grad.dtype, jnp.result_type(param)))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        return map_moments(stage, inside, updates, params_beside(updates, params)), state

    return optax.GradientTransformationExtraArgs(_no_state, update_fn)


def params_beside(updates: optax.Updates, params: Any) -> Any:
    """The parameter of every leaf; None where there is none or the tree is another one."""
    structure: Any = jax.tree.structure(updates, is_leaf=_is_moments)
    try:
        structure.flatten_up_to(params)
    except ValueError:
        return map_values(lambda _: None, updates)
    return params


def _unsealed(moments: Moments) -> Moments:
    """Without the arrays of the seal, which no arithmetic needs."""
    return moments._replace(seal=dict.fromkeys(moments.seal or ()))


def _no_state(params):
    del params
    return optax.EmptyState()


def _is_moments(leaf: Any) -> bool:
    return isinstance(leaf, Moments)
