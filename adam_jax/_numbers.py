"""Hyperparameters and dtypes: what is checked when a stage is built, and what is computed in."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

Scalar = jax.Array | float


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
    if isinstance(value, jax.Array | np.ndarray):
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


def check_count(name: str, value: Any, multiple_of: int = 1) -> int:
    """A positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < 1 or value % multiple_of:
        even = " and even" if multiple_of == 2 else ""
        raise ValueError(f"{name} must be positive{even}, got {value}.")
    return int(value)


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


def increment(count: Any, *, draws: bool = False) -> Any:
    """One more step, up to the largest int32.

    A count that random bits are drawn with goes on from the half of it: no weight can tell, and
    with the same bits at every step the same elements are rounded up for ever.
    """
    if not draws:
        return optax.safe_increment(count)
    largest = jnp.iinfo(count.dtype).max
    return jnp.where(count == largest, largest // 2 + 1, count + 1)


def accumulator(dtype: Any) -> Any:
    """The dtype to compute in: at least float32; float64 and complex keep theirs."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def wider(dtype: Any, other: Any) -> Any:
    """The more precise of two dtypes, the first if they are equally precise."""
    return other if jnp.finfo(other).bits > jnp.finfo(dtype).bits else dtype


def real(dtype: Any) -> Any:
    """The dtype of the absolute value."""
    return jnp.finfo(dtype).dtype


def is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def scalar(value: Any, dtype: Any) -> Any:
    """A hyperparameter for arithmetic in `dtype`.

    A Python number stays one, because it takes the dtype it meets, and arithmetic on numbers and on
    float32 scalars differs in the last digit.
    """
    return value if isinstance(value, int | float) else jnp.asarray(value).astype(dtype)
