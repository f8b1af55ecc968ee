"""scale_by_moments: what it keeps, in which dtype, for which trees, under which rates."""

import dataclasses
import inspect
from typing import NamedTuple

import chains
import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import TOLERANCES, assert_close, random_grads, random_params, refused, stack, user_jit

import adam_jax

# --- Trees ----------------------------------------------------------------------------------------


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    layers: list
    temperature: jax.Array


def array(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


TREES = {
    "nested dict": {"a": {"b": {"c": array(2, 3)}, "d": array(4)}},
    "list": [array(2), array(3)],
    "tuple": (array(2), (array(3), array(1, 1))),
    "NamedTuple": Layer(array(2, 3), array(3)),
    "registered dataclass": Model([Layer(array(2, 3), array(3))], array()),
    "None leaves": {"a": None, "b": Layer(array(2), None), "c": [None, array(3)]},
    "scalar": {"a": array()},
    "zero-size": {"a": array(0), "b": array(3, 0, 2), "c": array(2)},
    "bare array": array(3, 2),
    "bare scalar": array(),
    "mixed dtypes": {
        "float32": array(3),
        "bfloat16": array(3, dtype="bfloat16"),
        "float16": array(3, dtype="float16"),
        "complex64": jax.lax.complex(array(3), array(3, seed=1)),
    },
}


@pytest.mark.parametrize("params", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("name", ["adam", "nadam", "adamw"])
def test_every_pytree(name, params):
    """The tree, shapes and dtypes of the updates are those of the gradients, step after step."""
    tx = getattr(adam_jax, name)(0.1)
    state = tx.init(params)
    grads = jax.tree.map(lambda p: p + 1, params)
    for _ in range(2):
        updates, new_state = tx.update(grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        chex.assert_trees_all_equal_structs(updates, params)
        state = new_state
    chex.assert_tree_all_finite(updates)


def test_complex_leaves(x64):
    """A complex leaf is not two real ones: nu is real, and the phase of the update is that of m."""
    params = jnp.asarray([3 + 4j, -1j, 0.0])
    tx = adam_jax.adam(0.1, eps=0)
    updates, state = tx.update(params, tx.init(params))
    assert_close(updates, -0.1 * np.array([0.6 + 0.8j, -1j, 0]), "algebra")
    assert state[0].mu.dtype == jnp.complex128
    assert state[0].nu.dtype == jnp.float64
    assert_close(state[0].nu, 1e-3 * np.array([25.0, 1, 0]), "algebra")


def test_complex_leaves_equal_optax(x64):
    params = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)).view(np.complex128))
    ours, theirs = adam_jax.nadam(1e-2), optax.nadam(1e-2)
    our_state, their_state = ours.init(params), theirs.init(params)
    rng = np.random.default_rng(1)
    for _ in range(20):
        grads = jnp.asarray(rng.normal(size=(4, 2)).view(np.complex128))
        our_updates, our_state = ours.update(grads, our_state)
        with jax.numpy_dtype_promotion("standard"):
            their_updates, their_state = theirs.update(grads, their_state)
        assert_close(our_updates, their_updates, "reference")


def test_python_and_numpy_leaves():
    """Gradients may be NumPy arrays and parameters Python floats, as in optax."""
    tx = adam_jax.adam(0.1)
    params = {"a": 1.0, "b": np.ones(2, np.float32)}
    updates, state = tx.update(params, tx.init(params), params)
    updates, _ = tx.update(params, state, params)
    assert jax.tree.map(jnp.shape, updates) == {"a": (), "b": (2,)}


