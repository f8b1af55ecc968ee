"""What flows between the stages, and the checks on it.

A gradient transformation maps a tree of updates to a tree of updates. Here a leaf of that tree is
either a plain array or one `Moments`: the outer tree never changes, so every optax wrapper that
selects leaves (`optax.masked`, `optax.partition`) works around one stage as well as around a chain.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Scalar = jax.Array | float


class Last(NamedTuple):
    """The moments of one leaf and their weights before the gradient of this step joined them."""

    mu: Any = None
    nu: Any = None
    mu_weight: Scalar = 0.0
    nu_weight: Scalar = 0.0


class Moments(NamedTuple):
    r"""The moments of one leaf: what `scale_by_moments` emits and the later stages read.

    The signal carries its own weights, so that no later stage repeats a decay rate:
    :math:`w_t = 1 - \prod_{s \le t} b_s` is the weight that the average has gathered so far, and
    dividing by it is all of Adam's bias correction.

    Attributes:
      grad: the gradient of this step, shape and dtype of the leaf. The chain emits this dtype.
      mu: the first moment, shape of the leaf, at least float32 (or complex64).
      nu: the second moment, shape of the leaf, real, at least float32.
      mu_decay: the decay rate of `mu` at this step, a scalar.
      nu_decay: the decay rate of `nu` at this step, a scalar.
      mu_weight: the weight gathered by `mu`, a scalar in (0, 1]; exactly 1 once debiased.
      nu_weight: the weight gathered by `nu`, likewise.
      mu_next_decay: the decay rate of `mu` at the next step, for Nesterov's look-ahead; None where
        it cannot be known (a rate injected step by step), then `mu_decay` stands in for it.
      mu_next_weight: the weight that `mu` will have gathered at the next step; None likewise.
      nu_length: how many equally weighted gradients `nu` averages in effect, a scalar that grows
        from 1: twice their mean age plus 1. RAdam's :math:`\rho_t`.
      last: the moments and weights before this gradient joined them (Lion and ADOPT need them).

    A moment that `scale_by_moments` was told not to keep is the gradient itself (`mu`) or None
    (`nu`).

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.scale_by_moments(b1=0.5, b2=0.75)
      >>> params = jnp.zeros(2)
      >>> moments, state = stage.update(jnp.array([1.0, 2.0]), stage.init(params))
      >>> print(moments.mu, moments.nu)
      [0.5 1. ] [0.25 1.  ]
      >>> print(moments.mu_weight, moments.nu_weight)
      0.5 0.25

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1 and section 3.
    """

    grad: jax.Array
    mu: jax.Array
    nu: jax.Array
    mu_decay: Scalar
    nu_decay: Scalar
    mu_weight: Scalar
    nu_weight: Scalar
    mu_next_decay: Scalar | None = None
    mu_next_weight: Scalar | None = None
    nu_length: Scalar = 1.0
    last: Last = Last()  # a constant


# --- Walking a tree of signals --------------------------------------------------------------------


def map_moments(
    stage: str, fn: Callable[..., Any], updates: optax.Updates, *rest: optax.Updates
) -> Any:
    """`fn` on every `Moments` of the tree; a plain update is an error that names `stage`."""

    def leaf(path, signal, *others):
        if not _is_moments(signal):
            raise TypeError(
                f"{stage} takes the Moments that adam_jax.scale_by_moments emits, but got a plain "
                f"update{_at(path)}: put adam_jax.scale_by_moments(...) before {stage}."
            )
        return fn(signal, *others)

    return jax.tree_util.tree_map_with_path(leaf, updates, *rest, is_leaf=_is_moments)


def map_updates(
    stage: str, fn: Callable[..., Any], updates: optax.Updates, *rest: optax.Updates
) -> Any:
    """`fn` on every plain update of the tree; a `Moments` is an error that names `stage`."""

    def leaf(path, update, *others):
        _check_plain(stage, path, update)
        return fn(jnp.asarray(update), *others)

    return jax.tree_util.tree_map_with_path(leaf, updates, *rest, is_leaf=_is_moments)


def shared(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of one leaf, traced once for all leaves of a kind, wherever a step is traced.

    A model has many more leaves than shapes, and tracing and lowering each by itself would take
    most of the time before XLA takes over. A Python number stays one, on the way in and out,
    because arithmetic on numbers and on float32 scalars differs in the last digit.
    """
    results = {}

    @functools.partial(jax.jit, static_argnums=0)
    def on_arrays(kind, arrays):
        arrays, results[kind] = _split(fn(*_joined(kind, arrays)))
        return arrays

    def leaf(*args):
        arrays, kind = _split(args)
        if not any(isinstance(array, jax.core.Tracer) for array in arrays):
            return fn(*args)
        arrays = on_arrays(kind, arrays)
        return _joined(results[kind], arrays)

    return leaf


def _split(tree: Any) -> tuple[list[Any], Any]:
    """The arrays of a tree, and what remains of it without them: its structure and its numbers."""
    leaves, structure = jax.tree.flatten(tree)
    numbers = tuple(leaf if isinstance(leaf, int | float) else None for leaf in leaves)
    arrays = [leaf for leaf, number in zip(leaves, numbers, strict=True) if number is None]
    return arrays, (structure, numbers)


def _joined(kind: Any, arrays: Sequence[Any]) -> Any:
    """What `_split` has split."""
    (structure, numbers), left = kind, iter(arrays)
    return jax.tree.unflatten(structure, [next(left) if n is None else n for n in numbers])


def first_moment(moments: Moments) -> jax.Array:
    """The first moment, which in a chain without a `b1` is the mere gradient."""
    if moments.last.mu is None:
        raise TypeError("There is no first moment: give adam_jax.scale_by_moments a b1.")
    return moments.mu


