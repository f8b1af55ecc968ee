"""What users do with a state: reset it, cast it, edit it, take it to x64, make it by hand."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from support import assert_close, mesh_of, refused
from tables import MEMBERS, keeping

import adam_jax

NOT_FROM_ZERO = {"adagrad", "yogi"}  # their moments start at 0.1 and at 1e-6
STORED = {
    "as computed": keeping(),
    "8 bits": keeping("int8"),
    "bfloat16": keeping("bfloat16", "stochastic"),
    "factored": keeping("factored"),
}
CASES = {
    f"{name}, {kept}": (name, {k: v for k, v in options.items() if k in parameters})
    for name, member in MEMBERS.items()
    for parameters in [inspect.signature(member).parameters]
    for kept, options in STORED.items()
    if not options or options.keys() & parameters.keys()
}
each_case = pytest.mark.parametrize("case", CASES)


def normal(seed):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (64, 80), "bias": (5,), "scale": ()}
    return {name: jnp.asarray(rng.normal(size=s), "float32") for name, s in shapes.items()}


pytestmark = pytest.mark.usefixtures(
    "promoting"
)  # optax's own arithmetic is not strict about dtypes

PARAMS, GRADS = normal(0), [normal(seed) for seed in range(1, 4)]


def made(case):
    name, options = CASES[case]
    return MEMBERS[name](0.01, **options)


def run(tx, state, wrap=jax.jit):
    update, updates = wrap(tx.update), []
    for grads in GRADS:
        new, state = update(grads, state, PARAMS)
        updates.append(new)
    return updates, state


# --- All zeros are a fresh state ------------------------------------------------------------------


@each_case
def test_zeros_are_a_fresh_state(case):
    """Law 9."""
    tx = made(case)
    fresh, state = run(tx, tx.init(PARAMS))
    again, _ = run(tx, jax.tree.map(jnp.zeros_like, state))
    if CASES[case][0] in NOT_FROM_ZERO:
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(again, fresh)
    else:
        chex.assert_trees_all_equal(again, fresh)


WRAPPED = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, {"kernel": True, "bias": True, "scale": False}),
    "lazy": adam_jax.lazy,
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": adam_jax.sgd(0.1)}, {"kernel": "a", "bias": "a", "scale": "b"}
    ),
}
RATES = {
    "numbers": (0.9, 0.999),
    "schedules": (
        optax.linear_schedule(0.5, 0.99, 5),
        lambda count: 1 - 1 / (count.astype(float) + 2),
    ),
}


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize("wrap", WRAPPED)
def test_zeros_are_a_fresh_state_inside_wrappers(wrap, rates):
    tx = WRAPPED[wrap](adam_jax.nadamw(optax.linear_schedule(0.1, 0.0, 9), *rates))
    fresh, state = run(tx, tx.init(PARAMS))
    zeros = jax.tree.map(jnp.zeros_like, state)
    chex.assert_trees_all_equal(run(tx, zeros)[0], fresh)


@pytest.mark.parametrize("wrap", [jax.jit, lambda update: update], ids=["jit", "eager"])
def test_a_count_of_zero_starts_the_weights_anew(wrap):
    """As in optax, whether the moments are kept (Adam-Rel) or set to zero."""
    params = jnp.ones(3)
    for kept in ({}, {"mu": jnp.zeros(3), "nu": jnp.zeros(3)}):
        updates = []
        for package in (adam_jax, optax):
            tx = package.adam(0.01)
            state, update = tx.init(params), wrap(tx.update)
            for step in range(50):
                _, state = update(jnp.full(3, 0.1 * step), state, params)
            state = optax.tree.set(state, count=jnp.zeros([], jnp.int32), **kept)
            updates.append(update(jnp.ones(3), state, params)[0])
        assert_close(*updates, "contracted")


def test_python_numbers_stand_for_moments():
    """`optax.tree.set(state, mu=0)` leaves them, where the parameters are one array."""
    updates = []
    for package in (adam_jax, optax):
        tx = package.adam(0.01)
        state = optax.tree.set(tx.init(jnp.ones(3)), mu=0, nu=0.0, count=0)
        updates.append(jax.jit(tx.update)(jnp.full(3, 0.3), state)[0])
    assert_close(*updates, "contracted")


def test_an_edited_count_moves_every_schedule():
    """A warm restart through every field `count`, and Python numbers for arrays."""
    schedule = optax.cosine_decay_schedule(0.01, 1000)
    updates = []
    for package in (adam_jax, optax):
        tx = package.adamw(schedule)
        state = optax.tree.set(tx.init(PARAMS), count=900)
        updates.append(jax.jit(tx.update)(GRADS[0], state, PARAMS)[0])
    assert_close(*updates, "contracted")


def test_a_state_of_shapes_is_refused():
    """From `eval_shape`, with what optax's state has filled in."""
    tx = adam_jax.adam(0.01)
    state = jax.eval_shape(tx.init, PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = optax.tree.set(state, mu=zeros, nu=zeros, count=jnp.zeros([], jnp.int32))
    with refused(ValueError, "scale_by_moments weights init()"):
        tx.update(GRADS[0], state, PARAMS)
    weights = jnp.zeros(state[0].weights.shape)
    updates, _ = tx.update(GRADS[0], optax.tree.set(state, weights=weights), PARAMS)
    chex.assert_trees_all_equal(updates, tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0])


