"""The laws of the algebra, on random gradients, rates and epsilons."""

import functools
import math

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import assert_close, random_grads, random_params, stack, user_jit

import adam_jax

STEPS, SIZE = 6, 4
rates = st.one_of(st.just(0.0), st.floats(0.1, 0.9995))
epsilons = st.sampled_from([0.0, 1e-12, 1e-8, 1e-3, 1.0])


def gradients(low, high):
    """A sequence of gradients with magnitudes in [low, high], both signs, and zeros."""
    magnitudes = st.floats(low, high, allow_subnormal=False)
    element = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x))
    return hnp.arrays(np.float64, (STEPS, SIZE), elements=element)


def run(tx, sequence, dtype="float64"):
    """The updates of every step, stacked; the parameters play no part in these chains."""
    params = jnp.zeros(sequence.shape[1:], dtype)
    state, updates = tx.init(params), []
    for grads in jnp.asarray(sequence, dtype):
        update, state = tx.update(grads, state)
        updates.append(update)
    return jnp.stack(updates)


def moments_then(*stages, b1=0.9, b2=0.999):
    return optax.chain(adam_jax.scale_by_moments(b1, b2), *stages)


@given(gradients(1e-15, 1e15), rates, rates, epsilons, epsilons)
@settings(max_examples=25)
def test_bias_correct_is_debias_then_normalize(sequence, b1, b2, eps, eps_root):
    """Law 2, bitwise."""
    one = moments_then(adam_jax.bias_correct(eps=eps, eps_root=eps_root), b1=b1, b2=b2)
    two = moments_then(
        adam_jax.debias(), adam_jax.normalize(eps=eps, eps_root=eps_root), b1=b1, b2=b2
    )
    chex.assert_trees_all_equal(run(one, sequence, "float32"), run(two, sequence, "float32"))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("eps_root", [0.0, 1e-8])
def test_bias_correct_is_debias_then_normalize_under_jit(eps, eps_root):
    """Law 2, bitwise, in what XLA makes of the two."""
    one = moments_then(adam_jax.bias_correct(eps=eps, eps_root=eps_root))
    two = moments_then(adam_jax.debias(), adam_jax.normalize(eps=eps, eps_root=eps_root))
    sequence = jnp.asarray(np.random.default_rng(8).normal(size=(100, 50)), jnp.float32)

    def scanned(tx):
        step = lambda state, grads: tx.update(grads, state)[::-1]  # noqa: E731
        return user_jit(lambda: jax.lax.scan(step, tx.init(sequence[0]), sequence)[1])()

    chex.assert_trees_all_equal(scanned(one), scanned(two))


def signals_of(sequence, b1, b2):
    """The moments of every step, with the weights they have gathered by the paper's formula."""
    stage = adam_jax.scale_by_moments(b1, b2)
    state = stage.init(jnp.zeros(SIZE))
    for t, grads in enumerate(jnp.asarray(sequence), start=1):
        moments, state = stage.update(grads, state)
        yield moments, 1 - b1**t, 1 - b2**t


def through(stage, moments):
    return stage.update(moments, stage.init(moments.grad))[0]


@given(gradients(1e-3, 1e3), rates, rates, epsilons, epsilons)
@settings(max_examples=25)
def test_reordering(x64, sequence, b1, b2, eps, eps_root):
    """Law 3: bias correction can be moved out of the division, into the step size and epsilons."""
    corrected = adam_jax.bias_correct(eps=eps, eps_root=eps_root)
    for moments, w1, w2 in signals_of(sequence, b1, b2):
        plain = adam_jax.normalize(eps=eps * math.sqrt(w2), eps_root=eps_root * w2)
        reordered = math.sqrt(w2) / w1 * through(plain, moments)
        assert_close(through(corrected, moments), reordered, "algebra")


@given(gradients(1e-3, 1e3), rates, rates, epsilons, epsilons)
@settings(max_examples=25)
def test_eps_hat_is_a_scaled_epsilon(x64, sequence, b1, b2, eps, eps_root):
    """Keras's convention is Adam's with epsilons divided by the gathered weight."""
    hat = adam_jax.bias_correct(eps=eps, eps_root=eps_root, eps_hat=True)
    for moments, _, w2 in signals_of(sequence, b1, b2):
        scaled = adam_jax.bias_correct(eps=eps / math.sqrt(w2), eps_root=eps_root / w2)
        assert_close(through(hat, moments), through(scaled, moments), "algebra")


@given(gradients(1e-15, 1e15), rates, rates)
@settings(max_examples=25)
def test_debias_is_idempotent(sequence, b1, b2):
    """Law 4, bitwise, in every field of the signal."""
    stage = adam_jax.scale_by_moments(b1, b2)
    once, twice = (optax.chain(stage, *[adam_jax.debias()] * times) for times in (1, 2))
    params = jnp.zeros(SIZE)
    state_once, state_twice = once.init(params), twice.init(params)
    for grads in jnp.asarray(sequence, jnp.float32):
        signal_once, state_once = once.update(grads, state_once)
        signal_twice, state_twice = twice.update(grads, state_twice)
        chex.assert_trees_all_equal(signal_once, signal_twice)
        assert signal_once.mu.weight == signal_once.nu.weight == 1