def second_moment(moments: Moments) -> jax.Array:
    """The second moment, which a chain without a `b2` does not have."""
    if moments.nu is None:
        raise TypeError(
            "There is no second moment: give adam_jax.scale_by_moments a b2, or step along the "
            "first moment with adam_jax.first_moment()."
        )
    return moments.nu


def picked(field: str, moments: optax.Updates) -> Any:
    """One field of every `Moments` of the tree."""
    return jax.tree.map(lambda signal: getattr(signal, field), moments, is_leaf=_is_moments)


def _is_moments(leaf: Any) -> bool:
    return isinstance(leaf, Moments)


# --- Checks on trees ------------------------------------------------------------------------------


def check_params(stage: str, params: optax.Params, mu_dtype: Any | None) -> None:
    """Only floating-point and complex parameters have gradients, and `mu_dtype` must hold those."""
    for path, param in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(param)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{stage} optimizes floating-point and complex parameters, but the parameter"
                f"{_at(path)} is {dtype}: leave it out with optax.masked or optax.partition."
            )
        if mu_dtype is not None and _is_complex(mu_dtype) != _is_complex(dtype):
            raise TypeError(
                f"{stage} cannot keep the first moment of the {dtype} parameter{_at(path)} in "
                f"mu_dtype={jnp.dtype(mu_dtype)}: treat it apart with optax.partition."
            )


def check_plain(stage: str, updates: optax.Updates) -> None:
    """Every leaf must be a plain update."""
    for path, update in _leaves_by_path(updates).items():
        _check_plain(stage, path, update)


def check_match(stage: str, kept: Any, due: Any) -> None:
    """What is kept must have the places, shapes and realness that are due for the gradients."""
    kept, due = _leaves_by_path(kept), _leaves_by_path(due)
    for path in {**kept, **due}:
        was, now = (_kind(tree.get(path, _NOTHING)) for tree in (kept, due))
        if was != now:
            raise ValueError(
                f"{stage} got gradients that do not match the parameters of init(): the leaf"
                f"{_at(path)} was {was} there, and its gradient is {now}."
            )


_NOTHING = "nothing"


def _check_plain(stage: str, path: tuple, update: Any) -> None:
    if _is_moments(update):
        raise TypeError(
            f"{stage} takes plain updates, but got the Moments of adam_jax.scale_by_moments"
            f"{_at(path)}: put adam_jax.bias_correct(...) between the two."
        )


def _leaves_by_path(tree: Any) -> dict[tuple, Any]:
    # A None is a leaf here: a missing gradient must be told from a parameter that is None.
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda leaf: leaf is None or _is_moments(leaf)
    )
    return dict(leaves)


def _kind(leaf: Any) -> str:
    if leaf is None or leaf is _NOTHING:
        return str(leaf)
    return f"{'complex' if _is_complex(leaf.dtype) else 'real'} of shape {leaf.shape}"


def _is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def _at(path: tuple) -> str:
    return f" at {jax.tree_util.keystr(path)}" if path else ""


# --- Hyperparameters and dtypes -------------------------------------------------------------------


def check_hyperparameter(
    name: str, value: Any, *, upper: float = math.inf, schedule: bool = False
) -> Any:
    """A Python number as a float in [0, upper); an array or a schedule as it is.

    Numbers are checked for their range here, when the stage is built. The value of an array may be
    traced, so only its shape and dtype are checked.
    """
    if callable(value) and schedule:
        return value
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        if not 0 <= value < upper:
            due = "finite and at least 0" if upper == math.inf else f"in [0, {upper:g})"
            raise ValueError(f"{name} must be {due}, got {value!r}.")
        return float(value)
    if isinstance(value, jax.Array | np.ndarray):
        return check_scalar(name, value)
    kinds = "a number, a 0-d array or a schedule" if schedule else "a number or a 0-d array"
    raise TypeError(f"{name} must be {kinds}, got {value!r}.")


def check_scalar(name: str, value: Any) -> jax.Array:
    """A 0-d array of at least float32: in less, 0.999 is 1 and 1e-8 may be 0."""
    array = jnp.asarray(value)
    if array.ndim != 0:
        raise ValueError(f"{name} must be a scalar, got an array of shape {array.shape}.")
    if jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(float)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {array.dtype}.")
    if jnp.finfo(array.dtype).bits < 32:
        raise ValueError(
            f"{name} must be at least float32, got {array.dtype}, which rounds 0.999 to "
            f"{float(jnp.asarray(0.999, array.dtype)):g}. With optax.inject_hyperparams, pass "
            f"hyperparam_dtype=jnp.float32."
        )
    return array


def check_dtype(name: str, dtype: Any | None, kind: Any) -> Any | None:
    """A dtype to keep a moment in, of the given kind, or None."""
    if dtype is not None and not jnp.issubdtype(dtype, kind):
        kinds = "floating-point" if kind is jnp.floating else "floating-point or complex"
        raise ValueError(f"{name} must be a {kinds} dtype, got {dtype!r}.")
    return dtype


def accumulator(dtype: Any) -> Any:
    """The dtype to compute in: at least float32; float64 and complex keep theirs."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def wider(dtype: Any, other: Any) -> Any:
    """The more precise of two dtypes, the first if they are equally precise."""
    return other if jnp.finfo(other).bits > jnp.finfo(dtype).bits else dtype


def real(dtype: Any) -> Any:
    """The dtype of the absolute value."""
    return jnp.finfo(dtype).dtype


def cast(value: Any, dtype: Any) -> Any:
    """An array in `dtype`; a Python number as it is, because it takes the dtype it meets."""
    return value if isinstance(value, int | float) else jnp.asarray(value).astype(dtype)
