"""The same numbers as optax, bit for bit, under jit."""

import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import make_step, matrices_only, random_grads, random_params, stack, user_jit

import adam_jax

STEPS = 2000
SCHEDULE = optax.warmup_cosine_decay_schedule(1e-5, 1e-2, 200, STEPS)


def three_stages(learning_rate):
    return optax.chain(
        adam_jax.scale_by_moments(),
        adam_jax.bias_correct(),
        adam_jax.scale_by_lr(learning_rate),
    )


PAIRS = {
    "adam": (adam_jax.adam(1e-3), optax.adam(1e-3)),
    "adam, scheduled": (adam_jax.adam(SCHEDULE), optax.adam(SCHEDULE)),
    "adam, other rates": (
        adam_jax.adam(3e-4, 0.5, 0.97, 1e-6),
        optax.adam(3e-4, 0.5, 0.97, 1e-6),
    ),
    "adam, eps_root": (adam_jax.adam(1e-3, eps_root=1e-9), optax.adam(1e-3, eps_root=1e-9)),
    "adamw": (adam_jax.adamw(1e-3), optax.adamw(1e-3)),
    "adamw, scheduled, masked": (
        adam_jax.adamw(SCHEDULE, weight_decay=0.1, mask=matrices_only),
        optax.adamw(SCHEDULE, weight_decay=0.1, mask=matrices_only),
    ),
    "nadam": (adam_jax.nadam(1e-3), optax.nadam(1e-3)),
    "nadam, scheduled, eps_root": (
        adam_jax.nadam(SCHEDULE, eps_root=1e-9),
        optax.nadam(SCHEDULE, eps_root=1e-9),
    ),
    "nadamw": (adam_jax.nadamw(1e-3), optax.nadamw(1e-3)),
    "nadamw, scheduled, masked": (
        adam_jax.nadamw(SCHEDULE, weight_decay=0.1, mask=matrices_only),
        optax.nadamw(SCHEDULE, weight_decay=0.1, mask=matrices_only),
    ),
}


# The same equations, so what holds of one side of a pair holds of the other.
SAME = {
    "three stages": (three_stages(1e-3), adam_jax.adam(1e-3)),
    "three stages, scheduled": (three_stages(SCHEDULE), adam_jax.adam(SCHEDULE)),
    "nesterov": (adam_jax.adam(1e-3, nesterov=True), adam_jax.nadam(1e-3)),
    "nesterov, scheduled": (
        adam_jax.adam(SCHEDULE, nesterov=True, eps_root=1e-9),
        adam_jax.nadam(SCHEDULE, eps_root=1e-9),
    ),
}


def traced(tx, params):
    with jax.numpy_dtype_promotion("standard"):
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))


@pytest.mark.parametrize("pair", SAME.values(), ids=SAME.keys())
def test_the_same_equations(pair, dtype):
    one, other = (traced(tx, random_params(dtype)) for tx in pair)
    assert one == other


def test_other_equations():
    """So that the test above is known to be able to fail."""
    params = random_params()
    assert traced(three_stages(1e-3), params) != traced(three_stages(2e-3), params)
    assert traced(adam_jax.adam(1e-3), params) != traced(adam_jax.nadam(1e-3), params)


def some_params(dtype="float32", *, without=("bias",)):
    """A matrix of an odd number of elements, a scalar and an empty leaf."""
    return {name: leaf for name, leaf in random_params(dtype).items() if name not in without}


def assert_bitwise_equal_over_training(ours, theirs, params, steps):
    """All updates, parameters and moments, on gradients from 1e-20 to 1e15."""

    @user_jit
    def trajectories(params, grads_sequence):
        def both(carry, grads):
            def one(tx, params, state):
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state, updates

            (ours_now, theirs_now) = carry
            *ours_now, our_updates = one(ours, *ours_now)
            *theirs_now, their_updates = one(theirs, *theirs_now)
            return (ours_now, theirs_now), (our_updates, their_updates)

        start = ([params, ours.init(params)], [params, theirs.init(params)])
        return jax.lax.scan(both, start, grads_sequence)

    rng = np.random.default_rng(1)
    sequence = [random_grads(params, rng, -20, 15) for _ in range(steps)]
    sequence = stack(sequence)
    with jax.numpy_dtype_promotion("standard"):
        (ours_now, theirs_now), (our_updates, their_updates) = trajectories(params, sequence)
    chex.assert_tree_all_finite(our_updates)
    chex.assert_trees_all_equal(our_updates, their_updates)
    chex.assert_trees_all_equal(ours_now[0], theirs_now[0])
    for field in ("mu", "nu"):
        chex.assert_trees_all_equal(
            optax.tree.get(ours_now[1], field), optax.tree.get(theirs_now[1], field)
        )