@given(gradients(1e-6, 1e6), rates, rates, st.integers(-20, 20))
@settings(max_examples=25)
def test_scale_invariance_is_bitwise_for_powers_of_two(sequence, b1, b2, exponent):
    """Law 5: with eps = 0 only the direction of the gradients counts, not their scale."""
    tx = moments_then(adam_jax.bias_correct(eps=0), adam_jax.scale_by_lr(1e-3), b1=b1, b2=b2)
    scaled = run(tx, sequence * 2.0**exponent, "float32")
    chex.assert_trees_all_equal(run(tx, sequence, "float32"), scaled)


@given(gradients(1e-6, 1e6), rates, rates, st.floats(1e-6, 1e6))
@settings(max_examples=25)
def test_scale_invariance(x64, sequence, b1, b2, scale):
    """Law 5, for any positive factor."""
    tx = moments_then(adam_jax.bias_correct(eps=0), adam_jax.scale_by_lr(1e-3), b1=b1, b2=b2)
    assert_close(run(tx, sequence), run(tx, sequence * scale), "algebra")


@given(gradients(1e-15, 1e15), rates, rates, st.floats(1e-6, 10))
@settings(max_examples=25)
def test_first_step_has_magnitude_alpha(x64, sequence, b1, b2, alpha):
    """Law 6: whatever the gradient, and 0 where it is 0."""
    tx = moments_then(adam_jax.bias_correct(eps=0), adam_jax.scale_by_lr(alpha), b1=b1, b2=b2)
    assert_close(run(tx, sequence[:1]), -alpha * np.sign(sequence[:1]), "algebra")


def step_bound(b1, b2):
    """Cauchy and Schwarz: what m / sqrt(v) can reach before correction."""
    return (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2))


@given(
    gradients(1e-15, 1e15),
    st.floats(0.1, 0.9995).flatmap(
        lambda b2: st.tuples(st.floats(0.0, 0.999 * math.sqrt(b2)), st.just(b2))
    ),
)
@settings(max_examples=25)
def test_no_step_exceeds_the_bound(x64, sequence, decays):
    """Law 6: before correction the bound holds at every step, after it once the weights are 1.

    The correction multiplies by sqrt(w2) / w1, which is checked with the bound it leads to.
    """
    b1, b2 = decays
    uncorrected = run(moments_then(adam_jax.normalize(eps=0), b1=b1, b2=b2), sequence)
    assert np.all(np.abs(uncorrected) <= step_bound(b1, b2) * (1 + 1e-9))
    corrected = run(moments_then(adam_jax.bias_correct(eps=0), b1=b1, b2=b2), sequence)
    steps = np.arange(1, STEPS + 1)[:, None]
    factor = np.sqrt(1 - b2**steps) / (1 - b1**steps)
    assert np.all(np.abs(corrected) <= step_bound(b1, b2) * factor * (1 + 1e-9))


def test_the_worst_sequence_reaches_the_bound(x64):
    """Law 6 at the defaults: 7.27, where section 2.1 of the paper says 3.16."""
    b1, b2 = 0.9, 0.999
    silence = np.zeros((10_000, 1))  # until both weights are 1
    worst = np.concatenate([silence, (b2 / b1) ** np.arange(500.0)[:, None]])
    tx = moments_then(adam_jax.bias_correct(eps=0), b1=b1, b2=b2)
    params = jnp.zeros(1)
    _, updates = jax.lax.scan(
        lambda state, grads: tx.update(grads, state)[::-1], tx.init(params), jnp.asarray(worst)
    )
    largest = float(jnp.max(jnp.abs(updates)))
    assert pytest.approx(step_bound(b1, b2), abs=0.005) == 7.27
    assert largest == pytest.approx(step_bound(b1, b2), rel=0.01)


STAGES = {
    **{
        name: tables.from_gradients(name) for name, s in tables.STAGES.items() if s.emits != "steps"
    },
    "no first moment": moments_then(adam_jax.normalize(), b1=None),
    **{name: tables.MEMBERS[name](1e-3) for name in ("adam", "adamw", "nadam", "nadamw")},
    "adam, moving rates": adam_jax.adam(1e-3, b1=jnp.float32(0.9), b2=lambda t: 0.99),
}
each_stage = pytest.mark.parametrize("tx", STAGES.values(), ids=STAGES.keys())


def gradients_like(params, steps=3):
    rng = np.random.default_rng(5)
    return [random_grads(params, rng) for _ in range(steps)]


def walk(step, state, params):
    """The outputs of three steps and the last state."""
    outputs = []
    for grads in gradients_like(params):
        grads = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, params)
        output, state = step(grads, state, params)
        outputs.append(output)
    return outputs, state


