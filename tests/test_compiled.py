"""What XLA makes of a step: kernels, bytes, temporaries, recompilations, other platforms."""

import math
import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import memory
import optax
import pytest
import step as benchmark
from jax import export
from support import assert_close, random_params, user_jit

import adam_jax

SHAPES = {"kernel": (256, 300), "bias": (300,), "head": (300, 10)}
PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
LARGEST = 256 * 300 * 4  # bytes
SCHEDULE = optax.cosine_decay_schedule(1e-3, 100)

# What a step costs besides optax's, however many leaves there are: the state keeps a small array of
# weights, so that a rate may become a schedule in the middle of a job, and a constant learning rate
# counts. (Measured with jax 0.10.2: 1 kernel, 236 bytes, 110 instructions.)
SCALARS = {"kernels": 3, "bytes": 260, "instructions": 120}

# And for every leaf: the correction reads the weights instead of the count. (0, 4, 7)
EACH_LEAF = {"kernels": 0, "bytes": 8, "instructions": 8}

# Kernels that a step has for its scalars in all. (11)
SCALAR_KERNELS = 14


def compiled_step(tx, donate=True, params=PARAMS):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    donated = (0, 1) if donate else ()
    state = jax.eval_shape(tx.init, params)
    with jax.numpy_dtype_promotion("standard"):
        return user_jit(step, donate_argnums=donated).lower(params, state, params).compile()


def costs(tx, donate=True, params=PARAMS):
    """Kernels, bytes moved, and instructions, which XLA's own time grows with."""
    compiled = compiled_step(tx, donate, params)
    instructions = re.findall(r"^ +(?:ROOT )?%\S+ = ", compiled.as_text(), re.MULTILINE)
    return {
        "kernels": benchmark.kernels(compiled),
        "bytes": compiled.cost_analysis()["bytes accessed"],
        "instructions": len(instructions),
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
    for what, most in SCALARS.items():
        assert 0 < ours[what] <= theirs[what] + most + len(PARAMS) * EACH_LEAF[what], what


@each_pair
def test_the_cost_of_a_leaf_is_that_of_optax(pair):
    """What the scalars cost does not grow: the second half of a tree costs what it costs optax."""
    twice = PARAMS | {f"{name} again": shape for name, shape in PARAMS.items()}
    ours, theirs = (
        [costs(factory(1e-3), params=params) for params in (PARAMS, twice)] for factory in pair
    )
    for what, most in EACH_LEAF.items():
        more, their_more = (two[what] - one[what] for one, two in (ours, theirs))
        assert more <= their_more + len(PARAMS) * most, what


# The traced equations of update and apply, for every leaf and besides (optax's adam has 16 and 10):
# a leaf calls what was traced for the first one of its shape. jax 0.7 writes eight more besides.
EQUATIONS = {"adam": (4, 153), "adamw": (5, 155), "nadam": (5, 158), "nadamw": (6, 160)}


@pytest.mark.parametrize("name", EQUATIONS)
def test_equations_grow_with_the_leaves_only(name):
    tx = getattr(adam_jax, name)(1e-3)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def equations(leaves):
        params = [jnp.ones((8, 8))] * leaves
        return benchmark.equations(jax.make_jaxpr(step)(params, tx.init(params), params).jaxpr)

    few, many, more = (equations(leaves) for leaves in (10, 20, 40))
    assert more - many == 2 * (many - few)
    each, besides = EQUATIONS[name]
    assert many - few <= 10 * each
    assert few - (many - few) <= besides


@each_pair
def test_donation_leaves_no_copy(pair):
    """Parameters and state are updated in place, with no temporary of the size of a parameter."""
    ours = compiled_step(pair[0](1e-3))
    params_and_state = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves([PARAMS, jax.eval_shape(pair[0](1e-3).init, PARAMS)])
    )
    memory = ours.memory_analysis()
    assert memory.alias_size_in_bytes == params_and_state
    assert memory.temp_size_in_bytes < LARGEST / 100


