"""Low-precision parameters: where an update lands, that it is unbiased, that nothing is lost."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import plain_step, random_params, refused

import adam_jax
from adam_jax.rounding import _rounded

LOW = ["bfloat16", "float16"]
STAGES = tables.stages("updates", "steps")
each_stage = pytest.mark.parametrize("tx", STAGES.values(), ids=STAGES.keys())


def wide(x):
    return np.asarray(x, np.float64)


def hard_cases(dtype):
    """Parameters and updates over all magnitudes, with the values at which rounding goes wrong.

    Only float32's subnormal numbers are left out, which XLA takes for zero; float16's are in.
    """
    rng = np.random.default_rng(0)
    limits = jnp.finfo(dtype)
    least = max(float(limits.smallest_subnormal), 2.0**-100)
    exponents = rng.uniform(np.log2(least), np.log2(float(limits.max)) - 1, 500_000)
    params = rng.choice([-1, 1], 500_000) * 2**exponents
    updates = params * rng.choice([-1, 1], 500_000) * 2 ** rng.uniform(-14, 2, 500_000)
    powers = 2.0 ** np.arange(-14, 15)
    special = np.array([0.0, -0.0, float(limits.max), -float(limits.max), *powers, *-powers])
    params = np.concatenate([params, np.repeat(special, len(special))])
    updates = np.concatenate([updates, np.tile(special, len(special)) * 2**-9])
    # A step across zero: the update takes the parameter to the other sign, or to zero itself.
    params = np.concatenate([params, powers, powers])
    updates = np.concatenate([updates, -powers, -1.25 * powers])
    with np.errstate(over="ignore"):
        return jnp.asarray(params, dtype), jnp.asarray(updates, jnp.float32)


@each_stage
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("update_dtype", ["float32", "low"])
def test_apply_updates_lands_on_a_neighbour(tx, dtype, update_dtype):
    """The new parameter is one of the two numbers around p + u, or p + u itself."""
    params, updates = hard_cases(dtype)
    updates = updates.astype(dtype) if update_dtype == "low" else updates
    emitted, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    assert emitted.dtype == jnp.float32
    with jax.numpy_dtype_promotion("standard"):
        new = optax.apply_updates(params, emitted)
    assert new.dtype == params.dtype
    with np.errstate(over="ignore"):
        exact = np.asarray(params, np.float32) + np.asarray(updates, np.float32)
    below = jnp.nextafter(new, jnp.full_like(new, -jnp.inf))
    above = jnp.nextafter(new, jnp.full_like(new, jnp.inf))
    inside = (wide(below) < exact) & (exact < wide(above))
    overflow = np.abs(exact) >= float(jnp.finfo(dtype).max)
    assert np.all(inside | (wide(new) == exact) | overflow)
    representable = wide(jnp.asarray(exact).astype(dtype)) == exact
    np.testing.assert_array_equal(wide(new)[representable], exact[representable])


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_that_xla_keeps_is_conversion(dtype):
    """To the bit, subnormal numbers, halves and infinity included."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    small = np.linspace(-(2.0**-13), 2.0**-13, 4097, dtype=np.float32)  # halves of float16's steps
    edges = np.float32([np.inf, -np.inf, 0.0, -0.0])
    x = np.concatenate([bits.view(np.float32), small, edges])
    x = jnp.asarray(x[x == x])
    chex.assert_trees_all_equal(_rounded(x, jnp.dtype(dtype)), x.astype(dtype))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("residual", ["bfloat16", "int8"])
def test_compensate_lands_on_the_nearest(dtype, residual):
    """Exactly: the first residual is zero, so the new parameter is p + u rounded to nearest."""
    params, updates = hard_cases(dtype)
    tx = adam_jax.compensate(residual)
    emitted, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    with jax.numpy_dtype_promotion("standard"):
        new = optax.apply_updates(params, emitted)
    nearest = (params.astype(jnp.float32) + updates).astype(dtype)
    np.testing.assert_array_equal(wide(new), wide(nearest))


@each_stage
@pytest.mark.parametrize("dtype", LOW)
def test_values_without_arithmetic(tx, dtype):
    """Zeros keep their sign, infinities stay, NaN is not hidden, an overflow is infinite."""
    largest = float(jnp.finfo(dtype).max)
    params = jnp.asarray([0.0, -0.0, np.inf, -np.inf, 1.0, 1.0, largest], dtype)
    updates = jnp.asarray([0.0, 0.0, 1.0, 1.0, np.nan, np.inf, largest], jnp.float32)
    emitted, _ = tx.update(updates, tx.init(params), params)
    with jax.numpy_dtype_promotion("standard"):
        new = optax.apply_updates(params, emitted)
    np.testing.assert_array_equal(wide(new), [0.0, -0.0, np.inf, -np.inf, np.nan, np.inf, np.inf])
    np.testing.assert_array_equal(np.signbit(wide(new))[:2], [False, True])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("update", [1e-3, -1e-3, 3e-5, 2e-3])
