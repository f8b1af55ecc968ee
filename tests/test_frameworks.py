"""In the frameworks that people train with: Flax NNX, Flax Linen, Equinox, Orbax."""

from typing import NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import adam_jax
from adam_jax import storage

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 3)).astype(np.float32)
Y = np.sin(X.sum(axis=1, keepdims=True))

libraries = pytest.mark.parametrize("name", ["adam", "adamw", "nadam"])


def train_nnx(tx, steps=60):
    model = nnx.Sequential(
        nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 1, rngs=nnx.Rngs(1))
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def train_linen(tx, steps=60):
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)])
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), X), tx=tx)

    @jax.jit
    def step(state):
        loss = lambda params: jnp.mean((state.apply_fn(params, X) - Y) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(steps):
        state, loss = step(state)
        losses.append(float(loss))
    return losses, state.params


def train_equinox(tx, steps=60):
    model = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        loss = lambda model: jnp.mean((jax.vmap(model)(X) - Y) ** 2)  # noqa: E731
        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for _ in range(steps):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    return losses, jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


@libraries
@pytest.mark.parametrize("train", [train_nnx, train_linen, train_equinox])
def test_training_equals_optax(train, name):
    """Losses that fall, and bit for bit those of optax."""
    with jax.numpy_dtype_promotion("standard"):
        ours, our_params = train(getattr(adam_jax, name)(1e-2))
        theirs, their_params = train(getattr(optax, name)(1e-2))
    assert ours == theirs
    assert ours[-1] < ours[0] / 2
    chex.assert_trees_all_equal(our_params, their_params)


def test_nnx_with_strict_promotion():
    losses, _ = train_nnx(adam_jax.adamw(1e-2))
    assert losses[-1] < losses[0] / 2


def test_checkpoint_round_trip(tmp_path):
    """Training goes on after a restart as if there had been none; a schedule may take over."""
    params = {"w": jnp.arange(3.0), "b": jnp.ones(())}
    tx = adam_jax.adamw(1e-2, b2=jnp.float32(0.99))
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        scheduled = adam_jax.adamw(optax.constant_schedule(1e-2), b2=jnp.float32(0.99))
        restored = checkpointer.restore(tmp_path / "state", scheduled.init(params))
    chex.assert_trees_all_equal(restored, state)
    assert restored[-1].step == 1
    chex.assert_trees_all_equal(
        scheduled.update(params, restored, params), tx.update(params, state, params)
    )


def test_an_unfiltered_equinox_module_is_refused_by_name():
    """Its functions are leaves too, and the message says how to leave them out."""
    model = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"the parameter at \.activation is .*equinox\.filter\("):
        adam_jax.adam(1e-2).init(model)
    adam_jax.adam(1e-2).init(eqx.filter(model, eqx.is_inexact_array))


@pytest.mark.parametrize("how", [None, "bfloat16", storage.int8()])
def test_parameters_with_a_last_field_named_whole(how):
    """They are not taken for the parts of a storage, whose last one has that name."""

    class Weights(NamedTuple):
        kernel: jax.Array
        whole: jax.Array

    params = Weights(jnp.ones((64, 64)), jnp.ones(3))
    tx = adam_jax.adam(1e-2, mu_storage=how)
    updates, _ = tx.update(params, tx.init(params), params)
    assert isinstance(updates, Weights)
