"""Checks of hyperparameters when a stage is built, and of trees when it runs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adam_jax._numerics import is_complex
from adam_jax._ownership import at, leaves_by_path

# --- Hyperparameters ------------------------------------------------------------------------------


def check_hyperparameter(
    name: str, value: Any, *, upper: float = math.inf, schedule: bool = False
) -> Any:
    """A Python number as a float in [0, upper); an array or a schedule as it is.

    What is known when the stage is built is checked for its range here: numbers, and arrays that
    are not traced. Of a traced array only the shape and the dtype are known.
    """
    if callable(value) and schedule:
        return value
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        _check_range(name, value, upper)
        return float(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = check_scalar(name, value)
        if not isinstance(array, Tracer):
            _check_range(name, float(array), upper)
        return array
    kinds = "a number, a 0-d array or a schedule" if schedule else "a number or a 0-d array"
    raise TypeError(f"{name} must be {kinds}, got {value!r}.")


def _check_range(name: str, value: Any, upper: float) -> None:
    if not 0 <= value < upper:
        due = "finite and at least 0" if upper == math.inf else f"in [0, {upper:g})"
        raise ValueError(f"{name} must be {due}, got {value!r}.")


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
            f"{float(np.asarray(0.999, array.dtype)):g}. With optax.inject_hyperparams, pass "
            f"hyperparam_dtype=jnp.float32."
        )
    return array


def check_bool(name: str, value: Any) -> bool:
    """True or False: a number in the place of a switch is most often meant for another argument."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def check_integer(name: str, value: Any) -> int:
    """An integer, such as a seed."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    return int(value)


def check_count(name: str, value: Any, multiple_of: int = 1) -> int:
    """A positive integer."""
    count = check_integer(name, value)
    if count < 1 or count % multiple_of:
        even = " and even" if multiple_of == 2 else ""
        raise ValueError(f"{name} must be positive{even}, got {count}.")
    return count


def check_dtype(name: str, dtype: Any, kind: Any = jnp.floating) -> jnp.dtype:
    """A dtype of the given kind that holds 0 and both signs."""
    kinds = "floating-point" if kind is jnp.floating else "floating-point or complex"
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, kind):
        raise ValueError(f"{name} must be a {kinds} dtype, got {dtype!r}.")
    if np.asarray(0, found) != 0 or np.asarray(-1, found) != -1:
        raise ValueError(f"{name} must hold 0 and negative numbers, which {found} does not.")
    return found


# --- Trees ----------------------------------------------------------------------------------------


def check_params(stage: str, params: Any) -> None:
    """Only floating-point and complex parameters have gradients."""
    for path, param in jax.tree_util.tree_leaves_with_path(params):
        try:
            dtype = jnp.result_type(param)
        except TypeError:
            raise TypeError(
                f"{stage} optimizes arrays, but the parameter{at(path)} is {param!r}: leave it "
                f"out, in Equinox with equinox.filter(model, equinox.is_inexact_array)."
            ) from None
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{stage} optimizes floating-point and complex parameters, but the parameter"
                f"{at(path)} is {dtype}: leave it out with optax.masked or optax.partition."
            )


def check_inexact(stage: str, path: tuple, update: Any) -> None:
    """An update is floating point or complex."""
    dtype = getattr(update, "dtype", None) or jnp.result_type(update)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{stage} takes floating-point and complex updates, but the one{at(path)} is "
            f"{dtype}: leave the leaf out with optax.masked or optax.partition."
        )


def check_match(stage: str, kept: Any, due: Any) -> None:
    """What is kept must match the gradients: in paths, in shapes, and in what is complex."""
    kept, due = leaves_by_path(kept), leaves_by_path(due)
    for path in {**kept, **due}:
        was, now = (kind(tree.get(path, NOTHING)) for tree in (kept, due))
        if was != now:
            raise ValueError(
                f"{stage} got gradients that do not match the parameters of init(): the leaf"
                f"{at(path)} was {was} there, and its gradient is {now}."
            )


NOTHING = "nothing"


def kind(leaf: Any) -> str:
    """What of a leaf must not change."""
    if leaf is None or leaf is NOTHING:
        return str(leaf)
    return (
        f"{'complex' if is_complex(jnp.result_type(leaf)) else 'real'} of shape {jnp.shape(leaf)}"
    )
