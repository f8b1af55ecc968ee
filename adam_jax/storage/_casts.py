"""Storages in another dtype: rounded to nearest, or up or down at random."""

from typing import Any

import jax.numpy as jnp

from adam_jax._checks import check_dtype, check_integer
from adam_jax._random import rounded_at_random
from adam_jax.storage._protocol import Storage, in_dtype, only_first


def cast(dtype: Any) -> Storage:
    r"""Keep a moment in another dtype, rounded to nearest, in small leaves too.

    A dtype given as `mu_storage` or `nu_storage` means the same, and so does `mu_dtype`. A second
    moment in bfloat16 stalls: with :math:`b_2 = 0.999` a step changes it by less than half the
    distance to the next number, which rounds to no change. With `stochastic` it does not stall.

    Args:
      dtype: a floating-point dtype; for the first moment of complex parameters a complex dtype. A
        dtype with less range than bfloat16 is for first moments only.

    Returns:
      A `Storage`.

    Raises:
      ValueError: if `dtype` is neither a floating-point nor a complex dtype.
      TypeError: in `init`, if a moment is complex and the dtype is not, or the reverse.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> tx = adam_jax.adam(1e-3, mu_storage=adam_jax.storage.cast(jnp.bfloat16))
      >>> state = tx.init(jnp.zeros((64, 64)))
      >>> print(state[0].mu.dtype, state[0].nu.dtype)
      bfloat16 float32

    Source: Micikevicius et al., "Mixed Precision Training" (arXiv 1710.03740), section 3.
    """
    return in_dtype(check_dtype("dtype", dtype, jnp.inexact))


def stochastic(dtype: Any = jnp.bfloat16, seed: int = 0) -> Storage:
    r"""Keep a moment in another dtype, rounded up or down at random, so that it is unbiased.

    .. math:: E[\operatorname{load}(\operatorname{save}(x))] = x

    Args:
      dtype: a real floating-point dtype of fewer than 32 bits. A dtype with less range than
        bfloat16 is for first moments only. Default bfloat16.
      seed: an integer, the seed of the random bits. Default 0.

    Returns:
      A `Storage`.

    Raises:
      ValueError: if `dtype` is not a floating-point dtype of fewer than 32 bits.
      TypeError: if `seed` is not an integer.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> tx = adam_jax.adam(1e-3, nu_storage=adam_jax.storage.stochastic())
      >>> state = tx.init(jnp.zeros((64, 64)))
      >>> _, state = tx.update(jnp.ones((64, 64)), state)
      >>> print(jnp.unique(state[0].nu).astype(float), state[0].nu.astype(float).mean())
      [0.000999451 0.00100708] 0.00100

    Source: Ozkara, Yu and Park, "Stochastic Rounding for LLM Training" (arXiv 2502.20566).
    """
    dtype = check_dtype("dtype", dtype)
    if jnp.finfo(dtype).bits >= 32:
        raise ValueError(f"dtype must have fewer than 32 bits, got {dtype}: use cast.")
    seed = check_integer("seed", seed)

    def save(moment, leaf):
        moment = moment.astype(jnp.float32)
        return rounded_at_random(moment, dtype, leaf.random_bits(seed, moment))

    return Storage(save, lambda stored, leaf: stored.astype(jnp.float32), only=only_first(dtype))
