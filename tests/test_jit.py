"""What is traced and compiled once: a leaf for all of its kind, an optimizer whatever its rate."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equinox.internal import closure_to_pytree
from support import assert_close
from tables import keeping

import adam_jax
from adam_jax._jit import once

# --- Tracing a leaf once --------------------------------------------------------------------------


def test_traced_once_remembers_the_numbers_of_every_shape():
    """What is a Python number in the result belongs to the shape it came from."""
    ranks = functools.partial(once, lambda x: (x, float(x.ndim)))

    @jax.jit
    def traced(*arrays):
        results = [ranks(x) for x in arrays]
        assert [rank for _, rank in results] == [1.0, 2.0, 1.0]
        assert all(type(rank) is float for _, rank in results)
        return [x for x, _ in results]

    arrays = jnp.ones(2), jnp.ones((2, 2)), jnp.zeros(2)
    for array, result in zip(arrays, traced(*arrays), strict=True):
        np.testing.assert_array_equal(array, result)


def test_leaves_of_one_kind_are_traced_once():
    kinds = []

    def rule(grad, mu, nu, decay):
        kinds.append((grad.shape, str(grad.dtype), decay))
        return adam_jax.squared(grad, mu, nu, decay)

    tx = adam_jax.scale_by_moments(second_moment=rule)
    tree = [jnp.ones(2)] * 5 + [jnp.ones(3)] * 5 + [jnp.ones(2, jnp.complex64)] * 5
    jax.jit(tx.update)(tree, tx.init(tree))
    due = [((2,), "complex64"), ((2,), "float32"), ((3,), "float32")]
    assert sorted(kinds) == [(*kind, 0.999) for kind in due]
    assert all(isinstance(decay, float) for *_, decay in kinds)


def test_what_is_traced_once_returns_numbers_as_numbers():
    def halved(pair, number):
        return {"pair": pair, "half": number / 2, "none": None}

    def twice(x):
        first, second = once(halved, (x, x), 3.0), once(halved, (x + 1, x), 5.0)
        assert (first["half"], second["half"]) == (1.5, 2.5)
        assert first["none"] is None
        return first["pair"], second["pair"]

    chex.assert_trees_all_equal(jax.jit(twice)(jnp.float32(1)), ((1.0, 1.0), (2.0, 1.0)))
    assert once(halved, 1, 3.0) == {"pair": 1, "half": 1.5, "none": None}


# --- Compiling an optimizer once ------------------------------------------------------------------

PARAMS = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(3)}
OPTIMIZERS = {
    "adam": adam_jax.adam,
    "adamw": adam_jax.adamw,
    "lion": adam_jax.lion,
    "nadam": adam_jax.nadam,
    "adabelief": adam_jax.adabelief,
    "rmsprop": functools.partial(adam_jax.rmsprop, momentum=0.9),
    "int8": functools.partial(adam_jax.adamw, **keeping("int8")),
    "compensate": lambda rate: optax.chain(adam_jax.adamw(rate), adam_jax.compensate("int8")),
    "fuse": lambda rate: adam_jax.fuse(adam_jax.adam(rate)),
    "lazy": lambda rate: adam_jax.lazy(adam_jax.adam(rate)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_two_rates_are_compiled_once(name):
    """As Optimistix's `test_optax_recompilation`: the closures hold functions, numbers, arrays."""
    traced = 0

    @eqx.filter_jit
    def first_step(tx):
        nonlocal traced
        traced += 1
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]

    rates = jnp.array(1e-3), jnp.array(2e-3)
    one, two = (first_step(closure_to_pytree(OPTIMIZERS[name](rate))) for rate in rates)
    assert traced == 1
    assert_close(two, jax.tree.map(lambda update: 2 * update, one), "contracted")


def test_equinox_compiles_an_update():
    tx = adam_jax.adamw(jnp.array(1e-3))
    state = tx.init(PARAMS)
    compiled = eqx.filter_jit(tx.update)(PARAMS, state, PARAMS)
    chex.assert_trees_all_equal(compiled, jax.jit(tx.update)(PARAMS, state, PARAMS))
