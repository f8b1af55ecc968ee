"""States that are kept, brought back and taken over: training goes on as if nothing had been."""

import functools
import inspect
import io
import pickle

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from tables import MEMBERS, keeping

import adam_jax

RNG = np.random.default_rng(0)
START = {"kernel": RNG.normal(size=(64, 64)), "bias": RNG.normal(size=3)}


def gradients(steps):
    return {name: RNG.normal(size=(steps, *x.shape)).astype("float32") for name, x in START.items()}


# --- Round trips ----------------------------------------------------------------------------------

STORAGES = {
    "whole": keeping(),
    "cast": keeping("bfloat16"),
    "stochastic": keeping("stochastic"),
    "int8": keeping("int8"),
    "int4": keeping("int4"),
    "factored": keeping("int8", "factored"),
    "block_mean": keeping("int4", "block_mean"),
}
ROUNDINGS = {
    "float32": None,
    "round_stochastically": adam_jax.round_stochastically(),
    "compensate": adam_jax.compensate(),
    "compensate int8": adam_jax.compensate("int8"),
}
WRAPPERS = {
    "MultiSteps": lambda factory: optax.MultiSteps(factory(1e-2), 2).gradient_transformation(),
    "inject_hyperparams": lambda factory: optax.inject_hyperparams(
        lambda learning_rate: factory(learning_rate), hyperparam_dtype=jnp.float32
    )(1e-2),
    "bare": lambda factory: factory(1e-2),
    "partition": lambda factory: optax.partition(
        {"slow": factory(1e-3), "fast": factory(1e-2)}, {"kernel": "slow", "bias": "fast"}
    ),
    "schedule_free": lambda factory: optax.contrib.schedule_free(factory(1e-2), 1e-2),
}


def optimizer(member, how, rounding, wrapper):
    """And the dtype of its parameters."""
    taken = inspect.signature(member).parameters
    options = {option: value for option, value in STORAGES[how].items() if option in taken}
    last = ROUNDINGS[rounding]

    def rounded(learning_rate):
        tx = member(learning_rate, **options)
        return tx if last is None else optax.chain(tx, last)

    return WRAPPERS[wrapper](rounded), "float32" if last is None else "bfloat16"


def turn(table, i):
    """The i-th name of a table that starts again at its end."""
    return list(table)[i % len(table)]


# Every member with the storage, the rounding and the wrapper whose turn it is: the three tables
# have 7, 4 and 5 rows, so that different ones meet.
CHOICES = {
    name: (turn(STORAGES, i), turn(ROUNDINGS, i), turn(WRAPPERS, i))
    for i, name in enumerate(MEMBERS)
}
CASES = {
    ", ".join([name, *choice]): optimizer(MEMBERS[name], *choice)
    for name, choice in CHOICES.items()
}


def random_bits(leaf):
    """Any array of this kind, without NaN."""
    if leaf.dtype == bool:
        return jnp.asarray(RNG.integers(0, 2, leaf.shape) == 1)
    bits = RNG.integers(0, 256, (*leaf.shape, leaf.dtype.itemsize), "uint8")
    array = bits.view(leaf.dtype).reshape(leaf.shape)
    with np.errstate(invalid="ignore"):
        return jnp.asarray(np.where(np.isfinite(array), array, np.zeros_like(array)))


@functools.cache
def any_state():
    """Parameters and state of every case, filled with random bits."""
    shapes = {}
    for name, (tx, dtype) in CASES.items():
        params = {leaf: jax.ShapeDtypeStruct(x.shape, dtype) for leaf, x in START.items()}
        shapes[name] = params, jax.eval_shape(tx.init, params)
    return jax.tree.map(random_bits, shapes)


def by_orbax(now, like, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", now)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", like)


def by_flax(now, like, path):
    return serialization.from_bytes(jax.tree.map(jnp.zeros_like, now), serialization.to_bytes(now))


def by_pickle(now, like, path):
    return pickle.loads(pickle.dumps(now))


def by_equinox(now, like, path):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, now)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, like)


@pytest.mark.parametrize("trip", [by_orbax, by_flax, by_pickle, by_equinox])
def test_round_trips(trip, tmp_path):
    """What comes back is the same, bit for bit, in the same containers."""
    now = any_state()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), now)
    restored = trip(now, like, tmp_path)
    chex.assert_trees_all_equal_structs(restored, now)
    chex.assert_trees_all_equal(restored, now, strict=True)


# Between them every rounding, every wrapper, and every storage but a plain dtype.
GOING_ON = {
    name: case
    for name, case in CASES.items()
    if name.startswith(("adamw,", "adam_atan2,", "laprop,", "adopt,", "ademamix,", "lion,"))
}


@jax.jit
def ten_steps(now, grads):
    def step(now, grads):
        new = {}
        for name, (tx, _) in GOING_ON.items():
            params, state = now[name]
            of = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
            updates, state = tx.update(of, state, params)
            new[name] = optax.apply_updates(params, updates), state
        return new, None

    with jax.numpy_dtype_promotion("standard"):  # of the wrappers
        return jax.lax.scan(step, now, grads)[0]


def test_ten_more_steps(tmp_path):
    """After a round trip they are those without it; the other kinds bring back the same."""
    start = {}
    for name, (tx, dtype) in GOING_ON.items():
        params = {leaf: jnp.asarray(x, dtype) for leaf, x in START.items()}
        start[name] = params, tx.init(params)
    steps = ten_steps.lower(start, gradients(10)).compile()
    now = steps(start, gradients(10))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), now)
    restored, more = by_orbax(now, like, tmp_path), gradients(10)
    later = steps(now, more)
    chex.assert_trees_all_equal(steps(restored, more), later, strict=True)
    assert all(jnp.any(later[name][0]["kernel"] != now[name][0]["kernel"]) for name in now)


def test_a_schedule_and_back():
    """A constant rate, a schedule and a constant again: one state all along, the same numbers."""
    constant, scheduled = map(adam_jax.adamw, (1e-2, optax.constant_schedule(1e-2)))
    params = {"kernel": jnp.asarray(START["kernel"], "float32")}
    step = jax.jit(lambda tx, *args: tx.update(*args), static_argnums=0)
    plain = changing = constant.init(params)
    for tx in (constant, scheduled, constant):
        expected, plain = step(constant, params, plain, params)
        updates, changing = step(tx, params, changing, params)
        chex.assert_trees_all_equal((updates, changing), (expected, plain), strict=True)