RULES = [adam_jax.squared, adam_jax.belief, adam_jax.rules.yogi]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("b1", [0.9, None, lambda count: 0.9], ids=["number", "none", "schedule"])
def test_recomputed_moments_are_the_same(rule, b1, x64):
    def chain(recompute):
        moments = adam_jax.scale_by_moments(b1, second_moment=rule)
        moments = benchmark.recompute(moments) if recompute else moments
        return optax.chain(moments, adam_jax.bias_correct(), adam_jax.scale_by_lr(1e-2))

    grads = jax.tree.map(lambda x: x.astype(jnp.float64), random_params())
    results = []
    for tx in (chain(False), chain(True)):
        update, state = jax.jit(tx.update), tx.init(grads)
        for _ in range(3):
            updates, state = update(grads, state)
        results.append((updates, state))
    assert_close(*results, "fused")


ONE_KERNEL = """
import step as benchmark
shapes = [(512, 300), (300, 4)]
side = benchmark.jax_side("recompute", shapes, "float32", donate=True)
facts = [side.facts[fact] for fact in ("kernels", "bytes", "temporaries")]
print(*facts)
"""


def test_recompute_and_its_flag_make_one_kernel_of_a_leaf():
    """28 bytes a parameter: read g, m, v, p, write m, v, p; the few scalars come on top."""
    flag = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", ONE_KERNEL],
        env={**os.environ, "XLA_FLAGS": flag, "PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kernels, moved, temporaries = map(float, done.stdout.split())
    assert kernels <= 2 + SCALAR_KERNELS
    assert moved < 28.01
    assert temporaries < 0.01


# What a step with donation may need besides, in bytes per parameter: a copy of what is stored,
# since XLA's CPU backend reads the old moment in two kernels and overwrites it in one; with a
# residual also copies of it and of the weights, and the update and the spacing in bfloat16: 8 bytes
# for one leaf, and a half for maxima; of many, what is alive at one time the scheduler decides.
STORED_COPIES = {
    "float32": 0.1,
    "bfloat16, to nearest": 4.1,
    "bfloat16, at random": 4.0,
    "8-bit": 2.4,
    "4-bit": 1.3,
    "8-bit m, factored v": 2.1,
    "8-bit m, block-mean v": 1.6,
    "float32, no rounding stage": 0.1,
    "float32, round_stochastically": 0.1,
    "float32, compensate bfloat16": 6.5,
    "8-bit, compensate int8": 9.0,
    "8-bit m, factored v, compensate int8": 9.0,
}


@pytest.mark.parametrize("choice", memory.CHOICES, ids=lambda choice: choice.name)
def test_no_temporary_is_a_float32_moment(choice):
    """No kernel writes a leaf in float32 but the weights and moments."""
    shapes = memory.gpt2(layers=1, width=256, vocabulary=512, context=256)
    weights = memory.in_dtype(choice.weights, shapes)
    with jax.numpy_dtype_promotion("standard"):
        compiled = memory.compiled_step(choice, weights)
    temporaries = compiled.memory_analysis().temp_size_in_bytes / memory.size(weights)
    assert temporaries < STORED_COPIES[choice.name]
    # With compensate some versions of XLA write the exact parameter of a leaf out, for CPUs.
    written_out = 0
    most = 1 if "compensate" in choice.name and not 10 <= jax.__version_info__[1] < 12 else 0
    entry = compiled.as_text().split("ENTRY")[1]
    outputs = re.findall(r"%[\w.\-]+", re.search(r"ROOT .*", entry).group())
    for name, lengths, operation in re.findall(
        r"(%[\w.\-]+) = f32\[([\d,]+)\]\S* ([\w\-]+)\(", entry
    ):
        if operation not in ("parameter", "bitcast") and name not in outputs:
            written_out += math.prod(map(int, lengths.split(","))) >= 256 * 256
    assert written_out <= most * len(jax.tree.leaves(weights))


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "nadamw"])
@pytest.mark.parametrize(
    "b1", [0.9, jnp.float32(0.9), lambda count: 0.9], ids=["number", "array", "schedule"]
)
def test_the_second_update_does_not_recompile(name, b1):
    tx = getattr(adam_jax, name)(1e-3, b1=b1)
    params = random_params()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

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

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jax.tree.leaves((optax.apply_updates(params, updates), state))

    arguments = (params, tx.init(params), params)
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    flat, tree = jax.tree.flatten(described)
    exported = export.export(
        jax.jit(lambda *leaves: step(*jax.tree.unflatten(tree, leaves))),
        platforms=["cpu", "cuda", "tpu"],
    )(*flat)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    restored = export.deserialize(exported.serialize())
    chex.assert_trees_all_equal(restored.call(*jax.tree.leaves(arguments)), step(*arguments))


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
