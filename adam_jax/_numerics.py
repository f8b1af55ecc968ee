"""Dtypes to compute in, the step count, and a division and a root that are safe at 0."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

Scalar: TypeAlias = jax.Array | float
Rate: TypeAlias = Scalar | Callable[[jax.Array], Any]  # or a schedule from the steps taken so far

SMALL = 4096  # elements: a leaf with fewer saves nothing worth rounding it, or a kernel of its own


def as_count(count: Any) -> jax.Array:
    """An integer, also where a state was cast to floats, or its count set to a Python number."""
    is_integer = hasattr(count, "dtype") and jnp.issubdtype(count.dtype, jnp.integer)
    return jnp.asarray(count, None if is_integer else jnp.int32)


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


# --- Division -------------------------------------------------------------------------------------


def quotient(
    mu: jax.Array, nu: jax.Array, eps: jax.typing.ArrayLike, eps_root: jax.typing.ArrayLike
) -> jax.Array:
    """The first moment over the root of the second, and 0 where that is 0.

    A number known to be 0 is not added, and a divisor known not to be 0 is not guarded: XLA would
    find that out for every leaf, which a model of many leaves spends a fifth of its compilation on.
    Without epsilons the guard is under the root, because XLA makes one operation of m / √v.
    """
    zero = isinstance(eps, float) and eps == 0
    zero_root = isinstance(eps_root, float) and eps_root == 0
    if not zero_root:
        nu = nu + scalar(eps_root, nu.dtype)
    elif zero:
        nu = jax.lax.select(nu == 0, jax.lax.full_like(nu, jnp.inf), nu)
    root = sqrt(nu)
    if not zero:
        root = root + scalar(eps, nu.dtype)
    tiny = jnp.finfo(nu.dtype).tiny
    known = (isinstance(eps, float) and eps >= tiny) or (
        isinstance(eps_root, float) and eps_root >= tiny
    )
    divide = jax.lax.div if known or (zero and zero_root) else safe_divide
    return divide(mu, root.astype(mu.dtype))


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """The root, with derivative 0 at 0: infinity there would turn every meta-gradient to NaN."""
    return jax.lax.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    root = sqrt(primals[0])
    return root, safe_divide(tangents[0], 2 * root)


def safe_divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """The quotient, and 0 where the divisor is 0.

    One select on the divisor: it stops the derivative too, and leaves XLA the division to simplify
    as it does for optax (a select on the quotient would cost the bitwise equality).
    """
    return x / jax.lax.select(y == 0, jax.lax.full_like(y, jnp.inf), y)