# --- Dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["adam", "nadam"])
def test_low_precision_parameters_equal_optax_in_float32(name, low):
    """The direction is that of optax in float32, rounded once; the step is rounded once more."""
    params = random_params(low)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    ours, theirs = getattr(adam_jax, name)(1e-2), getattr(optax, name)(1e-2)
    direction = optax.chain(
        adam_jax.scale_by_moments(),
        *([adam_jax.nesterov()] if name == "nadam" else []),
        adam_jax.bias_correct(),
    )
    reference = optax.scale_by_adam(nesterov=name == "nadam")
    states = [direction.init(params), reference.init(wide), ours.init(params), theirs.init(wide)]
    steps = [jax.jit(tx.update) for tx in (direction, reference, ours, theirs)]
    rng, trace = np.random.default_rng(0), []
    for _ in range(300):
        grads = random_grads(params, rng, -2, 2)
        wide_grads = jax.tree.map(lambda g: g.astype(np.float32), grads)
        with jax.numpy_dtype_promotion("standard"):
            outputs = [
                step(g, state, p)
                for step, state, (g, p) in zip(
                    steps, states, 2 * [(grads, params), (wide_grads, wide)], strict=True
                )
            ]
        updates, states = zip(*outputs, strict=True)
        trace.append(updates)
    mine, optax_direction, updates, optax_updates = map(stack, zip(*trace, strict=True))
    assert_close(mine, optax_direction, f"cast to {low}")
    chex.assert_trees_all_equal_shapes_and_dtypes(trace[0][2], params)
    assert_close(updates, optax_updates, low)


def test_nu_decays_in_bfloat16():
    """In bfloat16 itself 0.999 is 1, and nu would never decay."""
    tx, params = adam_jax.adam(1e-3), jnp.ones((), jnp.bfloat16)
    _, state = tx.update(params, tx.init(params))
    first = optax.tree.get(state, "nu")

    def step(state, _):
        return tx.update(jnp.zeros_like(params), state)[1], None

    state, _ = jax.lax.scan(step, state, length=1000)
    assert float(optax.tree.get(state, "nu") / first) == pytest.approx(0.999**1000, rel=1e-4)


@pytest.mark.parametrize("low", ["bfloat16", "float16", "float32"])
def test_zero_gradient_gives_zero(low):
    """With an epsilon that underflows in float16, and without any."""
    params = jnp.ones(3, low)
    for tx in (adam_jax.adam(1e-3), adam_jax.nadam(1e-3), adam_jax.adam(1e-3, eps=0)):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jnp.zeros_like(params), state, params)
            chex.assert_trees_all_equal(jnp.abs(updates), jnp.zeros_like(params))


@pytest.mark.parametrize(
    ("param", "mu", "nu"),
    [
        ("bfloat16", "float32", "float32"),
        ("float16", "float32", "float32"),
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
        ("complex64", "complex64", "float32"),
        ("complex128", "complex128", "float64"),
    ],
)
def test_state_dtypes(param, mu, nu, x64):
    stage = adam_jax.scale_by_moments()
    state = stage.init(jnp.ones(2, param))
    for grad_dtype in (param, "float32" if "complex" not in param else "complex64"):
        moments, state = stage.update(jnp.ones(2, grad_dtype), state)
        assert (state.mu.dtype, state.nu.dtype) == (mu, nu)
        assert moments.grad.dtype == grad_dtype
        assert state.count.dtype == jnp.int32


