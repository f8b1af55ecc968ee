"""scale_by_lr: constants, arrays and schedules."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import adam_jax


def test_schedule_starts_at_zero_and_counts():
    stage = adam_jax.scale_by_lr(lambda count: 1.0 + count.astype(float))
    state = stage.init(jnp.ones(2))
    for rate in (1.0, 2.0, 3.0):
        update, state = stage.update(jnp.ones(2), state)
        chex.assert_trees_all_equal(update, jnp.full(2, -rate))
    assert state.step == 3


def test_state_is_the_same_for_constant_and_schedule():
    """So that a checkpoint made with a constant rate can go on with a schedule."""
    params = jnp.ones(2)
    states = [
        adam_jax.adam(rate).init(params)
        for rate in (1e-3, jnp.float32(1e-3), optax.constant_schedule(1e-3))
    ]
    for other in states[1:]:
        chex.assert_trees_all_equal_shapes_and_dtypes(states[0], other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("kind", ["number", "array", "schedule"])
def test_dtype_is_kept(dtype, kind, x64):
    rate = {"number": 0.1, "array": jnp.float32(0.1), "schedule": lambda count: jnp.float32(0.1)}
    stage = adam_jax.scale_by_lr(rate[kind])
    update, _ = stage.update(jnp.ones(2, dtype), stage.init(jnp.ones(2, dtype)))
    assert update.dtype == dtype


def test_the_product_is_rounded_once():
    """In bfloat16 itself the rate 1e-3 would be 0.99945e-3."""
    stage = adam_jax.scale_by_lr(1e-3)
    numbers = jnp.arange(128, 256).astype(jnp.bfloat16)
    update, _ = stage.update(numbers, stage.init(numbers))
    exact = -1e-3 * numbers.astype(jnp.float32)
    chex.assert_trees_all_equal(update, exact.astype(jnp.bfloat16))
    assert jnp.any(-jnp.asarray(1e-3, jnp.bfloat16) * numbers != update)


def test_works_alone_as_gradient_descent():
    stage = adam_jax.scale_by_lr(0.5)
    params = jnp.array([4.0])
    update, _ = stage.update(jax.grad(lambda x: jnp.sum(x**2) / 2)(params), stage.init(params))
    chex.assert_trees_all_equal(optax.apply_updates(params, update), jnp.array([2.0]))
