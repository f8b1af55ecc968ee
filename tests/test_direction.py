"""The division: its derivative, its zeros, the dtype it emits."""

import functools

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from support import assert_close

import adam_jax

DIRECTIONS = {
    "normalize": adam_jax.normalize(),
    "bias_correct": adam_jax.bias_correct(),
    "bias_correct, eps_hat": adam_jax.bias_correct(eps_hat=True),
    "bias_correct, eps = 0": adam_jax.bias_correct(eps=0),
    "debias, normalize": optax.chain(adam_jax.debias(), adam_jax.normalize()),
    "atan2": adam_jax.atan2(),
    "rectify": adam_jax.rectify(),
    "running_max, bias_correct": optax.chain(adam_jax.running_max(), adam_jax.bias_correct()),
    "cautious, bias_correct": optax.chain(adam_jax.cautious(), adam_jax.bias_correct()),
    "mix, normalize": optax.chain(adam_jax.mix_slow_moment(), adam_jax.normalize()),
    "floor, normalize": optax.chain(adam_jax.floor(eps=1e-8), adam_jax.normalize(eps=0)),
    "nesterov, bias_correct": optax.chain(adam_jax.nesterov(), adam_jax.bias_correct()),
}
each_direction = pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS.keys())


def after(direction, steps, weights):
    """What is left to descend after some steps, as a function of what they start from."""
    tx = optax.chain(adam_jax.scale_by_moments(), direction, adam_jax.scale_by_lr(0.1))
    params, state = weights, tx.init(weights)
    for _ in range(steps):
        grads = jax.grad(lambda p: jnp.sum(weights[0] * p**2))(params)
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
    return jnp.sum(params**2)


def meta_gradients(direction):
    """Through one step and through three, and the second derivative through one.

    The derivative is 1 / eps a step: the second one through three overflows float32.
    """
    one, three = (functools.partial(after, direction, steps) for steps in (1, 3))
    return [
        take(jnp.array([2.0, 0.0])) for take in (jax.grad(one), jax.hessian(one), jax.grad(three))
    ]


@functools.cache
def all_meta_gradients():
    """Compiled as one function."""
    return jax.jit(lambda: {name: meta_gradients(tx) for name, tx in DIRECTIONS.items()})()


@pytest.mark.parametrize("name", DIRECTIONS)
def test_meta_gradient_at_a_zero_gradient_is_finite(name):
    """Through steps whose gradient is 0."""
    chex.assert_tree_all_finite(all_meta_gradients()[name])


def test_the_meta_gradient_of_a_bare_root_is_nan():
    """So that the test above is known to be able to fail."""
    bare = optax.stateless(
        lambda moments, _: moments.mu.value / (jnp.sqrt(moments.nu.debiased().value) + 1e-8)
    )
    first, second, third = jax.jit(lambda: meta_gradients(bare))()
    assert np.isnan(first[1])
    assert np.isnan(second[1, 1])
    assert np.isnan(third[1])


def test_meta_gradient_elsewhere_is_the_exact_one(x64):
    """The safe root has the derivative of the root: against finite differences."""
    tx = adam_jax.adam(0.1)

    def update(grads):
        state = tx.init(grads)
        _, state = tx.update(2 * grads, state)
        return tx.update(grads**2, state)[0]

    jax.test_util.check_grads(jax.jit(update), (jnp.array([0.3, -2.0, 5.0]),), order=2, rtol=1e-6)


@each_direction
def test_zero_gradients_give_zero(direction):
    tx = optax.chain(adam_jax.scale_by_moments(), direction)
    state = tx.init(jnp.zeros(3))
    for _ in range(3):
        update, state = tx.update(jnp.zeros(3), state)
        chex.assert_trees_all_equal(jnp.abs(update), jnp.zeros(3))


@each_direction
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_gradients_are_not_hidden(direction, bad):
    """A NaN or an infinity reaches the update, where apply_if_finite can see it."""
    tx = optax.chain(adam_jax.scale_by_moments(), direction)
    update, _ = tx.update(jnp.array([1.0, bad]), tx.init(jnp.zeros(2)))
    assert jnp.isfinite(update[0])
    assert not jnp.isfinite(update[1])


@each_direction
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64"])
def test_an_update_is_as_wide_as_gradient_and_parameter(direction, dtype, x64):
    """Without the parameters it is as wide as the moments."""
    tx = optax.chain(adam_jax.scale_by_moments(), direction)
    grads = params = jnp.ones(2, dtype)
    state = tx.init(params)
    update, kept = jax.eval_shape(tx.update, grads, state, params)
    assert update.dtype == grads.dtype
    assert jax.eval_shape(tx.update, grads, state)[0].dtype == kept[0].mu.dtype
    wide = params.astype(jnp.complex128 if "complex" in dtype else jnp.float64)
    assert jax.eval_shape(tx.update, grads, tx.init(wide), wide)[0].dtype == wide.dtype


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_epsilons_may_be_arrays(eps):
    grads = jnp.array([1.0, -2.0])
    for stage in (adam_jax.normalize, adam_jax.bias_correct):
        numbers = optax.chain(adam_jax.scale_by_moments(), stage(eps=eps, eps_root=eps))
        arrays = optax.chain(
            adam_jax.scale_by_moments(),
            stage(eps=jnp.float32(eps), eps_root=jnp.float32(eps)),
        )
        chex.assert_trees_all_equal(
            numbers.update(grads, numbers.init(grads))[0],
            arrays.update(grads, arrays.init(grads))[0],
        )


def test_nesterov_after_debias_needs_no_weights(x64):
    """With both weights 1 the look-ahead is b m + (1 - b) g, the simplified NAdam."""
    tx = optax.chain(adam_jax.scale_by_moments(0.5, 0.5), adam_jax.debias(), adam_jax.nesterov())
    moments, _ = tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))
    assert_close(moments.mu.value, np.array([0.5 * 3.0 + 0.5 * 3.0]), "algebra")


def test_nesterov_of_an_injected_rate_takes_it_to_stay(x64):
    grads, rate = jnp.array([3.0]), jnp.float64(0.8)
    constant, injected = (
        optax.chain(adam_jax.scale_by_moments(b1=b1), adam_jax.nesterov()) for b1 in (0.8, rate)
    )
    states = constant.init(grads), injected.init(grads)
    for _ in range(3):
        one, state_one = constant.update(grads, states[0])
        two, state_two = injected.update(grads, states[1])
        states = state_one, state_two
        assert_close(one.mu.value, two.mu.value, "algebra")
