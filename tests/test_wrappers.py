"""optax's wrappers around one stage and around the whole chain."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from support import assert_close, make_step, random_grads, random_params, refused, trajectory

import adam_jax

MASK = {"kernel": True, "bias": False, "scale": True, "empty": False}
LABELS = {"kernel": "slow", "bias": "fast", "scale": "slow", "empty": "fast"}


def trained(tx, params):
    """The parameters after twenty steps, and the last state."""
    rng = np.random.default_rng(0)
    with jax.numpy_dtype_promotion("standard"):  # optax's wrappers need it
        path, state = trajectory(tx, params, [random_grads(params, rng) for _ in range(20)])
    return path[-1], state


@functools.cache
def plain(name):
    """The parameters after the training of a member by itself."""
    return trained(getattr(adam_jax, name)(1e-2), random_params())[0]


def assert_wrapped_equal(wrap):
    """A wrapper around adam_jax.adam does what it does around optax.adam, bit for bit."""
    params = random_params()
    ours, state = trained(wrap(adam_jax.adam), params)
    theirs, _ = trained(wrap(optax.adam), params)
    chex.assert_trees_all_equal(ours, theirs)
    return state


WRAPPERS = {
    "masked": lambda adam: optax.masked(adam(1e-2), MASK),
    "masked by a function": lambda adam: optax.masked(
        adam(1e-2), lambda tree: jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, tree)
    ),
    "partition": lambda adam: optax.partition(
        {"slow": adam(1e-3), "fast": adam(1e-1, b1=0.5)}, LABELS
    ),
    "named_chain": lambda adam: optax.named_chain(
        ("clip", optax.clip_by_global_norm(1.0)), ("adam", adam(1e-2))
    ),
    "MultiSteps": lambda adam: optax.MultiSteps(
        adam(1e-2), every_k_schedule=4
    ).gradient_transformation(),
    "apply_if_finite": lambda adam: optax.apply_if_finite(adam(1e-2), max_consecutive_errors=3),
    "conditionally_transform": lambda adam: optax.conditionally_transform(
        adam(1e-2), should_transform_fn=lambda step: step % 2 == 0
    ),
    "conditionally_mask": lambda adam: optax.conditionally_mask(
        adam(1e-2), should_transform_fn=lambda step: step % 2 == 0
    ),
    "flatten": lambda adam: optax.flatten(adam(1e-2)),
    "clip, decay, schedule": lambda adam: optax.chain(
        optax.clip_by_global_norm(1.0),
        adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 20)),
        optax.keep_params_nonnegative(),
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_around_the_chain(wrap):
    assert_wrapped_equal(wrap)


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "nadamw"])
def test_schedule_free(name):
    params = random_params()

    def wrap(library):
        tx = getattr(library, name)(1e-2, b1=0.0)
        return optax.contrib.schedule_free(tx, learning_rate=1e-2, b1=0.9)

    ours, _ = trained(wrap(adam_jax), params)
    theirs, _ = trained(wrap(optax), params)
    chex.assert_trees_all_equal(ours, theirs)


def test_lookahead():
    initial = random_params()

    def slow(adam):
        tx = optax.lookahead(adam(1e-1), sync_period=3, slow_step_size=0.5)
        step = make_step(tx)
        params = optax.LookaheadParams.init_synced(initial)
        state, rng = tx.init(params), np.random.default_rng(0)
        for _ in range(10):
            params, state, _ = step(params, state, random_grads(initial, rng))
        return params.slow

    chex.assert_trees_all_equal(slow(adam_jax.adam), slow(optax.adam))


def test_multi_steps_of_k_is_the_step_of_the_mean(x64):
    params = {"w": jnp.linspace(-1.0, 1.0, 5)}
    tx = optax.MultiSteps(adam_jax.adam(1e-2), every_k_schedule=2)
    state = tx.init(params)
    for factor in (1.0, 3.0):
        grads = jax.tree.map(lambda p, f=factor: f * p, params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
    adam = adam_jax.adam(1e-2)
    expected, _ = adam.update(jax.tree.map(lambda p: 2 * p, params), adam.init(params))
    assert_close(updates, expected, "fused")


def test_apply_if_finite_skips_a_bad_gradient():
    params = jnp.ones(2)
    tx = optax.apply_if_finite(adam_jax.adam(1e-2), max_consecutive_errors=3)
    _, state = tx.update(params, tx.init(params))
    updates, skipped = tx.update(jnp.array([1.0, jnp.nan]), state)
    chex.assert_trees_all_equal(updates, jnp.zeros(2))
    chex.assert_trees_all_equal(skipped.inner_state, state.inner_state)


# --- Around one stage -----------------------------------------------------------------------------


def test_masked_stages_are_the_masked_chain():
    """The outer tree never changes, so each stage can be masked by itself."""
    stages = [adam_jax.scale_by_moments(), adam_jax.bias_correct(), adam_jax.scale_by_lr(1e-2)]
    params = random_params()
    each, _ = trained(optax.chain(*[optax.masked(stage, MASK) for stage in stages]), params)
    whole, _ = trained(optax.masked(optax.chain(*stages), MASK), params)
    chex.assert_trees_all_equal(each, whole)


def test_partition_of_one_stage():
    """Other decay rates for some leaves, everything else in common."""
    params = random_params()
    rates = {"slow": 0.9, "fast": 0.5}
    moments = {label: adam_jax.scale_by_moments(b1) for label, b1 in rates.items()}
    shared, _ = trained(
        optax.chain(
            optax.partition(moments, LABELS), adam_jax.bias_correct(), adam_jax.scale_by_lr(1e-2)
        ),
        params,
    )
    chains = {label: adam_jax.adam(1e-2, b1) for label, b1 in rates.items()}
    apart, _ = trained(optax.partition(chains, LABELS), params)
    chex.assert_trees_all_equal(shared, apart)


def test_masked_middle_stage():
    """Nesterov's look-ahead for the matrices only."""
    params = random_params()
    tx = optax.chain(
        adam_jax.scale_by_moments(),
        optax.masked(adam_jax.nesterov(), MASK),
        adam_jax.bias_correct(),
        adam_jax.scale_by_lr(1e-2),
    )
    mixed, _ = trained(tx, params)
    expected = {name: plain("nadam" if MASK[name] else "adam")[name] for name in params}
    chex.assert_trees_all_equal(mixed, expected)