@each_stage
def test_naturality(tx):
    """Law 7: a stage on a tree is the stage on each leaf alone."""
    params = random_params()
    state, alone = tx.init(params), {name: tx.init(leaf) for name, leaf in params.items()}
    for grads in gradients_like(params):
        whole, state = tx.update(grads, state, params)
        for name, leaf in params.items():
            part, alone[name] = tx.update(grads[name], alone[name], leaf)
            chex.assert_trees_all_equal(part, whole[name])


@each_stage
@pytest.mark.parametrize("params", [{}, (), {"a": None}, [None, {}]], ids=str)
def test_empty_trees_pass_through(tx, params):
    """Law 7."""
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates == params


def test_nesting_of_chain_does_not_matter():
    """Law 7."""
    a, b, c = adam_jax.scale_by_moments(), adam_jax.bias_correct(), adam_jax.scale_by_lr(1e-3)
    params = random_params()
    flat, *nested = (
        walk(tx.update, tx.init(params), params)[0]
        for tx in (
            optax.chain(a, b, c),
            optax.chain(optax.chain(a, b), c),
            optax.chain(a, optax.chain(b, c)),
        )
    )
    for other in nested:
        chex.assert_trees_all_equal(other, flat)


# --- Law 8: in each way to run them, all stages are compiled as one function ----------------------

each_name = pytest.mark.parametrize("name", STAGES)


def wide_params(seed=0):
    """Float64, on one device; the first axis of the large leaves divides by eight."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (16, 3), "bias": (8,), "scale": (), "empty": (0, 3)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def init_all(params):
    return {name: tx.init(params) for name, tx in STAGES.items()}


def update_all(grads, states, params):
    """One step of every stage: the outputs by name, and the states."""
    steps = {name: tx.update(grads, states[name], params) for name, tx in STAGES.items()}
    return tuple({name: step[part] for name, step in steps.items()} for part in range(2))


@functools.cache
def plain(device):
    """What the others must give: three steps of every stage, operation by operation."""
    with jax.default_device(device):
        params = wide_params()
        outputs, states = walk(update_all, init_all(params), params)
    return stack(outputs), states


@functools.cache
def jitted():
    params = wide_params()
    outputs, states = walk(jax.jit(update_all), init_all(params), params)
    return stack(outputs), states


@functools.cache
def scanned():
    params = wide_params()
    step = lambda states, grads: update_all(grads, states, params)[::-1]  # noqa: E731
    states, outputs = jax.lax.scan(step, init_all(params), stack(gradients_like(params)))
    return outputs, states


@each_name
def test_jit_gives_the_same_numbers(name, x64):
    """Law 8."""
    for jit, expected in zip(jitted(), plain(jax.devices()[0]), strict=True):
        assert_close(jit[name], expected[name], "fused")


@each_name
def test_scan_gives_the_same_numbers(name, x64):
    """Law 8; the carry also shows that no state leaf changes shape or dtype."""
    for scan, expected in zip(scanned(), plain(jax.devices()[0]), strict=True):
        assert_close(scan[name], expected[name], "fused")


@functools.cache
def three_models():
    """The first step of three models, one after the other and under vmap."""
    models = [wide_params(seed) for seed in range(3)]
    grads = [gradients_like(model, seed + 1)[seed] for seed, model in enumerate(models)]
    first = lambda params, grads: update_all(grads, init_all(params), params)[0]  # noqa: E731
    apart = stack([first(*pair) for pair in zip(models, grads, strict=True)])
    return jax.jit(jax.vmap(first))(stack(models), stack(grads)), apart


@each_name
def test_vmap_gives_the_same_numbers(name, x64):
    """Law 8: three models at once."""
    together, apart = three_models()
    assert_close(together[name], apart[name], "fused")


def on_eight_devices(leaf):
    """Its rows in eight parts; a scalar or an empty leaf whole on each device."""
    mesh = Mesh(np.array(jax.devices("cpu")), ("data",))
    axes = ["data"] if leaf.ndim and leaf.size else []
    return NamedSharding(mesh, PartitionSpec(*axes))


@functools.cache
def sharded():
    """The states at the start, and three steps."""
    params = jax.tree.map(lambda leaf: jax.device_put(leaf, on_eight_devices(leaf)), wide_params())
    states = init_all(params)
    return states, *walk(jax.jit(update_all), states, params)


@each_name
def test_sharded_execution_gives_the_same_numbers(name, x64):
    """Law 8: eight devices, the numbers of one, with the state where the parameters are."""
    assert len(jax.devices("cpu")) == 8
    initial, outputs, states = sharded()
    mine = [output[name] for output in outputs]
    for leaf in jax.tree.leaves((initial[name], mine, states[name])):
        if jnp.ndim(leaf) and leaf.shape[0] % 8 == 0:
            assert leaf.sharding.is_equivalent_to(on_eight_devices(leaf), leaf.ndim)
    expected_outputs, expected_states = plain(jax.devices("cpu")[0])
    assert_close(stack(mine), expected_outputs[name], "fused")
    assert_close(states[name], expected_states[name], "fused")