@pytest.mark.parametrize("mu", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("nu", [None, "bfloat16", "float32"])
def test_kept_dtypes_do_not_drift(mu, nu):
    tx = adam_jax.scale_by_moments(mu_storage=mu, nu_storage=nu)
    params = random_params()
    state = tx.init(params)
    for _ in range(2):
        assert {leaf.dtype for leaf in state.mu.values()} == {jnp.dtype(mu or "float32")}
        assert {leaf.dtype for leaf in state.nu.values()} == {jnp.dtype(nu or "float32")}
        _, state = jax.eval_shape(tx.update, params, state)


def test_the_step_uses_the_moment_before_it_is_rounded():
    tx = adam_jax.scale_by_moments(0.9, 0.99, mu_storage="bfloat16", nu_storage="bfloat16")
    grads = jnp.full(1, 1 / 3)
    moments, state = tx.update(grads, tx.init(grads))
    exact, _ = adam_jax.scale_by_moments(0.9, 0.99).update(
        grads, adam_jax.scale_by_moments().init(grads)
    )
    assert moments.rounded == ()
    chex.assert_trees_all_equal(moments._replace(rounded=None), exact)
    assert state.nu.astype(jnp.float32) != moments.nu.value


def test_count_saturates():
    tx = adam_jax.adam(1e-3)
    params = jnp.ones(2)
    largest = jnp.asarray(2**31 - 1, jnp.int32)
    state = tx.init(params)
    state = (state[0]._replace(count=largest), state[1], state[2]._replace(count=largest))
    updates, state = tx.update(params, state)
    assert state[0].count == state[2].count == largest
    chex.assert_tree_all_finite(updates)


AT_RANDOM = adam_jax.storage.stochastic()


@pytest.mark.parametrize(
    ("tx", "counts"),
    [
        (adam_jax.scale_by_moments(nu_storage=AT_RANDOM), {2**30}),
        (adam_jax.amsgrad(1e-3, nu_storage=AT_RANDOM), {2**30, 2**31 - 1}),  # scale_by_lr's
        (adam_jax.mix_slow_moment(mu_storage=AT_RANDOM), {2**30}),
        (adam_jax.round_stochastically(), {2**30}),
    ],
    ids=["scale_by_moments", "running_max", "mix_slow_moment", "round_stochastically"],
)
def test_counts_that_bits_are_drawn_with_go_on(tx, counts):
    params = jnp.ones(2)
    largest = jnp.asarray(2**31 - 1, jnp.int32)
    state = jax.tree.map(lambda x: largest if x.dtype == jnp.int32 else x, tx.init(params))
    updates = params
    if "mix" in tx.update.__qualname__:
        stage = adam_jax.scale_by_moments()
        updates, _ = stage.update(params, stage.init(params))
    _, state = tx.update(updates, state, params)
    assert {int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32} == counts


def test_moments_at_the_end_of_the_count_follow_smaller_gradients():
    """If the bits were those of one step for ever, v would stay 160 times too large."""
    tx = adam_jax.scale_by_moments(nu_storage=AT_RANDOM)
    state = tx.init(jnp.zeros((64, 64)))._replace(count=jnp.asarray(2**31 - 1, jnp.int32))

    @jax.jit
    def steps(state, size):
        def step(state, _):
            moments, state = tx.update(jnp.full((64, 64), size), state)
            return state, jnp.mean(moments.nu.value)

        return jax.lax.scan(step, state, length=5000)

    state, _ = steps(state, 1.0)
    _, nu = steps(state, 0.1)
    assert 0.01 < nu[-1] < 0.02  # exact: 0.01 + 0.99 * 0.999**5000 = 0.0167


# --- Moving decays --------------------------------------------------------------------------------

RATES = {
    "b2 rises": (0.9, lambda t: 0.9 + 0.0999 * jnp.minimum(t / 100, 1.0)),
    "b1 rises": (lambda t: 0.5 + 0.49 * jnp.minimum(t / 100, 1.0), 0.999),
    "b2 drops": (0.9, lambda t: jnp.where(t < 100, 0.999, 0.95)),
    "b2 as in Adafactor": (0.9, lambda t: 1 - (t + 1.0) ** -0.8),
    "slow": (lambda t: 0.99 + 0.0 * t, lambda t: 0.99999 + 0.0 * t),
    "both jump": (lambda t: 0.9 * jnp.abs(jnp.sin(t)), lambda t: 0.999 * jnp.abs(jnp.cos(t))),
}


def scheduled(rate):
    """A schedule of default floats, as a user under strict promotion writes it."""
    return (lambda count: rate(count.astype(float))) if callable(rate) else rate


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES.keys())
def test_scheduled_decays_are_corrected_exactly(rates, x64):
    """With g = 1 the step stays 1, for any schedule, over 1e5 steps.

    In float64: in float32 the moments themselves gather roundings, up to 1e-4 with a rate of
    0.9999, be it scheduled or constant, in optax as here. The weight does not: see the next test.
    """
    tx = adam_jax.adam(1.0, b1=scheduled(rates[0]), b2=scheduled(rates[1]), eps=0)
    grad = jnp.ones(())

    def step(carry, _):
        state, largest = carry
        update, state = tx.update(grad, state)
        return (state, jnp.maximum(largest, jnp.abs(update + 1))), None

    (_, largest), _ = jax.lax.scan(step, (tx.init(grad), jnp.zeros(())), length=100_000)
    assert largest <= TOLERANCES["moving"].rtol


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES.keys())
def test_gathered_weight_over_many_steps(rates):
    """The weight in float32 against 1 - prod(b) in float64, both from the float32 rates."""
    steps = 100_000
    stage = adam_jax.scale_by_moments(*map(scheduled, rates))

    def step(state, _):
        moments, state = stage.update(jnp.ones(()), state)
        mu, nu = moments.mu, moments.nu
        signal = (mu.decay, nu.decay, mu.weight, nu.weight)
        return state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), signal)

    _, trace = jax.lax.scan(step, stage.init(jnp.ones(())), length=steps)
    mu_decay, nu_decay, mu_weight, nu_weight = map(np.asarray, trace)
    for rate, decay, weight in zip(
        rates, (mu_decay, nu_decay), (mu_weight, nu_weight), strict=True
    ):
        if callable(rate):
            with np.errstate(divide="ignore"):
                exact = -np.expm1(np.cumsum(np.log(decay.astype(np.float64))))
            assert_close(weight, exact, "moving")


