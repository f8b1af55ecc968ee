"""How much of a chain XLA makes one kernel of."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_jax._tree import traced_once


def recompute(stage: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A stage that computes what it emits apart from what it keeps; the numbers stay the same.

    A parameter then does not wait for its moments to be written, and XLA's CPU backend, if told to
    with ``XLA_FLAGS=--xla_backend_extra_options=xla_cpu_use_multi_output_fusion``, makes one kernel
    of a leaf, which moves 28 bytes a parameter instead of 40. Without that flag the CPU backend
    copies the old moments first and is three times slower.

    Args:
      stage: a transformation whose state has a `count`, such as `scale_by_moments`.

    Returns:
      The stage with the same state. What it emits differs in the last digit at most, because XLA
      contracts multiply and add in other places.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> tx = optax.chain(
      ...     adam_jax.recompute(adam_jax.scale_by_moments()),
      ...     adam_jax.bias_correct(),
      ...     adam_jax.scale_by_lr(1e-3),
      ... )
      >>> params = jnp.ones(2)
      >>> updates, state = tx.update(jnp.array([0.5, -3.0]), tx.init(params), params)
      >>> print(updates)
      [-0.001  0.001]

    Source: none; see `examples/benchmarks/README.md` for what it brings.
    """
    inner: Any = optax.with_extra_args_support(stage)
    # XLA would merge what is computed twice if it knew that no count is negative.
    again = traced_once(lambda x, count: jnp.where(count >= 0, x, jnp.zeros_like(x)))

    def update_fn(updates, state, params=None, **extra_args):
        _, kept = inner.update(updates, state, params, **extra_args)
        inputs = jax.tree.map(lambda x: again(x, state.count), (updates, state))
        emitted, _ = inner.update(*inputs, params, **extra_args)
        return emitted, kept

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