def test_stochastic_rounding_is_unbiased(dtype, update):
    """The mean over 10^6 draws is p + u within 4 standard errors."""
    params = jnp.ones(1_000_000, dtype)
    tx = adam_jax.round_stochastically(seed=0)
    emitted, _ = tx.update(jnp.full(params.shape, update), tx.init(params), params)
    with jax.numpy_dtype_promotion("standard"):
        new = wide(optax.apply_updates(params, emitted))
    error = new.std() / np.sqrt(new.size)
    assert new.std() > 0
    assert abs(new.mean() - (1 + np.float32(update))) <= 4 * error


def sum_of_small_updates(tx, dtype, steps=5000):
    """Where 1.0 is after many updates of random size around -1e-4, and where it should be."""
    rng = np.random.default_rng(0)
    updates = jnp.asarray(rng.uniform(-2e-4, 0, (steps, 64)), jnp.float32)
    params = jnp.full(64, 1.0, dtype)

    def step(carry, update):
        params, state = carry
        emitted, state = tx.update(update, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return (optax.apply_updates(params, emitted), state), None

    (params, _), _ = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), updates))()
    return wide(params), 1 + np.sum(wide(updates), axis=0)


@pytest.mark.parametrize("dtype", LOW)
def test_many_small_updates_are_not_lost(dtype):
    """Plain rounding in bfloat16 stays at 1.0; every stage arrives, compensation within an ulp."""
    plain, exact = sum_of_small_updates(optax.identity(), "bfloat16")
    np.testing.assert_array_equal(plain, 1.0)
    assert np.all(exact < 0.6)
    ulp = float(jnp.finfo(dtype).eps) / 2
    for name, tx in STAGES.items():
        arrived, exact = sum_of_small_updates(tx, dtype)
        if "compensate" in name:
            assert np.max(np.abs(arrived - exact)) <= 1.5 * ulp, name
        else:
            error = np.std(arrived - exact) / np.sqrt(arrived.size)
            assert abs(np.mean(arrived - exact)) <= 4 * error, name


@each_stage
def test_wide_parameters_pass_through(tx):
    """float32, float64 and complex leaves: the same updates, and no residual."""
    params = random_params() | {"complex": jnp.ones(2, "complex64"), "none": None}
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    chex.assert_trees_all_equal(updates, params)
    assert all(leaf.ndim == 0 or leaf.dtype == bool for leaf in jax.tree.leaves(state))


@each_stage
def test_a_model_that_is_not_filtered(tx):
    """As in Equinox: None among the gradients, and anything among the parameters."""
    arrays = {"w": jnp.ones(3, jnp.bfloat16), "wide": jnp.ones(2), "scale": None, "function": None}
    model = arrays | {"scale": 2.0, "function": jnp.tanh}
    expected, _ = tx.update(arrays, tx.init(arrays), arrays)
    updates, state = jax.jit(lambda u, s: tx.update(u, s, model))(arrays, tx.init(arrays))
    chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(arrays))


@pytest.mark.parametrize("residual", ["bfloat16", "int8"])
def test_a_residual_without_a_gradient(residual):
    tx = adam_jax.compensate(residual)
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    for name in params:
        with refused(ValueError, f"compensate state ['{name}']"):
            tx.update(params | {name: None}, tx.init(params), params)


@each_stage
def test_specs_of_the_parameters_fit_the_state(tx):
    """The common pattern with a tree of specs."""
    params = {"low": jnp.ones((64, 8), jnp.bfloat16), "wide": jnp.ones((3, 64))}
    specs = {"low": PartitionSpec("x"), "wide": PartitionSpec(None, "x")}
    state = optax.tree_map_params(tx, lambda x, spec: spec, tx.init(params), specs)
    for leaf in jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)):
        assert isinstance(leaf, PartitionSpec) or leaf.ndim == 0


@each_stage
def test_mixed_trees_masks_and_map_params(tx):
    params = {"low": jnp.ones(3, jnp.bfloat16), "wide": jnp.ones(3), "none": None}
    grads = {"low": jnp.full(3, 1e-3), "wide": jnp.full(3, 1e-3), "none": None}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["wide"], grads["wide"])
    masked = optax.masked(tx, {"low": False, "wide": True, "none": True})
    updates, _ = masked.update(grads, masked.init(params), params)
    chex.assert_trees_all_equal(updates, grads)
    low = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((2, 2), jnp.bfloat16)}
    zeroed = optax.tree.map_params(tx, jnp.zeros_like, tx.init(low))
    chex.assert_trees_all_equal(zeroed, tx.init(low))