def test_injected_moving_decays_are_corrected(x64):
    """With g = 1 the step stays 1, where `1 - b_t**t` gives 0.10, 1.57 and 2.66 (see README)."""
    for rates in (
        {"b2": optax.linear_schedule(0.9, 0.9999, 100)},
        {"b1": optax.linear_schedule(0.5, 0.99, 100)},
        {"b2": lambda t: jnp.where(t < 100, 0.999, 0.95)},
    ):
        tx = optax.inject_hyperparams(adam_jax.adam)(1.0, **rates)
        grad = jnp.ones(())
        step = lambda state, _, tx=tx: tx.update(jnp.ones(()), state)[::-1]  # noqa: E731
        _, updates = jax.lax.scan(step, tx.init(grad), length=400)
        np.testing.assert_allclose(updates, -1, rtol=1e-6)  # the promised bound, eps included


def test_the_power_of_the_rate_of_today_is_not_the_weight():
    """The same steps with `1 - b_t**t` for the weights: far from 1, so the test above can fail."""
    steps = np.arange(400)
    for b1, b2, worst in (
        (0.9, np.minimum(0.9 + 0.0999 * steps / 100, 0.9999), 0.10),
        (np.minimum(0.5 + 0.49 * steps / 100, 0.99), 0.999, 1.57),
        (0.9, np.where(steps < 100, 0.999, 0.95), 2.66),
    ):
        rates = [np.broadcast_to(b, steps.shape) for b in (b1, b2)]
        right = [1 - np.cumprod(b) for b in rates]  # what m and v are, with g = 1
        wrong = [1 - b ** (steps + 1) for b in rates]
        size = (right[0] / wrong[0]) / np.sqrt(right[1] / wrong[1])
        assert size[np.argmax(np.abs(np.log(size)))] == pytest.approx(worst, abs=0.02)


def test_a_constant_schedule_is_the_constant():
    params = random_params()
    rng = np.random.default_rng(0)
    b1, b2 = jnp.float32(0.9), jnp.float32(0.999)
    variants = [
        adam_jax.nadam(1e-3),
        adam_jax.nadam(1e-3, b1=lambda t: b1, b2=lambda t: b2),
        adam_jax.nadam(1e-3, b1=b1, b2=b2),
    ]
    grads = stack([random_grads(params, rng) for _ in range(50)])
    runs = [
        jax.jit(
            lambda tx: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(params), grads),
            static_argnums=0,
        )(tx)[1]
        for tx in variants
    ]
    for other in runs[1:]:
        assert_close(other, runs[0], "float32 rate")


