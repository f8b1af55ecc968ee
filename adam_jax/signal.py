"""The moments that flow between stages, and how a function of a leaf becomes a stage.

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

from adam_jax._checks import check_inexact
from adam_jax._jit import once
from adam_jax._numerics import wider
from adam_jax._ownership import at
from adam_jax.average import Average


class Moments(NamedTuple):
    r"""The moments of one leaf: what `scale_by_moments` emits and the later stages read.

    The averages carry their own rates and weights, so that no later stage repeats a decay rate.

    Attributes:
      grad: the gradient of this step, shape and dtype of the leaf.
      intact: a boolean scalar, True, by which a transformation that takes the moments for updates
        is noticed. Arithmetic on it raises a TypeError that says where to put the transformation
        (it is the field before the averages, so that it is met first). If all is set to zero, it
        becomes False, and the update is 0.
      mu: the first moment, an `Average` whose value is at least float32 (or complex64). Where
        `scale_by_moments` was told to keep none, its value is the gradient.
      nu: the second moment, an `Average` whose value is real; None where none is kept.
      rounded: () if a storage rounds the moments between two steps, None if not. `center` takes no
        rounded moments.

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
    intact: Any
    mu: Average
    nu: Average | None
    rounded: Any = None

    def __radd__(self, other: Any) -> Any:
        """Parameters plus `Moments`, as `optax.apply_updates` adds what a chain ends in."""
        raise TypeError(
            "This chain ends in Moments, which are no updates. A stage that divides them is "
            "missing, such as adam_jax.bias_correct(), and adam_jax.scale_by_lr(…) after it."
        )

    def kept_mu(self) -> Average:
        """The first moment, which a chain without a `b1` does not have."""
        if self.mu.previous is None:
            raise TypeError("There is no first moment: give adam_jax.scale_by_moments a b1.")
        return self.mu

    def kept_nu(self) -> Average:
        """The second moment, which a chain without a `b2` does not have."""
        if self.nu is None:
            raise TypeError(
                "There is no second moment: give adam_jax.scale_by_moments a b2, or step along "
                "the first moment with adam_jax.first_moment()."
            )
        return self.nu


# --- What must not happen to the moments between two stages ---------------------------------------

_DONE = (
    "a stage in between took for updates and did arithmetic on, such as optax.scale or optax.clip: "
    "put it before adam_jax.scale_by_moments(...), where it acts on the gradients, or after "
    "adam_jax.bias_correct(...), where it acts on the update."
)


class _Intact(np.ndarray):
    """The boolean scalar of `Moments`, which refuses NumPy's arithmetic and Python's operators."""

    __array_priority__: Any = 1000  # before an array of JAX takes over

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"There are Moments of adam_jax.scale_by_moments here, that {_DONE}")


INTACT = np.ones((), bool).view(_Intact)


# --- From a leaf to a tree ------------------------------------------------------------------------


def is_leaf(node: Any) -> bool:
    """A None is one: frameworks leave parameters out of the gradients, but not of the model."""
    return node is None or isinstance(node, Moments)


def map_moments(stage: str, fn: Callable[..., Any], updates: optax.Updates, *rest: Any) -> Any:
    """`fn` on every `Moments` of the tree; a plain update is an error that names `stage`."""

    def checked(path, moments, *others):
        if moments is None:
            return None
        if not isinstance(moments, Moments):
            raise TypeError(
                f"{stage} takes the Moments that adam_jax.scale_by_moments emits, but got a plain "
                f"update{at(path)}: put adam_jax.scale_by_moments(...) before {stage}."
            )
        if moments.intact.dtype != bool:  # arithmetic has made a number of it
            raise TypeError(f"{stage} got Moments{at(path)} that {_DONE}")
        return fn(moments, *others)

    return jax.tree_util.tree_map_with_path(checked, updates, *rest, is_leaf=is_leaf)


def map_updates(stage: str, fn: Callable[..., Any], updates: optax.Updates, *rest: Any) -> Any:
    """`fn` on every plain update of the tree; a `Moments` is an error that names `stage`."""

    def checked(path, update, *others):
        if update is None:
            return None
        check_plain(stage, path, update)
        return fn(jnp.asarray(update), *others)

    return jax.tree_util.tree_map_with_path(checked, updates, *rest, is_leaf=is_leaf)


def check_plain(stage: str, path: tuple, update: Any) -> None:
    """A leaf must be a floating-point or complex array."""
    if isinstance(update, Moments):
        raise TypeError(
            f"{stage} takes plain updates, but got the Moments of adam_jax.scale_by_moments"
            f"{at(path)}: put adam_jax.bias_correct(...) between the two."
        )
    check_inexact(stage, path, update)


def check_updates(stage: str, updates: optax.Updates) -> None:
    """Every leaf must be a plain update."""
    leaves = jax.tree_util.tree_leaves_with_path(
        updates, is_leaf=lambda node: isinstance(node, Moments)
    )
    for path, update in leaves:
        check_plain(stage, path, update)


def map_values(fn: Callable[[Moments], Any], updates: optax.Updates) -> Any:
    """A tree of arrays, one of every `Moments`."""
    return jax.tree.map(fn, updates, is_leaf=lambda node: isinstance(node, Moments))


def params_of(updates: optax.Updates, params: Any) -> Any:
    """The parameter of every leaf; None where there is no array, or the tree is another one."""
    structure: Any = jax.tree.structure(updates, is_leaf=is_leaf)
    try:
        leaves = structure.flatten_up_to(params)
    except ValueError:
        leaves = [None] * structure.num_leaves
    is_array = lambda p: hasattr(p, "dtype") or isinstance(p, int | float | complex)  # noqa: E731
    return structure.unflatten([p if is_array(p) else None for p in leaves])


def stateless(
    stage: str, fn: Callable[..., Moments], *hyperparameters: Any
) -> optax.GradientTransformationExtraArgs:
    """A stage without state from moments to moments: `fn` of one leaf on every one."""

    def inside(moments):
        new = once(fn, moments._replace(intact=None), *hyperparameters)
        return new._replace(intact=moments.intact)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        with jax.named_scope(stage):
            return map_moments(stage, inside, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def to_updates(
    stage: str, fn: Callable[..., jax.Array], *hyperparameters: Any
) -> optax.GradientTransformationExtraArgs:
    """A stage without state from moments to updates: `fn` of one leaf on every one.

    An update is as wide as the gradient and the parameter, so that float32 parameters with bfloat16
    gradients do not get rounded updates. Without the parameters it is as wide as the moments.
    """

    def inside(moments, param):
        update = once(fn, moments._replace(intact=None), *hyperparameters)
        dtype = update.dtype
        if param is not None:
            dtype = wider(moments.grad.dtype, jnp.result_type(param))
        if moments.intact is not INTACT:  # another transformation may have set all to zero
            update = jnp.where(moments.intact, update, 0)
        return update.astype(dtype)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        with jax.named_scope(stage):
            return map_moments(stage, inside, updates, params_of(updates, params)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
