"""What XLA makes of a step: kernels, bytes, temporaries, recompilations, other platforms."""

import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export
from support import nbytes, plain_step, random_params, user_jit

import adam_jax

SHAPES = {"kernel": (256, 300), "bias": (300,), "head": (300, 10)}
PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
LARGEST = 256 * 300 * 4  # bytes
SCHEDULE = optax.cosine_decay_schedule(1e-3, 100)

# What a step may cost more than optax's, once and for every leaf; behind it what jax 0.10.2 makes.
# Once: the state keeps a small array of weights, so that a rate may become a schedule in the middle
# of a job, and a constant learning rate counts its steps. A leaf reads the weights, not the count.
MORE_THAN_OPTAX = {
    "kernels": (3, 0),  # 1, 0
    "bytes": (260, 8),  # 236, 4
    "instructions": (120, 8),  # 110, 7
}
# The equations that are traced for update and apply, once and for every leaf, which calls what was
# traced for the first leaf of its shape. These are jax 0.7.1's, which traces 10 more than 0.10.2,
# and optax's adam has 10 and 16.
EQUATIONS = {"adam": (154, 4), "adamw": (156, 5), "nadam": (159, 5), "nadamw": (161, 6)}

FREE = {"parameter", "tuple", "bitcast", "constant", "get-tuple-element"}  # they do no work


def compiled_step(tx, donate=True, params=PARAMS):
    step = user_jit(plain_step(tx), donate_argnums=(0, 1) if donate else ())
    with jax.numpy_dtype_promotion("standard"):
        return step.lower(params, jax.eval_shape(tx.init, params), params).compile()


def costs(tx, donate=True, params=PARAMS):
    """Kernels, bytes moved, and instructions, which XLA's own time grows with."""
    compiled = compiled_step(tx, donate, params)
    text = compiled.as_text()
    operations = re.findall(r"= (?:\([^=]*\)|\S+) ([a-z\-]+)\(", text.split("ENTRY")[1])
    return {
        "kernels": sum(operation not in FREE for operation in operations),
        "bytes": compiled.cost_analysis()["bytes accessed"],
        "instructions": len(re.findall(r"^ +(?:ROOT )?%\S+ = ", text, re.MULTILINE)),
    }


PAIRS = {
    name: (getattr(adam_jax, name), getattr(optax, name))
    for name in ("adam", "adamw", "nadam", "nadamw")
}
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())


@each_pair
@pytest.mark.parametrize(
    ("donate", "rate"),
    [(True, 1e-3), (True, SCHEDULE), (False, 1e-3)],
    ids=["donated", "donated, schedule", "kept"],
)
def test_the_cost_is_that_of_optax_and_a_few_scalars(pair, donate, rate):
    ours, theirs = (costs(factory(rate), donate) for factory in pair)
    for what, (once, each) in MORE_THAN_OPTAX.items():
        assert 0 < ours[what] <= theirs[what] + once + len(PARAMS) * each, what


@each_pair
def test_the_cost_of_a_leaf_is_that_of_optax(pair):
    """What the scalars cost does not grow: the second half of a tree costs what it costs optax."""
    twice = PARAMS | {f"{name} again": shape for name, shape in PARAMS.items()}
    ours, theirs = (
        [costs(factory(1e-3), params=params) for params in (PARAMS, twice)] for factory in pair
    )
    for what, (_, each) in MORE_THAN_OPTAX.items():
        more, their_more = (two[what] - one[what] for one, two in (ours, theirs))
        assert more <= their_more + len(PARAMS) * each, what


@pytest.mark.parametrize("name", EQUATIONS)
def test_equations_grow_with_the_leaves_only(name):
    """Those of a function that several leaves call are written once."""
    tx = getattr(adam_jax, name)(1e-3)

    def equations(leaves):
        params = [jnp.ones((8, 8))] * leaves
        jaxpr = jax.make_jaxpr(plain_step(tx))(params, tx.init(params), params)
        return len(re.findall(r" = \w", str(jaxpr)))

    few, many, more = (equations(leaves) for leaves in (10, 20, 40))
    assert more - many == 2 * (many - few)
    once, each = EQUATIONS[name]
    assert many - few <= 10 * each
    assert few - (many - few) <= once


@each_pair
def test_donation_leaves_no_copy(pair):
    """Parameters and state are updated in place, with no temporary of the size of a parameter."""
    ours = compiled_step(pair[0](1e-3))
    state = jax.eval_shape(pair[0](1e-3).init, PARAMS)
    memory = ours.memory_analysis()
    assert memory.alias_size_in_bytes == nbytes((PARAMS, state))
    assert memory.temp_size_in_bytes < LARGEST / 100


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "nadamw"])
@pytest.mark.parametrize(
    "b1", [0.9, jnp.float32(0.9), lambda count: 0.9], ids=["number", "array", "schedule"]
)
def test_the_second_update_does_not_recompile(name, b1):
    tx = getattr(adam_jax, name)(1e-3, b1=b1)
    params = random_params()
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(plain_step(tx), n=1))
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state, params)


def test_init_under_jit_is_init():
    tx, params = adam_jax.adamw(1e-3), random_params()
    chex.assert_trees_all_equal(jax.jit(tx.init)(params), tx.init(params))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("adam", "float32"), ("adamw", "bfloat16"), ("nadam", "bfloat16"), ("nadamw", "float32")],
)
def test_export_for_cpu_cuda_and_tpu(name, dtype):
    """Lowered for all three, serialised, deserialised, and run on this machine's platform."""
    tx, params = getattr(adam_jax, name)(1e-3), random_params(dtype)
    arguments, structure = jax.tree.flatten((params, tx.init(params), params))
    step = jax.jit(lambda *leaves: jax.tree.leaves(plain_step(tx)(*structure.unflatten(leaves))))
    exported = export.export(step, platforms=["cpu", "cuda", "tpu"])(*arguments)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    restored = export.deserialize(exported.serialize())
    chex.assert_trees_all_equal(restored.call(*arguments), step(*arguments))


def test_no_callback_and_no_loop_in_the_step():
    """Pure arithmetic: nothing leaves the device, whatever the rates are."""
    tx = adam_jax.adamw(SCHEDULE, b1=lambda count: 0.9)
    with jax.numpy_dtype_promotion("standard"):
        text = jax.jit(tx.update).lower(PARAMS, jax.eval_shape(tx.init, PARAMS), PARAMS).as_text()
    assert "custom_call" not in text
    assert "while" not in text


class TestVariants(chex.TestCase):
    """The same numbers however the step is run: chex's variants, on the default device."""

    @chex.all_variants(with_pmap=False)
    def test_adam(self):
        tx, params = adam_jax.adam(1e-2), random_params()
        state = tx.init(params)
        for _ in range(3):
            updates, state = self.variant(tx.update)(params, state)
        expected = jax.tree.map(lambda p: -1e-2 * jnp.sign(p), params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4)