def test_nesterov_looks_at_the_next_rate(x64):
    """Dozat's algorithm 2 with its momentum schedule, written out in NumPy."""
    rate = lambda t: 0.99 * (1 - 0.5 * 0.96 ** (t / 250))  # noqa: E731
    tx = adam_jax.nadam(1.0, b1=lambda t: rate(t.astype(float)), eps=0)
    state, rng = tx.init(jnp.zeros(3)), np.random.default_rng(0)
    m, v, product = np.zeros(3), np.zeros(3), 1.0
    for t in range(30):
        g = rng.normal(size=3)
        update, state = tx.update(jnp.asarray(g), state)
        now, ahead = rate(t), rate(t + 1)
        m, v = now * m + (1 - now) * g, 0.999 * v + 0.001 * g**2
        product *= now
        direction = ahead * m / (1 - product * ahead) + (1 - now) * g / (1 - product)
        assert_close(update, -direction / np.sqrt(v / (1 - 0.999 ** (t + 1))), "reference")


MEMBERS = chains.members()
WINDOWS = {"at the start": (0, 2), "in the middle": (1, 3), "always": (0, 9)}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("name", [n for n in MEMBERS if "momentum" not in n and n != "sgd"])
def test_a_rate_of_exactly_one_in_a_schedule(name, window):
    """It keeps an average as it is, at the start the initial one, of weight 0: no NaN from that."""

    def rate(count):
        return jnp.where((count >= window[0]) & (count < window[1]), 1.0, 0.9)

    rates = [
        b for b in ("b1", "b2", "b3", "decay") if b in inspect.signature(MEMBERS[name]).parameters
    ]
    if name == "lion":
        rates = ["b2"]  # the other is no schedule
    options = {"rmsprop": {"centered": True, "bias_correction": True}}.get(name, {})
    grads = jnp.asarray([1e3, -2.0, 0.0])
    for moving in [[b] for b in rates] + [rates]:
        tx = MEMBERS[name](1.0, **dict.fromkeys(moving, rate), **options)
        state = tx.init(grads)
        for _ in range(4):
            updates, state = tx.update(grads, state, grads)
            assert jnp.isfinite(updates).all(), (moving, updates)
        chex.assert_tree_all_finite(state)


def test_cautious_with_a_rate_of_one_under_jit():
    """Where XLA joins the two divisions of the first moment, their divisor must not underflow."""
    tx = adam_jax.cautious_adamw(1.0, b1=lambda count: jnp.ones(()))
    grads = jnp.asarray([1.0, -2.0, 0.5])
    state, step = tx.init(grads), jax.jit(tx.update)
    for _ in range(2):
        updates, state = step(grads, state, grads)
        assert jnp.isfinite(updates).all()


def test_a_rule_of_ones_own():
    """A second moment that a user writes: here the mean absolute gradient, squared."""

    def absolute(grad, mu, nu, decay):
        del mu
        return ((1 - decay) * jnp.abs(grad) + decay * jnp.sqrt(nu)) ** 2

    stage = adam_jax.scale_by_moments(0.9, 0.5, second_moment=absolute)
    state = stage.init(jnp.zeros(1))
    for _ in range(2):
        moments, state = stage.update(jnp.full(1, -4.0), state)
    chex.assert_trees_all_equal(moments.nu.value, jnp.full(1, 9.0))


WRONG_RULES = {
    "shape": (lambda grad, mu, nu, decay: nu.sum(), "()"),
    "dtype": (lambda grad, mu, nu, decay: nu.astype(jnp.bfloat16), "bfloat16"),
    "complex": (lambda grad, mu, nu, decay: nu.astype("complex64"), "complex64"),
    "nothing": (lambda grad, mu, nu, decay: None, "None"),
    "number": (lambda grad, mu, nu, decay: 1.0, "1.0"),
}