def test_named_chain_of_stages():
    stages = {
        "moments": adam_jax.scale_by_moments(),
        "direction": adam_jax.bias_correct(),
        "step": adam_jax.scale_by_lr(1e-2),
    }
    params = random_params()
    named, state = trained(optax.named_chain(*stages.items()), params)
    chex.assert_trees_all_equal(named, plain("adam"))
    assert set(state) == set(stages)
    assert state["moments"].count == 20


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.conditionally_transform(tx, should_transform_fn=lambda step: step >= 0),
        lambda tx: optax.MultiSteps(tx, every_k_schedule=1).gradient_transformation(),
    ],
    ids=["apply_if_finite", "conditionally_transform", "MultiSteps"],
)
def test_last_stage_wrapped(wrap):
    """Wrappers that choose between an update and no update need a stage that emits updates."""
    params = random_params()
    direction = optax.chain(adam_jax.scale_by_moments(), adam_jax.bias_correct())
    tx = optax.chain(direction, wrap(adam_jax.scale_by_lr(1e-2)))
    chex.assert_trees_all_equal(trained(tx, params)[0], plain("adam"))


def test_cond_between_two_stages():
    """Both branches emit the same shapes and dtypes."""
    params = random_params()
    start = optax.chain(adam_jax.scale_by_moments(), adam_jax.debias())
    moments, _ = start.update(params, start.init(params))
    stages = [adam_jax.bias_correct(), adam_jax.normalize()]

    @jax.jit
    def either(flag, moments):
        branches = [lambda m, s=stage: s.update(m, s.init(params))[0] for stage in stages]
        return jax.lax.cond(flag, *branches, moments)

    chex.assert_trees_all_equal(either(True, moments), either(False, moments))


def test_cond_around_the_chain():
    tx, params = adam_jax.adam(1e-2), random_params()
    step = jax.jit(
        lambda flag, grads, state: jax.lax.cond(
            flag,
            lambda: tx.update(grads, state),
            lambda: (jax.tree.map(jnp.zeros_like, grads), state),
        )
    )
    taken, _ = step(True, params, tx.init(params))
    chex.assert_trees_all_equal(taken, jax.jit(tx.update)(params, tx.init(params))[0])


# --- inject_hyperparams ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adam", "nadam"])
def test_inject_hyperparams(name, dtype):
    """Every number becomes an array in the state, and can be changed there between two steps."""
    params = random_params(dtype)
    inject = optax.inject_hyperparams(getattr(adam_jax, name), hyperparam_dtype=jnp.float32)
    ours, state = trained(inject(1e-2), params)
    assert set(state.hyperparams) == {"learning_rate", "b1", "b2", "eps", "eps_root"}
    assert {value.dtype for value in state.hyperparams.values()} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, params)
    if dtype == "float32":
        assert_close(ours, plain(name), "float32 rate")
    tx = inject(1e-2)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, _ = tx.update(params, state, params)
    assert all(not jnp.any(update) for update in jax.tree.leaves(updates))


def test_inject_hyperparams_in_bfloat16_is_refused():
    """optax#1414: b2 would become 1 and nu would never decay. The message names the remedy."""
    tx = optax.inject_hyperparams(adam_jax.adam)(1e-3)
    with refused(ValueError, "hyperparam_dtype=jnp.float32"):
        tx.init(random_params("bfloat16"))