# --- Whatever a state was cast to -----------------------------------------------------------------


def cast(state, dtype):
    low = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return jax.tree.map(low, state)


@each_case
def test_a_cast_state_goes_on(case):
    """In the dtypes of the state, and within what the cast rounded."""
    tx = made(case)
    _, state = run(tx, tx.init(PARAMS))
    exact, later = run(tx, state)
    updates, cast_later = run(tx, cast(state, jnp.bfloat16))
    chex.assert_trees_all_equal_shapes_and_dtypes(cast_later, later)
    if CASES[case][0] != "lion":  # whose sign may be the other one
        chex.assert_trees_all_close(updates, exact, atol=0.04 * 0.01 * 10, rtol=0.04)


def test_a_bfloat16_moment_is_not_kept():
    """The storage decides what is kept: a bfloat16 v under b2 = 0.999 would never move again."""
    tx = adam_jax.adam(0.01)
    state = tx.init(PARAMS)
    low = jax.tree.map(lambda nu: nu.astype(jnp.bfloat16), state[0].nu)
    _, state = run(tx, (state[0]._replace(nu=low), *state[1:]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].nu)} == {jnp.dtype("float32")}


def test_all_of_a_state_in_bfloat16():
    """Counts too, as `jax.tree.map(lambda x: x.astype(...), state)` makes them."""
    tx = adam_jax.adam(0.01)
    _, state = run(tx, tx.init(PARAMS))
    exact, _ = run(tx, state)
    updates, later = run(tx, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    chex.assert_trees_all_close(updates, exact, atol=4e-4, rtol=0.04)
    assert later[0].count.dtype == later[-1].count.dtype == jnp.int32
    assert later[0].count == 6


@pytest.mark.parametrize("name", MEMBERS)
def test_a_state_without_x64_goes_on_under_it(name):
    """In scan and in lax.cond too, which ask for the same dtypes after a step."""
    tx = MEMBERS[name](optax.linear_schedule(0.1, 0.0, 9))
    wrapped = optax.apply_if_finite(tx, 3)
    state, outer = tx.init(PARAMS), wrapped.init(PARAMS)
    jax.config.update("jax_enable_x64", True)
    try:
        grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADS)
        step = lambda state, grads: tx.update(grads, state, PARAMS)[::-1]  # noqa: E731
        later, updates = jax.lax.scan(step, state, grads)
        chex.assert_trees_all_equal_shapes_and_dtypes(later, state)
        _, outer = jax.jit(wrapped.update)(GRADS[0], outer, PARAMS)
    finally:
        jax.config.update("jax_enable_x64", False)
    expected, _ = run(tx, state)
    assert_close(updates, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected), "contracted")


# --- What sets the moments to zero ----------------------------------------------------------------

ZEROED = {
    "freeze": optax.freeze(True),
    "set_to_zero": optax.set_to_zero(),
    "partition": optax.partition(
        {"on": optax.identity(), "off": optax.set_to_zero()},
        {"kernel": "off", "bias": "off", "scale": "off"},
    ),
}


@pytest.mark.parametrize("wrap", [jax.jit, lambda update: update], ids=["jit", "eager"])
@pytest.mark.parametrize("name", ZEROED)
def test_moments_that_are_set_to_zero_are_an_update_of_zero(name, wrap):
    for last in (adam_jax.bias_correct(), adam_jax.rectify(), adam_jax.atan2()):
        tx = optax.chain(adam_jax.scale_by_moments(), ZEROED[name], last)
        updates, _ = wrap(tx.update)(GRADS[0], tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))