@pytest.mark.parametrize(("rule", "returned"), WRONG_RULES.values(), ids=WRONG_RULES)
@pytest.mark.parametrize("wrap", [jax.jit, lambda update: update], ids=["jit", "eager"])
def test_a_rule_that_keeps_neither_shape_nor_dtype(rule, returned, wrap):
    """At the first update, not at the second, where the gradients would be blamed."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    stage = adam_jax.scale_by_moments(second_moment=rule)
    with refused(ValueError, f"second_moment (3,) float32 ['a'] {returned}"):
        wrap(stage.update)(params, stage.init(params))


# --- One state for every kind of rate -------------------------------------------------------------

GRADS = np.random.default_rng(0).uniform(0.5, 1.5, size=(8, 3))
KINDS = {
    "number": lambda b1, b2: adam_jax.adam(1.0, b1, b2, eps=0.0),
    "array": lambda b1, b2: adam_jax.adam(1.0, jnp.asarray(b1), jnp.asarray(b2), eps=0.0),
    "schedule": lambda b1, b2: adam_jax.adam(
        1.0, lambda t: b1 + 0.0 * t.astype(float), lambda t: b2 - 1e-3 * t.astype(float), eps=0.0
    ),
    "injected": lambda b1, b2: optax.inject_hyperparams(adam_jax.adam)(1.0, b1, b2, eps=0.0),
}


def exact(rates):
    """Adam's last update in float64 NumPy, for a history of rates."""
    m = v = 0.0
    left_m = left_v = 1.0
    for (b1, b2), g in zip(rates, GRADS, strict=False):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        left_m, left_v = left_m * b1, left_v * b2
    return -m / (1 - left_m) / np.sqrt(v / (1 - left_v))


@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("after", KINDS)
def test_a_running_job_goes_on_with_other_rates(before, after, x64):
    """From any kind of rate to any other: the state fits, and the correction is that of history."""
    rates = {before: (0.9, 0.999), after: (0.8, 0.99)} if before != after else {}
    state = adam_jax.adam(1.0).init(jnp.zeros(3))
    history = []
    for start, kind in ((0, before), (4, after)):
        b1, b2 = rates.get(kind, (0.9, 0.999) if start == 0 else (0.8, 0.99))
        tx = KINDS[kind](b1, b2)
        if kind == "injected":
            state = tx.init(jnp.zeros(3))._replace(inner_state=state)
        for t in range(start, start + 4):
            history.append((b1, b2 - 1e-3 * t) if kind == "schedule" else (b1, b2))
            updates, state = tx.update(jnp.asarray(GRADS[t]), state)
            np.testing.assert_allclose(updates, exact(history), rtol=1e-6)
        state = state.inner_state if kind == "injected" else state


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_the_same_for_every_kind_of_rate(kind):
    """One array for all scalars of the moments, and two counts."""
    number, state = KINDS["number"](0.9, 0.999), KINDS[kind](0.9, 0.999).init(jnp.zeros(3))
    state = state.inner_state if kind == "injected" else state
    chex.assert_trees_all_equal_shapes_and_dtypes(state, number.init(jnp.zeros(3)))
    assert (
        len(jax.tree.leaves(state)) == len(jax.tree.leaves(optax.adam(0.1).init(jnp.zeros(3)))) + 2
    )


def test_a_checkpoint_keeps_the_correction_of_a_number():
    """To the letter: the rate it was made with is still known to be the only one."""
    tx, theirs = adam_jax.adam(1e-2), optax.adam(1e-2)
    params = random_params()
    state, their_state = tx.init(params), theirs.init(params)
    step, their_step = user_jit(tx.update), user_jit(theirs.update)
    rng = np.random.default_rng(0)
    for _ in range(6):
        grads = random_grads(params, rng)
        state = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state))
        updates, state = step(grads, state)
        with jax.numpy_dtype_promotion("standard"):
            their_updates, their_state = their_step(grads, their_state)
        chex.assert_trees_all_equal(updates, their_updates)