@pytest.mark.parametrize("name", ["round_stochastically", "compensate int8"])
def test_at_the_end_of_an_optimizer(name):
    """It survives jit, scan and eight devices with the same numbers."""
    params = {"w": jnp.ones((16, 4), jnp.bfloat16), "b": jnp.zeros(8, jnp.bfloat16)}
    optimizer = optax.chain(adam_jax.lion(1e-3), STAGES[name])
    rng = np.random.default_rng(0)
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)] * 3

    step = jax.jit(plain_step(optimizer))

    def trained(params, grads):
        state = optimizer.init(params)
        for g in grads:
            params, state = step(params, state, g)
        return params

    expected = trained(params, grads)
    assert jnp.any(expected["w"] != params["w"])
    cpus = np.array(jax.devices("cpu"))
    sharding = NamedSharding(Mesh(cpus, ("data",)), PartitionSpec("data"))
    chex.assert_trees_all_equal(
        jax.device_get(trained(*jax.device_put((params, grads), sharding))),
        jax.device_get(expected),
    )
    (scanned, _), _ = jax.lax.scan(
        lambda carry, g: (step(*carry, g), None),
        (params, optimizer.init(params)),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads),
    )
    chex.assert_trees_all_equal(scanned, expected)


def test_seeds_and_leaves_differ_and_runs_do_not():
    params = {name: jnp.ones(1000, jnp.bfloat16) for name in "ab"}
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 2e-3), params)

    def first(seed):
        tx = adam_jax.round_stochastically(seed)
        updates, state = tx.update(grads, tx.init(params), params)
        return updates, tx.update(grads, state, params)[0]

    (one, second), (again, _), (other, _) = first(0), first(0), first(1)
    chex.assert_trees_all_equal(one, again)
    assert jnp.any(one["a"] != one["b"])
    assert jnp.any(one["a"] != other["a"])
    assert jnp.any(one["a"] != second["a"])


@each_stage
@pytest.mark.parametrize("dtype", LOW)
def test_finite_numbers_pass_the_debug_switches(tx, dtype):
    """Zeros too: no infinity or NaN on the way."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=32), dtype).at[:4].set(0)
    updates = jnp.asarray(1e-3 * rng.normal(size=32), jnp.float32)
    with jax.debug_infs(True), jax.debug_nans(True):
        emitted, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    assert np.all(np.isfinite(emitted))


@each_stage
def test_eight_bits_are_refused(tx):
    """By `init`, which names the leaf."""
    params = {"a": {"w": jnp.ones(3, "float8_e4m3fn"), "b": jnp.ones(3, "bfloat16")}}
    with refused(TypeError, "['a']['w'] float8_e4m3fn"):
        tx.init(params)
    tx.init({"a": {"b": params["a"]["b"]}})


@each_stage
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("update", "names"),
    [
        (jnp.ones(4), "['w'] (3,) (4,)"),
        (jnp.ones(1), "['w'] (3,) (1,)"),
        (jnp.ones(()), "['w'] (3,) ()"),
        (jnp.ones(3, "complex64"), "['w'] real (3,) complex"),
        ("missing", "['w'] (3,) nothing"),
        ("one more", "['c'] nothing (1,)"),
    ],
)
def test_updates_of_another_shape(tx, dtype, update, names):
    params = {"w": jnp.ones(3, dtype), "b": jnp.ones(2)}
    updates = {"w": update, "b": jnp.ones(2)}
    if isinstance(update, str):
        updates.pop("w")
        updates |= {} if update == "missing" else {"w": jnp.ones(3), "c": jnp.ones(1)}
    stage = "compensate" if "residual" in tx.init(params)._fields else "round_stochastically"
    with refused(ValueError, f"{stage} gradients {names}"):
        tx.update(updates, tx.init(params), params)


@pytest.mark.parametrize("residual", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("was", "now"),
    [
        (jnp.ones(1, "bfloat16"), jnp.ones(3, "bfloat16")),
        (jnp.ones(4, "bfloat16"), jnp.ones(3, "bfloat16")),
        (jnp.ones(3), jnp.ones(3, "bfloat16")),
        (jnp.ones(3, "bfloat16"), jnp.ones(3)),
    ],
    ids=["one", "four", "wide before", "wide now"],
)
def test_the_residual_of_other_parameters(residual, was, now):
    """It would be added to all of them, or, where there is none, the rounding left out."""
    tx = adam_jax.compensate(residual)
    with refused(ValueError, f"compensate state ['w'] {now.dtype} (3,)"):
        tx.update({"w": jnp.ones(3)}, tx.init({"w": was}), {"w": now})


def moments_then(stage):
    tx = optax.chain(adam_jax.scale_by_moments(), stage)
    return lambda: tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: adam_jax.compensate("int4"), ValueError, "residual 'int4'"),
        (lambda: adam_jax.round_stochastically(1.5), TypeError, "seed integer 1.5"),
        (lambda: adam_jax.round_stochastically(True), TypeError, "seed integer True"),
        (
            lambda: adam_jax.compensate().update(jnp.ones(1), adam_jax.CompensateState(None)),
            ValueError,
            "compensate params update()",
        ),
        (
            lambda: adam_jax.round_stochastically().update(jnp.ones(1), None),
            ValueError,
            "round_stochastically params update()",
        ),
        (moments_then(adam_jax.round_stochastically()), TypeError, "round_stochastically Moments"),
        (moments_then(adam_jax.compensate()), TypeError, "compensate Moments"),
    ],
)
def test_wrong_calls(call, error, names):
    with refused(error, names):
        call()
