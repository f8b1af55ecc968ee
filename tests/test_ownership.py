"""Which parameter a part of a state belongs to."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from tables import keeping

import adam_jax
from adam_jax._ownership import NONE, owners

EIGHT_BITS = keeping("int8")


def owned(tx, params):
    """The paths of the parts that belong to each parameter, by its number."""
    found = owners(jax.eval_shape(tx.init, params), params)
    parts = {}
    for path, owner in jax.tree_util.tree_leaves_with_path(found):
        parts.setdefault(owner, set()).add(jax.tree_util.keystr(path))
    return parts


def test_moments_counts_and_placeholders():
    params = {"a": jnp.ones(3), "none": None, "b": {"a": jnp.ones((64, 64))}}
    found = owned(adam_jax.adamw(1e-3, **EIGHT_BITS), params)
    assert found[0] == {f"[0].{moment}.whole['a']" for moment in ("mu", "nu")}
    assert found[1] == {
        f"[0].{moment}.{part}['b']['a']" for moment in ("mu", "nu") for part in ("codes", "scales")
    }
    assert {"[0].count", "[0].weights", "[0].mu.codes['a']"} < found[NONE]


class Named(eqx.Module):
    """With the names of fields of a state."""

    count: jax.Array
    weights: jax.Array
    mu: jax.Array


def test_fields_of_a_state_are_no_parameters_of_that_name():
    params = Named(jnp.ones(3), jnp.ones((5, 2)), jnp.ones(4))
    found = owned(adam_jax.adam(1e-3), params)
    assert found[0] == {"[0].mu.count", "[0].nu.count"}
    assert found[1] == {"[0].mu.weights", "[0].nu.weights"}
    assert found[2] == {"[0].mu.mu", "[0].nu.mu"}
    assert {"[0].count", "[0].weights"} < found[NONE]


def test_trees_that_lack_parameters():
    params = {"a": jnp.ones(3), "b": jnp.ones((4, 4))}
    found = owned(optax.masked(adam_jax.adam(1e-3), {"a": False, "b": True}), params)
    assert 0 not in found
    assert found[1] == {f".inner_state[0].{moment}['b']" for moment in ("mu", "nu")}


@pytest.mark.parametrize("shape", [(), (3,), (5, 2), (64, 64)])
@pytest.mark.parametrize("options", [{}, EIGHT_BITS])
def test_one_array(shape, options):
    """Its path is empty, and every path ends in that."""
    tx = optax.chain(
        optax.add_noise(0.1, 0.5, 0),
        optax.inject_hyperparams(lambda learning_rate: adam_jax.adamw(learning_rate, **options))(
            1e-3
        ),
    )
    found = owned(tx, jnp.ones(shape))
    parts = ("",) if not options else (".codes", ".scales") if shape == (64, 64) else (".whole",)
    assert found[0] == {f"[1].inner_state[0].{m}{part}" for m in ("mu", "nu") for part in parts}


def test_boxes_of_flax():
    boxed = {"a": nn.Partitioned(jnp.ones(3), names=(None,)), "b": jnp.ones(2)}
    state = adam_jax.adam(1e-3).init(boxed)
    for params in (boxed, nn.unbox(boxed)):
        found = owners(state, params)
        assert nn.unbox(found[0].mu) == {"a": 0, "b": 1}
    model = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    found = owners(adam_jax.adam(1e-3).init(model), nnx.to_pure_dict(model))
    assert nnx.to_pure_dict(found[0].nu) == {"bias": 0, "kernel": 1}


def test_a_parameter_without_a_gradient_has_a_number():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    found = owners(adam_jax.adam(1e-3).init(params), {"a": None, "b": jnp.ones(2)})
    chex.assert_trees_all_equal(found[0].mu, {"a": 0, "b": 1})