# --- The contract with optax ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MEMBERS)
def test_injected_is_the_same_as_not_injected(name):
    """Updates and the whole state inside, in structure and values, as optax's own tests ask."""
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    plain, injected = MEMBERS[name](0.1), optax.inject_hyperparams(MEMBERS[name])(0.1)
    state, wrapped = plain.init(params), injected.init(params)
    for scale in (1.0, -0.5):
        grads = jax.tree.map(lambda p, s=scale: s * p, params)
        updates, state = plain.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            others, wrapped = injected.update(grads, wrapped, params)
        assert_close(others, updates, "float32 rate")
        chex.assert_trees_all_equal_shapes_and_dtypes(wrapped.inner_state, state)
        assert_close(wrapped.inner_state, state, "float32 rate")


@pytest.mark.parametrize("eps_root", [0.0, 1e-12])
@pytest.mark.parametrize("name", ["adam", "nadam"])
def test_without_epsilon_bitwise_optax(name, eps_root):
    """Where the gradient is not 0; where it is, optax divides 0 by 0, and here the update is 0."""
    params = {"w": jnp.zeros((13, 7)), "zero": jnp.zeros(3)}
    ours, theirs = (
        getattr(library, name)(1e-2, eps=0.0, eps_root=eps_root) for library in (adam_jax, optax)
    )
    state, their_state = ours.init(params), theirs.init(params)
    step, their_step = user_jit(ours.update), user_jit(theirs.update)
    rng = np.random.default_rng(0)
    for _ in range(20):
        grads = random_grads(params, rng) | {"zero": jnp.zeros(3)}
        updates, state = step(grads, state)
        with jax.numpy_dtype_promotion("standard"):
            their_updates, their_state = their_step(grads, their_state)
        chex.assert_trees_all_equal(updates["w"], their_updates["w"])
        chex.assert_trees_all_equal(jnp.abs(updates["zero"]), jnp.zeros(3))


# --- How wide an update is ------------------------------------------------------------------------

WIDTHS = {  # parameter, gradient: update with the parameters, without
    ("float32", "bfloat16"): ("float32", "float32"),
    ("float32", "float16"): ("float32", "float32"),
    ("bfloat16", "bfloat16"): ("bfloat16", "float32"),
    ("float16", "float16"): ("float16", "float32"),
    ("bfloat16", "float32"): ("float32", "float32"),
    ("complex64", "complex64"): ("complex64", "complex64"),
}


@pytest.mark.parametrize(("kinds", "expected"), WIDTHS.items())
@pytest.mark.parametrize("name", ["adam", "adamw", "radam", "adam_atan2", "lion", "laprop"])
def test_width_of_the_updates(name, kinds, expected):
    """As wide as the parameters and gradients; without the parameters, as wide as the moments."""
    param, grad = (jnp.ones(3, kind) for kind in kinds)
    tx = MEMBERS[name](1e-7, **({"weight_decay": None} if name == "lion" else {}))
    updates = [jax.eval_shape(tx.update, grad, tx.init(param), param)[0]]
    if name != "adamw":
        updates.append(jax.eval_shape(tx.update, grad, tx.init(param))[0])
    for update, dtype in zip(updates, expected, strict=False):
        assert update.dtype == dtype


def test_small_steps_of_float16_gradients_are_not_lost():
    params, grads = jnp.ones(1000), jnp.linspace(-1, 1, 1000).astype(jnp.float16)
    tx = adam_jax.adam(1e-7)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates, -1e-7 * np.sign(np.float32(grads)), rtol=1e-4)


def test_parameters_of_another_structure():
    """A whole model, of which only the arrays have gradients: functions stay beside them."""
    arrays = {"w": jnp.ones(3), "f": None}
    model = {"w": jnp.ones(3), "f": jnp.tanh}
    tx = adam_jax.adam(0.1)
    expected, _ = tx.update(arrays, tx.init(arrays), arrays)
    for params in (model, {"w": (jnp.ones(3), jnp.tanh), "f": 1}, [jnp.tanh], jnp.tanh, ()):
        updates, _ = tx.update(arrays, tx.init(arrays), params)
        chex.assert_trees_all_equal(updates, expected)