@pytest.mark.parametrize("name", PAIRS)
def test_bitwise_in_one_scan(name, dtype):
    """nadam without small leaves: there a CPU's compiler contracts its look-ahead as it happens."""
    params = some_params(dtype, without=("bias", "scale") if "nadam" in name else ("bias",))
    assert_bitwise_equal_over_training(*PAIRS[name], params, STEPS)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_bitwise_step_by_step(pair, dtype):
    """The way that a training loop runs: each optimizer compiled alone, one call a step.

    XLA multiplies by the reciprocal of a number that one leaf alone divides by, so one leaf is
    another program than several.
    """
    params = some_params(dtype)
    if not (dtype == "float32" and jax.config.jax_enable_x64):
        params = {"kernel": params["kernel"]}
    steps = [make_step(tx) for tx in pair]
    now = [(params, tx.init(params)) for tx in pair]
    rng = np.random.default_rng(2)
    for _ in range(100):
        grads = random_grads(params, rng, -20, 15)
        (*ours, our_updates), (*theirs, their_updates) = (
            step(*state, grads) for step, state in zip(steps, now, strict=True)
        )
        chex.assert_trees_all_equal((our_updates, ours[0]), (their_updates, theirs[0]))
        now = [ours, theirs]


@pytest.mark.parametrize(
    ("mu_dtype", "b1"), [("bfloat16", 0.875), ("float32", 0.9)], ids=["bfloat16", "float32"]
)
def test_bitwise_with_mu_dtype(mu_dtype, b1):
    """With a rate that bfloat16 holds exactly: optax multiplies mu by the rate in mu's dtype.

    There 0.9 is 0.8984. Here the arithmetic is float32 and the rate stays 0.9: see the next test.
    """
    assert_bitwise_equal_over_training(
        adam_jax.adam(1e-3, b1=b1, mu_dtype=mu_dtype),
        optax.adam(1e-3, b1=b1, mu_dtype=mu_dtype),
        random_params(),
        STEPS,
    )


def test_mu_dtype_keeps_the_rounded_float32_moment():
    """mu_dtype is optax in float32 with mu rounded between the steps, for any rate."""
    params = random_params()
    ours = adam_jax.adam(1e-3, mu_dtype=jnp.bfloat16)
    theirs = optax.adam(1e-3)
    our_step, their_step = make_step(ours), make_step(theirs)
    our_state, their_state = ours.init(params), theirs.init(params)
    rng = np.random.default_rng(3)
    for _ in range(200):
        grads = random_grads(params, rng)
        _, our_state, our_updates = our_step(params, our_state, grads)
        _, their_state, their_updates = their_step(params, their_state, grads)
        chex.assert_trees_all_equal(our_updates, their_updates)
        mu = optax.tree.cast(optax.tree.get(their_state, "mu"), jnp.bfloat16)
        chex.assert_trees_all_equal(optax.tree.get(our_state, "mu"), mu)
        their_state = optax.tree.set(their_state, mu=optax.tree.cast(mu, jnp.float32))


def test_bitwise_in_real_training():
    """A network with its own gradients, where one different bit would grow."""
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(1)])
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)
    y = jnp.sin(x.sum(axis=1, keepdims=True))
    params = model.init(jax.random.key(0), x)
    finals = []
    for tx in (three_stages(SCHEDULE), optax.adam(SCHEDULE)):

        @user_jit
        def train_step(params, state, tx=tx):
            loss = lambda params: jnp.mean((model.apply(params, x) - y) ** 2)  # noqa: E731
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        now, state = params, tx.init(params)
        with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
            for _ in range(STEPS):
                now, state, loss = train_step(now, state)
        finals.append(now)
        assert loss < 1e-2
    chex.assert_trees_all_equal(*finals)


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "nadamw"])
def test_signature_is_that_of_optax(name):
    """Names, order, kinds and defaults of the arguments; ours add their own."""
    ours = inspect.signature(getattr(adam_jax, name)).parameters
    theirs = inspect.signature(getattr(optax, name)).parameters
    described = lambda ps: [(p.name, p.kind, p.default) for p in ps.values()]  # noqa: E731
    assert described(ours)[: len(theirs)] == described(theirs)
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(theirs) :])
    assert ours["learning_rate"].annotation == optax.ScalarOrSchedule