def test_several_steps_around_the_first_stage_alone():
    """`MultiSteps` gives zeros in between, and every second time the direction of the mean."""
    moments = optax.MultiSteps(adam_jax.scale_by_moments(), 2).gradient_transformation()
    tx = optax.chain(moments, adam_jax.bias_correct())
    if optax.__version__ == "0.2.7":  # which asks a leaf of the parameters' tree for its dtype
        with pytest.raises(AttributeError, match="dtype"):
            tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
        return
    between, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(between, jax.tree.map(jnp.zeros_like, PARAMS))
    updates, _ = tx.update(GRADS[1], state, PARAMS)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[:2])
    chex.assert_trees_all_close(updates, jax.tree.map(jnp.sign, mean), rtol=1e-4)  # but for eps


# --- A part of a state starts anew ----------------------------------------------------------------


def test_a_group_starts_anew():
    """The groups of `optax.partition` have states of their own, and zeros are a fresh one."""
    tx = optax.partition(
        {"old": adam_jax.adamw(0.01), "new": adam_jax.adamw(0.01)},
        {"kernel": "old", "bias": "new", "scale": "old"},
    )
    _, state = run(tx, tx.init(PARAMS))
    expected, _ = run(tx, state)
    zeros = jax.tree.map(jnp.zeros_like, state.inner_states["new"])
    updates, _ = run(tx, state._replace(inner_states=state.inner_states | {"new": zeros}))
    fresh, _ = run(tx, tx.init(PARAMS))
    for step in range(3):
        chex.assert_trees_all_equal(updates[step]["kernel"], expected[step]["kernel"])
        chex.assert_trees_all_equal(updates[step]["bias"], fresh[step]["bias"])


def test_rows_start_anew():
    """With a state for each row, by `jax.vmap`, the weights of a row can start anew too."""
    tx = adam_jax.adam(0.01)
    init, update = jax.vmap(tx.init), jax.jit(jax.vmap(tx.update))
    table = PARAMS["kernel"]
    state = init(table)
    for grads in GRADS:
        _, state = update(grads["kernel"], state, table)
    restarted = jnp.arange(len(table)) == 3
    row_of = lambda leaf: restarted.reshape(-1, *[1] * (leaf.ndim - 1))  # noqa: E731
    state = jax.tree.map(lambda leaf: jnp.where(row_of(leaf), 0, leaf), state)
    updates, _ = update(GRADS[0]["kernel"], state, table)
    fresh, _ = update(GRADS[0]["kernel"], init(table), table)
    chex.assert_trees_all_equal(updates[3], fresh[3])
    assert not np.allclose(updates[2], fresh[2])


# --- Inside jax.shard_map -------------------------------------------------------------------------

ON_SHARDS = {
    "cautious": adam_jax.cautious_adamw(0.01),
    "trust ratio": adam_jax.lamb(0.01),
}


@pytest.mark.parametrize("name", ON_SHARDS)
def test_sums_over_a_leaf_are_over_all_its_shards(name):
    tx, mesh = ON_SHARDS[name], mesh_of("auto", x=8)
    state = tx.init(PARAMS["kernel"])
    grads = [g["kernel"] for g in GRADS]
    rows = PartitionSpec("x")
    specs = jax.tree.map(lambda leaf: rows if leaf.shape == (64, 80) else PartitionSpec(), state)
    update = jax.jit(
        jax.shard_map(tx.update, mesh=mesh, in_specs=(rows, specs, rows), out_specs=(rows, specs))
    )
    alone = state
    for grad in grads:
        updates, state = update(grad, state, PARAMS["kernel"])
        expected, alone = jax.jit(tx.update)(grad, alone, PARAMS["kernel"])
        assert_close(updates, expected, "contracted")
    untyped = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(rows, specs, rows), out_specs=(rows, specs), check_vma=False
    )
    with pytest.raises(ValueError, match="check_vma=True"):
        jax.jit(untyped)(grads[0], state, PARAMS["kernel"])


def test_shards_draw_bits_of_their_own():
    tx, mesh = adam_jax.round_stochastically(), mesh_of("auto", x=8)
    params = jnp.ones((8, 256), jnp.bfloat16)
    rows = PartitionSpec("x")
    update = jax.shard_map(
        lambda u, p: tx.update(u, tx.init(p), p)[0],
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=rows,
    )
    updates = np.asarray(jax.jit(update)(jnp.full((8, 256), -1e-3), params))
    assert len({row.tobytes() for row in updates}) == 8