@pytest.mark.parametrize("weight_decay", [0.1, optax.constant_schedule(0.1)])
def test_inject_hyperparams_adamw(weight_decay):
    params = random_params()
    tx = optax.inject_hyperparams(adam_jax.adamw)(1e-2, weight_decay=weight_decay)
    expected, _ = trained(adam_jax.adamw(1e-2, weight_decay=0.1), params)
    injected, _ = trained(tx, params)
    assert_close(injected, expected, "float32 rate")


INJECTED_STAGES = {
    "scale_by_moments": [
        optax.inject_hyperparams(adam_jax.scale_by_moments)(b1=lambda count: 0.9, b2=0.999),
        adam_jax.bias_correct(),
        adam_jax.scale_by_lr(1e-2),
    ],
    "bias_correct": [
        adam_jax.scale_by_moments(),
        optax.inject_hyperparams(adam_jax.bias_correct)(eps=1e-8),
        adam_jax.scale_by_lr(1e-2),
    ],
    "normalize": [
        adam_jax.scale_by_moments(),
        adam_jax.debias(),
        optax.inject_hyperparams(adam_jax.normalize)(eps=lambda count: 1e-8),
        adam_jax.scale_by_lr(1e-2),
    ],
    "scale_by_lr": [
        adam_jax.scale_by_moments(),
        adam_jax.bias_correct(),
        optax.inject_hyperparams(adam_jax.scale_by_lr)(lambda count: 1e-2),
    ],
}


@pytest.mark.parametrize("stages", INJECTED_STAGES.values(), ids=INJECTED_STAGES.keys())
def test_inject_hyperparams_into_one_stage(stages):
    """On the bare factory, without static_args."""
    injected, _ = trained(optax.chain(*stages), random_params())
    assert_close(injected, plain("adam"), "float32 rate")


def test_inject_hyperparams_with_moving_rates_is_corrected(x64):
    """With g = 1 the step stays 1 within 1e-6, over 1e4 steps of every rate that moves."""
    tx = optax.inject_hyperparams(adam_jax.adam)(
        1.0,
        b1=lambda t: 0.5 + 0.49 * jnp.minimum(t.astype(float) / 100, 1.0),
        b2=lambda t: jnp.where(t < 100, 0.999, 0.95),
        eps=0.0,
    )
    grad = jnp.ones(())
    _, updates = jax.lax.scan(
        lambda state, _: tx.update(grad, state, grad)[::-1], tx.init(grad), length=10_000
    )
    assert_close(updates, -np.ones(10_000), "moving")


# --- Tools that look into the state ---------------------------------------------------------------


def test_tree_get_and_set():
    params = random_params()
    tx = adam_jax.adamw(1e-2)
    state = trained(tx, params)[1]
    chex.assert_trees_all_equal_shapes(optax.tree.get(state, "mu"), params)
    chex.assert_trees_all_equal_shapes(optax.tree.get(state, "nu"), params)
    counts = optax.tree_utils.tree_get_all_with_path(state, "count")
    assert [int(count) for _, count in counts] == [20, 20]  # of the moments, and of the rate
    zeros, zero = jax.tree.map(jnp.zeros_like, params), jnp.zeros([], jnp.int32)
    reset = optax.tree.set(state, mu=zeros, nu=zeros, count=zero)
    updates, _ = tx.update(params, reset, params)
    chex.assert_trees_all_equal(updates, tx.update(params, tx.init(params), params)[0])


@pytest.mark.parametrize("rate", [0.9, jnp.float32(0.9)], ids=["number", "array"])
def test_tree_map_params(rate):
    """Every moment is found as a copy of the parameters, every scalar is not."""
    params = random_params()
    tx = adam_jax.adamw(1e-2, b1=rate)
    state = tx.init(params)
    named = optax.tree.map_params(
        tx,
        lambda moment, name: name,
        state,
        {name: name for name in params},
        transform_non_params=lambda leaf: "scalar",
    )
    names = {name: name for name in params}
    assert named[0].mu == named[0].nu == names
    assert named[0].count == named[-1].count == "scalar"
    assert set(jax.tree.leaves(named[0].weights)) <= {"scalar"}


@pytest.mark.parametrize(
    "stage",
    [
        adam_jax.scale_by_moments(),
        optax.chain(adam_jax.scale_by_moments(), adam_jax.debias()),
        optax.chain(adam_jax.scale_by_moments(), adam_jax.nesterov()),
        optax.chain(adam_jax.scale_by_moments(), adam_jax.normalize()),
        optax.chain(adam_jax.scale_by_moments(), adam_jax.bias_correct()),
        adam_jax.scale_by_lr(1e-3),
        adam_jax.adamw(1e-3),
    ],
)
def test_extra_arguments_are_ignored(stage):
    params = random_params()
    assert isinstance(stage, optax.GradientTransformationExtraArgs)
    state = stage.init(params)
    chex.assert_trees_all_equal(
        stage.update(params, state, params, value=1.0, anything="else"),
        stage.update(params, state, params),
    )
