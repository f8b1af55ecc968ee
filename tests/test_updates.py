"""Stages from updates to updates: the learning rate, weight decay, momentum, the trust ratio."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from support import random_grads, random_params, refused

import adam_jax


def test_schedule_starts_at_zero_and_counts():
    stage = adam_jax.scale_by_lr(lambda count: 1.0 + count.astype(float))
    state = stage.init(jnp.ones(2))
    for rate in (1.0, 2.0, 3.0):
        update, state = stage.update(jnp.ones(2), state)
        chex.assert_trees_all_equal(update, jnp.full(2, -rate))
    assert state.count == 3


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


# --- What holds of all ----------------------------------------------------------------------------

STAGES = tables.stages("updates", "updates") | {
    "decay_weights of an array": adam_jax.decay_weights(jnp.float32(0.1))
}
each_stage = pytest.mark.parametrize("name", STAGES)
DTYPES = ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"]


def shapes(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in STAGES
        for dtype in DTYPES
        if name != "clip_by_schedule" or "complex" not in dtype  # which it refuses
    ],
)
def test_updates_and_states_keep_their_dtypes(name, dtype, x64):
    params = random_params("float64")
    params = jax.tree.map(lambda p: p.astype(dtype), params) | {"none": None}
    stage = STAGES[name]
    state = stage.init(params)
    updates, new = jax.jit(stage.update)(params, state, params)
    assert shapes(updates) == shapes(params)
    assert shapes(new) == shapes(state)
    for leaf in jax.tree.leaves(new):
        assert jnp.issubdtype(leaf.dtype, jnp.integer) or jnp.finfo(leaf.dtype).bits >= 32


@each_stage
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_result_is_that_of_float32_rounded_once(name, dtype):
    params, rng, stage = random_params(dtype), np.random.default_rng(0), STAGES[name]
    wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    state = stage.init(params)
    exact_state = stage.init(wide(params))
    for _ in range(3):
        grads = jax.tree.map(jnp.asarray, random_grads(params, rng, -1, 1))
        updates, state = stage.update(grads, state, params)
        exact, exact_state = stage.update(wide(grads), exact_state, wide(params))
        chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: x.astype(dtype), exact))
        chex.assert_trees_all_equal(state, exact_state)


@each_stage
def test_a_missing_update_and_what_is_no_parameter(name):
    """As when an Equinox model that is not filtered is passed as the parameters."""
    w, stage = {"w": jnp.ones(2), "scale": None, "function": None}, STAGES[name]
    model = w | {"scale": 2.0, "function": jnp.tanh}
    updates, _ = stage.update(w, stage.init(w), model)
    expected, _ = stage.update({"w": w["w"]}, stage.init({"w": w["w"]}), {"w": w["w"]})
    assert updates["scale"] is None
    assert updates["function"] is None
    chex.assert_trees_all_equal(updates["w"], expected["w"])


@pytest.mark.parametrize(
    "name", [s for s in STAGES if s != "clip_by_schedule"]
)  # which sees no parameters
@pytest.mark.parametrize("wrong", [jnp.ones(1), jnp.ones((1, 3)), jnp.ones(3, "complex64")])
def test_an_update_that_does_not_match_its_parameter(name, wrong):
    """It would be broadcast, by the stage or by optax.apply_updates."""
    params, stage = {"v": None, "w": jnp.ones(3)}, STAGES[name]
    with refused(ValueError, f"{name.split()[0]} gradients 'w'"):
        stage.update(params | {"w": wrong}, stage.init(params), params | {"v": 1.0})


@pytest.mark.parametrize("name", ["decay_weights", "scale_by_trust_ratio"])
def test_the_parameters_are_needed(name):
    params, stage = {"w": jnp.ones(3)}, STAGES[name]
    with refused(ValueError, f"{name} params update()"):
        stage.update(params, stage.init(params))
    with refused(ValueError, f"{name} gradients ['b']"):
        stage.update(params, stage.init(params), params | {"b": jnp.ones(1)})
    with refused(ValueError, f"{name} gradients ['w']"):
        stage.update(params, stage.init(params), {"w": None})


@each_stage
@pytest.mark.parametrize("tree", ["a leaf", "a tree"])
def test_moments_are_no_updates(name, tree):
    params = jnp.ones(3) if tree == "a leaf" else {"w": jnp.ones(3)}
    wrong = optax.chain(adam_jax.scale_by_moments(), STAGES[name])
    with refused(TypeError, f"{name.split()[0]} Moments adam_jax.bias_correct"):
        wrong.update(params, wrong.init(params), params)


def test_masked_parameters():
    """Parameters that optax.masked takes away are as little there as None."""
    params = {"w": jnp.full((2, 2), 2.0), "b": jnp.ones(2)}
    for name in ("decay_weights", "accumulate", "scale_by_trust_ratio"):
        tx = optax.masked(STAGES[name], {"w": True, "b": False})
        updates, _ = tx.update(params, tx.init(params), params)
        expected, _ = STAGES[name].update(params, STAGES[name].init(params), params)
        chex.assert_trees_all_equal(updates, expected | {"b": params["b"]})


# --- Weight decay ---------------------------------------------------------------------------------

PARAMS = {"a": {"w": jnp.full((2, 3), 2.0), "b": jnp.ones(3)}, "s": jnp.float32(3.0)}
GRADS = jax.tree.map(lambda p: jnp.full_like(p, -0.0), PARAMS)


def decayed(mask=None, rate=0.5, params=PARAMS):
    stage = adam_jax.decay_weights(rate, mask=mask)
    state = stage.init(params)
    assert state == optax.EmptyState()  # a schedule counts
    return stage.update(GRADS, state, params)[0]


def test_a_decay_of_0_is_the_identity():
    """Bit for bit: -0 stays -0, and an infinite parameter does not make NaN of 0 times itself."""
    infinite = jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), PARAMS)
    for updates in (decayed(rate=0), decayed(rate=0.0, params=infinite), decayed(False)):
        assert all(np.all(np.signbit(leaf)) for leaf in jax.tree.leaves(updates))


def test_the_decay_of_an_array_that_is_0_adds_0():
    chex.assert_trees_all_equal(decayed(rate=jnp.float32(0)), GRADS)


@pytest.mark.parametrize(
    "mask",
    [
        {"a": {"w": True, "b": False}, "s": False},
        {"a": {"w": np.True_, "b": np.False_}, "s": False},
        lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
        functools.partial(lambda n, params: jax.tree.map(lambda p: p.ndim == n, params), 2),
        jax.tree_util.Partial(lambda params: jax.tree.map(lambda p: p.ndim == 2, params)),
    ],
    ids=["tree", "numpy", "function", "functools.partial", "jax.tree_util.Partial"],
)
def test_what_the_mask_leaves_out_passes_bit_for_bit(mask):
    updates = decayed(mask)
    np.testing.assert_array_equal(updates["a"]["w"], 1.0)
    for leaf in (updates["a"]["b"], updates["s"]):
        assert np.all((leaf == 0) & np.signbit(leaf))


def test_a_prefix_is_a_mask():
    chex.assert_trees_all_equal(
        decayed({"a": True, "s": False}), decayed(lambda p: {"a": True, "s": False})
    )
    chex.assert_trees_all_equal(decayed(True), decayed())
    updates = decayed({"a": True, "s": False})
    assert np.all(updates["a"]["b"] == 0.5)
    assert updates["s"] == 0


def test_the_mask_is_of_the_parameters_that_have_an_update():
    def mask(params):
        assert params["scale"] is None
        return jax.tree.map(lambda p: p.ndim > 1, params)

    w = {"w": jnp.ones((2, 3)), "scale": None}
    stage = adam_jax.decay_weights(0.5, mask=mask)
    updates, _ = stage.update(w, stage.init(w), w | {"scale": 2.0})
    np.testing.assert_array_equal(updates["w"], 1.5)


@pytest.mark.parametrize(
    "mask", ["w", 1, 0.5, jnp.ones(2, bool), {"a": "w"}, {"a": True, "s": 1}], ids=repr
)
def test_a_mask_is_made_of_booleans(mask):
    with refused(TypeError, "mask booleans function"):
        adam_jax.decay_weights(0.1, mask=mask)
    with refused(TypeError, "mask booleans function"):
        decayed(lambda params: mask)


def test_a_mask_returns_no_function():
    with refused(TypeError, "mask return booleans"):
        decayed(lambda params: abs)


@pytest.mark.parametrize(
    "mask", [{"a": True}, {"a": {"w": True}, "s": True}, {"a": True, "s": (True,)}]
)
def test_a_mask_of_another_tree(mask):
    with refused(ValueError, "mask parameters prefix"):
        decayed(mask)


@pytest.mark.parametrize(
    ("rate", "error"),
    [(-0.1, ValueError), (jnp.inf, ValueError), (jnp.ones(2), ValueError), ("w", TypeError),
     (None, TypeError), (True, TypeError), (jnp.bfloat16(0.1), ValueError)],
    ids=repr,
)  # fmt: skip
def test_a_decay_out_of_its_range(rate, error):
    with refused(error, "rate"):
        adam_jax.decay_weights(rate)


def test_a_decay_schedule_counts():
    stage = adam_jax.decay_weights(lambda count: jnp.asarray([0.5, 0.25])[count])
    state = stage.init(PARAMS)
    for expected in (1.5, 0.75):
        updates, state = stage.update(GRADS, state, PARAMS)
        assert updates["s"] == expected


def test_float64_parameters_decay_in_float64(x64):
    """Updates in float32 are then rounded once, and not the parameter before."""
    stage, param = adam_jax.decay_weights(1.0), jnp.asarray(1 + 2.0**-30)
    update, _ = stage.update(jnp.float32(-1), stage.init(param), param)
    assert update.dtype == jnp.float32
    assert update == 2.0**-30


# --- Momentum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_sum_is_that_of_optax(nesterov, dtype):
    ours, theirs = (tx(0.9, nesterov=nesterov) for tx in (adam_jax.accumulate, optax.trace))
    params, rng = random_params(dtype), np.random.default_rng(0)
    state, their_state = ours.init(params), theirs.init(params)
    assert jax.tree.structure(state.trace) == jax.tree.structure(their_state.trace)
    step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
    for _ in range(20):
        grads = random_grads(params, rng)
        updates, state = step(grads, state)
        expected, their_state = their_step(grads, their_state)
        chex.assert_trees_all_equal(updates, expected)
        chex.assert_trees_all_equal(optax.tree.get(state, "trace"), their_state.trace)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_sum_that_forgets_all_is_the_identity(nesterov):
    params, rng = random_params(), np.random.default_rng(0)
    stage = adam_jax.accumulate(0.0, nesterov=nesterov)
    state = stage.init(params)
    for _ in range(3):
        grads = random_grads(params, rng)
        updates, state = stage.update(grads, state)
        chex.assert_trees_all_equal(updates, grads)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_sum_is_kept_in_the_dtype_that_is_asked_for(dtype):
    stage = adam_jax.accumulate(0.9, dtype=dtype)
    state = stage.init(random_params("bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(dtype)}
    _, new = stage.update(random_params("bfloat16"), state)
    assert shapes(new) == shapes(state)


def test_errors_of_accumulate():
    for decay in (1.0, -0.1, jnp.ones(2)):
        with refused(ValueError, "decay"):
            adam_jax.accumulate(decay)
    for decay in (None, "0.9", lambda count: 0.9):
        with refused(TypeError, "decay number 0-d"):
            adam_jax.accumulate(decay)
    with refused(TypeError, "nesterov True False 1"):
        adam_jax.accumulate(0.9, nesterov=1)
    with refused(ValueError, "dtype floating-point complex"):
        adam_jax.accumulate(0.9, dtype="int8")
    with refused(TypeError, "mu 'w' complex64 float32"):
        adam_jax.accumulate(0.9, dtype="float32").init({"w": jnp.ones(2, "complex64")})
    with refused(TypeError, "accumulate ['w'] int32"):
        adam_jax.accumulate(0.9).init({"w": jnp.ones(2, "int32")})
    stage = adam_jax.accumulate(0.9)
    with refused(ValueError, "accumulate gradients ['b']"):
        stage.update({"w": jnp.ones(2)}, stage.init({"w": jnp.ones(2), "b": jnp.ones(2)}))


# --- The trust ratio ------------------------------------------------------------------------------


def test_the_trust_ratio_is_that_of_optax(dtype):
    ours, theirs = adam_jax.scale_by_trust_ratio(), optax.scale_by_trust_ratio()
    params, rng = random_params(dtype) | {"zero": jnp.zeros(3, dtype)}, np.random.default_rng(0)
    step, their_step = (
        jax.jit(lambda u, p, tx=tx: tx.update(u, (), p)[0]) for tx in (ours, theirs)
    )
    for low in (-15, -3, 0):
        grads = random_grads(params, rng, low, 5) | {"bias": np.zeros(7, dtype)}
        chex.assert_trees_all_equal(step(grads, params), their_step(grads, params))


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_the_derivative_of_the_trust_ratio_at_0_is_finite(dtype):
    """Where an update is 0 it stays as it is: the derivative is 1."""
    params = {"w": jnp.ones(3, dtype), "zero": jnp.zeros(3, dtype), "empty": jnp.zeros(0, dtype)}
    stage = adam_jax.scale_by_trust_ratio()

    def step(updates, params):
        updates, _ = stage.update(updates, stage.init(params), params)
        return sum(jnp.sum(jnp.real(leaf)) for leaf in jax.tree.leaves(updates))

    zeros = jax.tree.map(jnp.zeros_like, params)
    by_updates, by_params = jax.grad(step, argnums=(0, 1))(zeros, params)
    chex.assert_trees_all_equal(by_updates, jax.tree.map(jnp.ones_like, params))
    chex.assert_trees_all_equal(by_params, zeros)
    _, by_params = jax.grad(step, argnums=(0, 1))(params, params)
    chex.assert_tree_all_finite(by_params)


# --- Clipping -------------------------------------------------------------------------------------


def test_the_limit_moves_and_the_clipping_takes_real_updates():
    stage = adam_jax.clip_by_schedule(lambda count: jnp.asarray([0.5, 1.5])[count])
    state = stage.init(jnp.zeros(3))
    for expected in ([0.5, -0.5, 0.25], [1.0, -1.5, 0.25]):
        update, state = stage.update(jnp.array([1.0, -2.0, 0.25]), state)
        np.testing.assert_array_equal(update, expected)
    with refused(TypeError, "clip_by_schedule real complex64"):
        stage.update(jnp.ones(2, "complex64"), stage.init(jnp.ones(2)))
    with refused(TypeError, "limit schedule 1.0"):
        adam_jax.clip_by_schedule(1.0)
