"""Fused steps: the kernels, in Pallas's interpreters, against the plain chain.

`python tests/test_fusion.py cuda` runs the kernels of a platform beside the chains, once.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from functools import partial
from operator import itemgetter
from unittest import mock

import chains
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from flax import nnx
from jax import export
from jax.experimental.pallas import tpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir
from support import assert_close, matrices_only, mesh_of, plain_step, stack, user_jit
from tables import keeping

import adam_jax
from adam_jax import fusion, storage
from adam_jax.fusion import _jax, _mosaic_gpu
from adam_jax.fusion._emitters import emitter_for
from adam_jax.fusion._graph import ELEMENTWISE
from adam_jax.fusion._mosaic_gpu import MosaicGpu
from adam_jax.fusion._pallas_call import Tpu, Triton
from adam_jax.fusion._shards import launch_on_shards

INT8, INT4 = storage.int8(), storage.int4()


# The emitters of this jax.
ON = {platform: emitter_for(platform) for platform in ("cuda", "tpu")}
BY_MOSAIC_GPU = isinstance(ON["cuda"], MosaicGpu)


def simulated(platform):
    """The emitter of a platform, whose kernels a CPU interprets."""
    if platform == "cuda" and BY_MOSAIC_GPU:
        how = _jax.backend("mosaic_gpu").InterpretGPUParams()
        return dataclasses.replace(ON[platform], interpret=how)
    return dataclasses.replace(ON[platform], interpret=True)


@contextlib.contextmanager
def interpret(platform, emitter=None):
    """What is lowered for this machine's CPU runs the kernels of a platform, which are yielded."""
    emitter = emitter or simulated(platform)
    kernels, launch = [], type(emitter).launch

    def noted(self, kernel, *rest):
        kernels.append(kernel)
        return launch(self, kernel, *rest)

    def directly(*arrays, program):
        return program.run(emitter, partial(launch_on_shards, emitter), arrays)

    with contextlib.ExitStack() as contexts:
        contexts.enter_context(mock.patch.object(type(emitter), "launch", noted))
        # A warpgroup that waits for another one holds one of XLA's few threads.
        contexts.enter_context(mock.patch.object(_mosaic_gpu, "WARPGROUPS", 2))
        contexts.enter_context(mock.patch.object(fusion, "emitter_for", return_value=emitter))
        if emitter.interpret is not True:
            # It calls Python in order, which JAX does not allow within another equation.
            contexts.enter_context(mock.patch.object(fusion._fused_p, "bind", directly))
        yield kernels


@pytest.fixture
def interpreted():
    with contextlib.ExitStack() as contexts:
        yield lambda platform: contexts.enter_context(interpret(platform))


each_platform = pytest.mark.parametrize("platform", ["cuda", "tpu"])


def random_tree(shapes, dtype, rng, size=1.0):
    make = lambda shape: jnp.asarray(rng.normal(size=shape) * size, dtype)  # noqa: E731
    return {name: make(shape) for name, shape in shapes.items()}


# --- Every member, storage and rounding -----------------------------------------------------------

GLOBAL = [name for name, stage in tables.STAGES.items() if not stage.local]


def is_local(member):
    return not any(stage.startswith(tuple(GLOBAL)) for stage in chains.stages(member))


MEMBERS = {
    **{name: make for name, make in tables.MEMBERS.items() if is_local(name)},
    "rmsprop, centered": partial(adam_jax.rmsprop, centered=True, momentum=0.9),
    "adam, schedules": lambda rate: adam_jax.adam(
        optax.linear_schedule(rate, 0.0, 30), b1=lambda count: 0.9 - 0.1 / (count + 1.0)
    ),
    "injected": optax.inject_hyperparams(adam_jax.adam, hyperparam_dtype=jnp.float32),
}
STORAGES = {
    "bfloat16": keeping("cast"),
    "stochastic": keeping("stochastic"),
    "8 bits": keeping("int8"),
    "4 bits": keeping("int4"),
    "4 and 8 bits": keeping("int4", "int8"),
    "blocks of 128": keeping(storage.int8(block=128)),
}
ROUNDINGS = {
    "none": [],
    "stochastic": [adam_jax.round_stochastically()],
    "bfloat16": [adam_jax.compensate("bfloat16")],
    "8 bits": [adam_jax.compensate("int8")],
}
CASES = {
    **{name: (member(1e-2), "float32") for name, member in MEMBERS.items()},
    **{f"adamw, {k}": (adam_jax.adamw(1e-2, **how), "float32") for k, how in STORAGES.items()},
    "amsgrad, 8 bits": (adam_jax.amsgrad(1e-2, **keeping("int8")), "float32"),
    "ademamix, 8 bits": (adam_jax.ademamix(1e-2, **keeping("int8")), "float32"),
    "lion, 4 bits": (adam_jax.lion(1e-3, mu_storage=INT4), "float32"),
    **{
        f"{k} in bfloat16": (optax.chain(adam_jax.adamw(1e-2), *stages), "bfloat16")
        for k, stages in ROUNDINGS.items()
    },
    **{
        f"{k} in bfloat16, 8 bits": (
            optax.chain(adam_jax.adamw(1e-2, **keeping("int8")), *stages),
            "bfloat16",
        )
        for k, stages in ROUNDINGS.items()
        if k in ("stochastic", "8 bits")
    },
    "sgd in bfloat16": (adam_jax.momentum(1e-2, 0.9), "bfloat16"),
    "stages of optax": (
        optax.chain(
            optax.clip(1.0),
            optax.ema(0.9),
            optax.masked(optax.add_decayed_weights(1e-2), matrices_only),
            optax.scale_by_schedule(lambda count: -1e-2 / (count + 1.0)),
        ),
        "float32",
    ),
}


def assert_same(found, due):
    """The bits; of small leaves nearly, since XLA inverts what only one leaf is divided by."""
    few = lambda tree: [x for x in jax.tree.leaves(tree) if 1 < x.size < 100]  # noqa: E731
    many = lambda tree: [x for x in jax.tree.leaves(tree) if not 1 < x.size < 100]  # noqa: E731
    chex.assert_trees_all_equal(many(found), many(due))
    chex.assert_trees_all_close(few(found), few(due), rtol=1e-6)


def steps_of_a_case(case, platform):
    """20 steps, each from the same state, with gradients of 1e-20 to 1e15, zeros, at last inf."""
    tx, dtype = CASES[case]
    rng = np.random.default_rng(0)
    # Several tiles, the last partial: of (256, 120) for a TPU, (32, 128) in Triton, else (12, 128).
    matrix = (392, 120) if platform == "tpu" else (12, 384) if BY_MOSAIC_GPU else (70, 150)
    shapes = {"matrix": matrix, "bias": (7,)}
    params = random_tree(shapes, dtype, rng)
    grads = stack([random_tree(shapes, dtype, rng, 10 ** rng.uniform(-20, 15)) for _ in range(20)])
    grads["matrix"][:, ::7] = 0
    grads["matrix"][-1, 3, 5] = np.inf
    plain, fused = jax.jit(plain_step(tx)), jax.jit(adam_jax.fused_step(tx))
    state = tx.init(params)
    for gradient in (jax.tree.map(itemgetter(i), grads) for i in range(20)):
        due = plain(params, state, gradient)
        assert_same(fused(params, state, gradient), due)
        params, state = due


def step_of_any_shape(platform):
    """Vectors, stacks, one row, short axes, dtypes: in tiles, or as they are, in one step."""
    tx = adam_jax.adamw(1e-2, mu_storage=INT8, nu_storage=INT4)
    # Where XLA lays a matrix out by columns, it has no kernel on a TPU.
    shapes = {"vector": (5000,), "stack": (2, 67, 256), "row": (1, 4100), "thin": (2, 2, 515, 10)}
    shapes["stacked vectors"] = (12, 768)  # fewer rows than a block has
    shapes["matrix"] = (264, 300)  # partial tiles along both axes
    # Axes of length 1, which no kernel sees; blocks along another axis than its rows, or none.
    shapes |= {"head": (132, 1, 128), "heads": (2, 1, 64, 1, 128), "column": (4100, 1)}
    shapes |= {"patches": (4, 4, 3, 96), "convolution": (40, 20, 3, 3), "cube": (8, 8, 8, 8)}
    rng = np.random.default_rng(0)
    params = random_tree(shapes, "float32", rng)
    params |= random_tree({"complex": (64, 65)}, "complex64", rng)
    params |= random_tree({"half": (64, 65)}, "float16", rng)
    params |= random_tree({"scalar": (), "empty": (0, 3), "bias": (7,)}, "bfloat16", rng)
    params["none"] = None
    state = tx.init(params)
    steps = plain_step(tx), adam_jax.fused_step(tx)
    chex.assert_trees_all_equal(*(jax.jit(step)(params, state, params) for step in steps))


def updates_apart():
    """`fuse` within optax's wrappers, a mask and a partition."""
    labels = lambda params: jax.tree.map(lambda p: "a" if p.ndim > 1 else "b", params)  # noqa: E731
    inner = optax.partition(
        {"a": adam_jax.adamw(1e-2, **keeping("int8")), "b": optax.sgd(0.1)}, labels
    )
    wrap = lambda tx: optax.apply_if_finite(  # noqa: E731
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.masked(tx, {"kernel": True, "bias": True})
        ),
        3,
    )
    params = random_tree({"kernel": (100, 128), "bias": (7,)}, "float32", np.random.default_rng(0))
    tx, plain = wrap(adam_jax.fuse(inner)), wrap(inner)
    given = jax.tree.map(lambda p: p / 3, params), tx.init(params), params
    with jax.numpy_dtype_promotion("standard"):
        found, due = (jax.jit(update)(*given) for update in (tx.update, plain.update))
    chex.assert_trees_all_equal(found[1], due[1])
    assert_close(found[0], due[0], "kernel")


def steps_in_a_simulated_tpu():
    """Whole tiles in Pallas's simulation of a TPU's memory, which does not crop the last ones."""
    tx = optax.chain(adam_jax.adamw(1e-2, mu_storage=INT8, nu_storage=INT4), ROUNDINGS["8 bits"][0])
    params = random_tree({"matrix": (512, 512)}, "bfloat16", np.random.default_rng(0))
    state = tx.init(params)
    with interpret("tpu", Tpu(tpu.InterpretParams())):
        fused = jax.jit(adam_jax.fused_step(tx))
        for _ in range(3):
            due = jax.jit(plain_step(tx))(params, state, params)
            chex.assert_trees_all_equal(fused(params, state, params), due)
            params, state = due


# `.ci/run` takes all, which is many minutes.
FEW = ["adam", "adamw, 4 and 8 bits", "stages of optax", "8 bits in bfloat16"]


def compare(platform, cases=tuple(CASES)):
    """Kernels of a platform beside their chains."""
    with jax.numpy_dtype_promotion("standard"):  # optax's own stages are not strict
        for case in cases:
            with interpret(platform) as kernels:
                steps_of_a_case(case, platform)
            assert len(kernels) == 1, case
            print(case, flush=True)
    with interpret(platform) as kernels:
        step_of_any_shape(platform)
    assert len(kernels) == (5 if platform == "tpu" else 4 if BY_MOSAIC_GPU else 9)
    with interpret(platform) as kernels:
        updates_apart()
    assert len(kernels) == 1
    if platform == "tpu":
        steps_in_a_simulated_tpu()


@each_platform
def test_kernels_give_the_bits_of_the_chain(platform):
    """In a process of its own, whose XLA has no instruction that multiplies and adds at once.

    XLA puts those elsewhere in each program, and only a whole process can do without.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_cpu_max_isa=AVX"
    command = [sys.executable, __file__, platform, *FEW]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"after {done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"
    assert done.stdout.splitlines() == FEW


# --- The chain is the definition ------------------------------------------------------------------

SMALL = {"kernel": (100, 128), "bias": (7,)}
TX = optax.chain(adam_jax.adamw(1e-2, **keeping("int8")), adam_jax.compensate("int8"))


def small(dtype="bfloat16"):
    params = random_tree(SMALL, dtype, np.random.default_rng(0))
    return params, TX.init(params), jax.tree.map(lambda p: p / 3, params)


@pytest.mark.parametrize("jit", [jax.jit, lambda fn: fn], ids=["jit", "no jit"])
def test_on_a_cpu_it_is_the_chain(jit):
    arguments = small()
    due = jit(plain_step(TX))(*arguments)
    chex.assert_trees_all_equal(jit(adam_jax.fused_step(TX))(*arguments), due)
    params, state, grads = arguments
    fused = adam_jax.fuse(TX)
    assert fused.init is TX.init
    updates = jit(fused.update)(grads, state, params)
    chex.assert_trees_all_equal(updates, jit(TX.update)(grads, state, params))


def test_vmap_and_derivatives_are_those_of_the_chain():
    tx, params = adam_jax.adam(1e-2), jnp.linspace(-1.0, 1.0, 4096).reshape(64, 64)
    step, plain = adam_jax.fused_step(tx), plain_step(tx)
    several = jax.tree.map(lambda x: jnp.stack([x, x + 1]), (params, tx.init(params)))
    grads = jnp.stack([params, -params])
    chex.assert_trees_all_equal(*(jax.jit(jax.vmap(f))(*several, grads) for f in (step, plain)))
    loss = lambda f, grad: jnp.sum(f(params, tx.init(params), grad)[0] ** 2)  # noqa: E731
    chex.assert_trees_all_equal(
        *(jax.jit(jax.grad(partial(loss, f)))(grads[0]) for f in (step, plain))
    )


@each_platform
def test_updates_apart_in_nnx(platform, interpreted):
    kernels = interpreted(platform)
    model = nnx.Linear(40, 128, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adam_jax.fuse(adam_jax.adam(1e-2)), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 40)))))(model))

    before = jnp.asarray(model.kernel[...])
    train_step(model, optimizer)
    np.testing.assert_allclose(model.kernel[...], before - 1e-2, rtol=1e-5, atol=1e-7)
    assert len(kernels) == 1


def test_what_a_step_closes_over_and_further_arguments(interpreted):
    kernels = interpreted("cuda")
    params = jnp.ones((32, 128))

    def scale(rate):
        def update(updates, state, params=None, *, factor, kind, **_):
            assert kind == "static"
            return jax.tree.map(lambda u: -u * (rate * factor), updates), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    @jax.jit
    def step(params, rate, factor):
        new = adam_jax.fused_step(scale(rate))
        return new(params, optax.EmptyState(), params, factor=factor, kind="static")[0]

    chex.assert_trees_all_close(step(params, jnp.float32(0.5), jnp.float32(0.5)), 0.75 * params)
    assert kernels


# --- Every equation -------------------------------------------------------------------------------

KINDS = ["float32", "bfloat16", "int32", "uint32", "int16", "uint16", "int8", "uint8", "bool"]
ROUND = jax.lax.RoundingMethod
UNARY = [
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bitwise_not", "cbrt", "ceil", "cos",
    "cosh", "erf", "erf_inv", "exp", "exp2", "expm1", "floor", "is_finite", "log", "log1p",
    "logistic", "neg", "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh",
]  # fmt: skip
BINARY = [
    "add", "atan2", "bitwise_and", "bitwise_or", "bitwise_xor", "div", "eq", "ge", "gt", "le", "lt",
    "max", "min", "mul", "ne", "nextafter", "pow", "rem", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sub",
]  # fmt: skip
EQUATIONS = {
    **{name: lambda x, y, name=name: getattr(jax.lax, name)(x) for name in UNARY},
    **{name: getattr(jax.lax, name) for name in BINARY},
    **{f"to {d}": lambda x, y, d=d: jax.lax.convert_element_type(x, d) for d in KINDS},
    **{f"bits of {d}": lambda x, y, d=d: jax.lax.bitcast_convert_type(x, d) for d in KINDS},
    **{f"power {n}": lambda x, y, n=n: jax.lax.integer_pow(x, n) for n in (-2, 0, 3)},
    **{how.name: lambda x, y, how=how: jax.lax.round(x, how) for how in ROUND},
    "clamp": lambda x, y: jax.lax.clamp(jnp.ones_like(x), x, y),
    "clamp to scalars": lambda x, y: jax.lax.clamp(jnp.ones((), x.dtype), x, y.dtype.type(3)),
    "reduce_precision": lambda x, y: jax.lax.reduce_precision(x, 5, 3),
    "select": lambda x, y: jax.lax.select(x < y, x, y),
    "shift by 3": lambda x, y: jax.lax.shift_left(x, jnp.full_like(x, 3)),
    "copy": lambda x, y: jnp.copy(x),
    "optimization_barrier": lambda x, y: jax.lax.optimization_barrier((x, y))[0],
    "checkpoint": lambda x, y: jax.checkpoint(lambda x: x * x)(x),
}


# Polynomials: jax 0.7 contracts them in one of two kernels for a CPU, which is a few ulp.
POLYNOMIALS = {"erf", "tan"}
OF_FLOAT32 = ["acosh", "asinh", "atanh", "exp2", "logistic", "nextafter", "power -2"]
REFUSED = [("rem", "float32"), ("rem", "bfloat16"), *((name, "bfloat16") for name in OF_FLOAT32)]


def edge_values(dtype):
    """Every pair of them, in two arrays."""
    if dtype == "bool":
        values = np.array([False, True])
    elif dtype in ("float32", "bfloat16"):
        info = jnp.finfo(dtype)
        signed = [0.0, 0.5, 1.0, 1.5, 2.5, 3.7, 100.7, 300.0, 4e4, 7e4, 2e9, 3e9, 5e9, np.inf]
        signed += [float(info.max), float(info.tiny), 0.49999997]
        values = np.array([*signed, *np.negative(signed), np.nan], np.float32).astype(dtype)
    else:
        info = jnp.iinfo(dtype)
        values = [0, 1, 2, 3, 7, 8, 31, 32, 33, 100, info.max - 1, info.max, info.min, info.min + 1]
        values = np.array([*values, *([-1, -2, -3] if info.min else [])], dtype)
    pairs = np.stack(np.meshgrid(values, values), -1).reshape(-1, 2)
    return [jnp.asarray(np.resize(side, (32, 128))) for side in pairs.T]


def possible(dtype):
    """The equations that take the dtype, on a CPU."""
    x = jax.ShapeDtypeStruct((), dtype)
    for name, equation in EQUATIONS.items():
        if dtype == "bool" and "clamp" in name:
            continue
        with contextlib.suppress(TypeError, ValueError):
            out = jax.eval_shape(equation, x, x)
            if out.shape == () and str(out.dtype) in KINDS:
                yield name, equation


def different(found, due, nearly=False):
    """A few pairs that are further apart; any NaN is as good as another."""
    assert found.dtype == due.dtype
    negative = [
        np.signbit(x) if x.dtype.kind in "fV" else x < 0 for x in map(np.asarray, (found, due))
    ]
    found, due = np.asarray(found), np.asarray(due)
    same = (found == due) & (negative[0] == negative[1]) | (found != found) & (due != due)
    if nearly:
        wide = [x.astype(np.float64) for x in (found, due)]
        same |= np.isclose(*wide, rtol=4 * float(jnp.finfo(due.dtype).eps), atol=0)
    return list(zip(found[~same][:3].tolist(), due[~same][:3].tolist(), strict=True))


def test_the_table_of_equations_is_complete():
    names = {
        eqn.primitive.name
        for dtype in KINDS
        for _, equation in possible(dtype)
        for eqn in jax.make_jaxpr(equation)(*2 * [jnp.ones((), dtype)]).eqns
    }
    of_complex = {"complex", "conj", "imag", "real"}
    of_derivatives = {"add_any", "stop_gradient"}
    assert ELEMENTWISE - of_complex - of_derivatives <= names


@each_platform
@pytest.mark.parametrize("dtype", KINDS)
def test_every_equation_gives_the_value_of_the_chain(dtype, platform, interpreted):
    """For every pair of extreme values; all equations of a dtype in one kernel."""
    kernels = interpreted(platform)
    x, y = edge_values(dtype)
    equations = {n: equation for n, equation in possible(dtype) if (n, dtype) not in REFUSED}
    # Kernels in Mosaic GPU take no arrays of booleans.
    arrays = (lambda x: x.astype(jnp.int8)) if BY_MOSAIC_GPU and platform == "cuda" else lambda x: x
    x, y = (arrays(side) if dtype == "bool" else side for side in (x, y))

    def each(x, y):
        x, y = (side != 0 if side.dtype != dtype else side for side in (x, y))
        results = {name: equation(x, y) for name, equation in equations.items()}
        return {n: arrays(x) if x.dtype == bool else x for n, x in results.items()}

    found, due = (user_jit(f)(x, y) for f in (fusion._fused(each, gradients=0), each))
    assert kernels
    wrong = {name: different(found[name], due[name], name in POLYNOMIALS) for name in equations}
    assert not any(wrong.values()), {name: pairs for name, pairs in wrong.items() if pairs}


@pytest.mark.parametrize(("name", "dtype"), REFUSED)
def test_equations_that_kernels_compute_otherwise_are_refused(name, dtype, interpreted):
    interpreted("cuda")
    x = jnp.ones((32, 128), dtype)
    mine = optax.stateless(lambda updates, params: EQUATIONS[name](updates, params))
    with pytest.raises(ValueError, match=r"stateless has the equation .* of .*outside"):
        jax.jit(adam_jax.fuse(mine).update)(x, mine.init(x), x)


@pytest.mark.parametrize(("platform", "name"), [("cuda", "reduce_precision"), ("tpu", "asinh")])
def test_equations_that_pallas_lacks_are_refused_by_name(platform, name):
    mine = optax.stateless(partial(jax.tree.map, EQUATIONS[name]))
    with pytest.raises(ValueError, match=f"Pallas has no kernel for .*: {name}.*outside"):
        lowered(platform, mine, (64, 128))


@each_platform
def test_checkpoints_and_barriers_in_a_stage_of_ones_own(platform, interpreted):
    """They are local; a barrier of a whole tree does not make several leaves one."""
    kernels = interpreted(platform)

    def update(updates, params):
        updates, params = jax.lax.optimization_barrier((updates, params))
        return jax.tree.map(jax.checkpoint(lambda u, p: u - 0.1 * jnp.sin(p)), updates, params)

    tx = optax.chain(optax.stateless(update), adam_jax.adam(1e-2))
    params = random_tree({"a": (32, 128), "b": (35, 128)}, "float32", np.random.default_rng(0))
    given = params, tx.init(params), params
    found, due = (jax.jit(step(tx))(*given) for step in (adam_jax.fused_step, plain_step))
    assert_close(found, due, "contracted")
    assert len(kernels) == 2


# --- What is not local ----------------------------------------------------------------------------

NOT_LOCAL = {
    **{name: tables.to_updates(name) for name in GLOBAL},
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), adam_jax.adam(1e-3)),
    "factored": adam_jax.adam(1e-3, nu_storage=storage.factored()),
    "block_mean": adam_jax.adam(
        1e-3, nu_storage=storage.block_mean(lambda path, shape: (shape[0], 1))
    ),
    "apply_if_finite": optax.apply_if_finite(adam_jax.adam(1e-3), 3),
    "add_noise": optax.chain(adam_jax.adam(1e-3), optax.add_noise(0.1, 0.1, 0)),
    "centralize": optax.chain(optax.centralize(), adam_jax.adam(1e-3)),
    "stateless": optax.chain(
        optax.stateless(lambda u, _: jax.tree.map(lambda x: x - jnp.mean(x), u)),
        adam_jax.adam(1e-3),
    ),
}


@pytest.mark.parametrize("stage", NOT_LOCAL)
def test_what_is_not_local_is_refused_by_name(stage):
    tx, params = NOT_LOCAL[stage], {"kernel": jnp.ones((64, 128))}
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match=f"and {stage} does not.*without it: a stage at an end"),
    ):
        jax.jit(adam_jax.fused_step(tx))(params, tx.init(params), params)


def test_leaves_of_which_one_needs_the_other_are_refused():
    mixed = optax.stateless(lambda updates, params: updates | {"a": updates["a"] + updates["b"]})
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    tx = optax.chain(mixed, optax.scale(-1.0))
    with pytest.raises(ValueError, match="between several leaves"):
        jax.jit(adam_jax.fused_step(tx))(params, tx.init(params), params)


# --- What it is lowered to ------------------------------------------------------------------------


def lowered(platform, tx, shape, dtype="float32"):
    params = {"kernel": jax.ShapeDtypeStruct(shape, dtype)}
    traced = jax.jit(adam_jax.fused_step(tx)).trace(params, jax.eval_shape(tx.init, params), params)
    return traced.lower(lowering_platforms=(platform,))


def triton_moves(module):
    """The operands of all loads and stores of arrays in a module's Triton kernels."""
    from jaxlib.triton import dialect as triton

    kernels = []

    def look(operation):
        if operation.name == "stablehlo.custom_call":
            kernels.append(operation.attributes["mhlo.backend_config"]["ir"].value_bytes)
        return ir.WalkResult.ADVANCE

    module.operation.walk(look)
    found = []

    def move(operation):
        if operation.name in ("tt.load", "tt.store"):
            operands = [str(operand.type) for operand in operation.operands]
            found.extend([operands] if "tensor" in operands[0] else [])  # the others are scalars
        return ir.WalkResult.ADVANCE

    with ir.Context() as context:
        triton.register_dialect(context)
        for kernel in kernels:
            ir.Module.parse(kernel).operation.walk(move)
    return found


if isinstance(ON["cuda"], Triton):

    @pytest.mark.parametrize("shape", [(100, 200), (64, 256), (5, 33, 200), (5000,)])
    def test_no_tile_reads_or_writes_beyond_its_leaf(shape):
        """Triton masks nothing by itself: read from the kernel as it is handed to its compiler."""
        moves = triton_moves(lowered("cuda", TX, shape, "bfloat16").compiler_ir())
        assert len(moves) >= 13  # parameter, gradient, residual, and two of each moment
        whole = len(shape) > 1 and shape[-2] % 32 == shape[-1] % 128 == 0
        for operands in moves:
            assert whole or "i1>" in operands[-1] or "i1>" in operands[1]


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((50257, 768), (64, 128)),
        ((12, 768), (12, 128)),  # less than a block
        ((3, 67, 384), (1, 64, 128)),
        ((3, 96, 128), (1, 32, 128)),  # whole rows of a stack
        ((3, 67, 128), None),
        ((512, 200), None),
        ((5120,), None),
    ],
)
def test_tiles_in_mosaic_gpu(shape, tile):
    """Its copies are cropped at the end of an array, at the end of a row or a matrix not always.

    An H100 wrote the scales of the columns beyond a row into the next row, the interpreter did not.
    """
    params = jnp.ones(shape, jnp.bfloat16)
    jaxpr = jax.make_jaxpr(adam_jax.fused_step(TX))(params, TX.init(params), params)
    (fused,) = (eqn for eqn in jaxpr.eqns if eqn.primitive is fusion._fused_p)
    (kernel,) = fused.params["program"].kernels.values()
    assert MosaicGpu().tile_shape(kernel, kernel.shape) == tile


def test_leaves_that_are_alike_are_one_function(interpreted):
    """Traced, lowered and compiled once."""
    kernels = interpreted("tpu")
    tx = adam_jax.adamw(1e-2, **keeping("int8"))
    shapes = {"a": (64, 128), "b": (64, 128), "c": (64, 256)}
    params = random_tree(shapes, "float32", np.random.default_rng(0))
    params["b"] = params["a"]  # which differ by their random bits
    given = params, tx.init(params), params
    found, due = (jax.jit(step(tx))(*given) for step in (adam_jax.fused_step, plain_step))
    assert_close(found, due, "contracted")
    assert len(kernels) == 2
    codes = due[1][0].nu.codes
    assert (codes["a"] != codes["b"]).any()
    assert all(kernel.own for kernel in kernels)  # the seeds of these bits


def gone(name):
    raise ImportError(f"no module {name}")


# Where no emitter serves: for which platform, what is otherwise there, and what the warning says.
WITHOUT = {
    "AMD": ("rocm", {}, "None are made for rocm"),
    "another GPU": (
        "cuda",
        {"MOSAIC_GPU_SINCE": (0,), "compute_capability": lambda: "8.0"},
        r"capability 9.0 \(Hopper\), and this one's is 8.0",
    ),
    "a jax without Mosaic GPU": (
        "cuda",
        {"MOSAIC_GPU_SINCE": (0,), "backend": gone},
        r"has no jax.experimental.pallas.mosaic_gpu \(no module",
    ),
    "an old jax without Triton": (
        "cuda",
        {"MOSAIC_GPU_SINCE": (99,), "backend": gone},
        r"has no jax.experimental.pallas.triton",
    ),
    "a jax without TPUs": ("tpu", {"backend": gone}, r"has no jax.experimental.pallas.tpu"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_where_no_emitter_serves_the_plain_chain_runs(case):
    """With one warning that says why."""
    platform, there, why = WITHOUT[case]
    fusion._warn.cache_clear()
    with contextlib.ExitStack() as contexts:
        for name, value in there.items():
            contexts.enter_context(mock.patch.object(_jax, name, value))
        with pytest.warns(UserWarning, match=why) as warned:
            texts = [lowered(platform, TX, (64, 128), "bfloat16").as_text() for _ in range(2)]
    assert len(warned) == 1
    assert not any(re.search("triton|mosaic_gpu|tpu_custom_call", text) for text in texts)


def test_export_for_cpu_cuda_and_tpu():
    """Which form runs is chosen where it is lowered."""
    arguments, tree = jax.tree.flatten(small())
    described = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments]
    step = jax.jit(
        lambda *leaves: jax.tree.leaves(adam_jax.fused_step(TX)(*jax.tree.unflatten(tree, leaves)))
    )
    # JAX warrants that an old export of a TPU's kernels runs, but not yet of a GPU's.
    names = ["__gpu$xla.gpu.triton", "mosaic_gpu_v2"]
    checks = list(map(export.DisabledSafetyCheck.custom_call, names))
    exported = export.export(step, platforms=["cpu", "cuda", "tpu"], disabled_checks=checks)(
        *described
    )
    text = exported.mlir_module()
    assert names[BY_MOSAIC_GPU] in text
    assert "tpu_custom_call" in text
    restored = export.deserialize(exported.serialize())
    chex.assert_trees_all_equal(restored.call(*arguments), step(*arguments))


# --- On several devices ---------------------------------------------------------------------------


def placed(tree, mesh, spec):
    def put(x):
        return jax.device_put(x, NamedSharding(mesh, spec if jnp.size(x) > 1000 else P()))

    return jax.tree.map(put, tree)


SHARDED = {"kernel": (512, 256), "bias": (24,)}


def sharded_arguments():
    params = random_tree(SHARDED, "bfloat16", np.random.default_rng(0))
    return params, TX.init(params), jax.tree.map(lambda p: p / 3, params)


@pytest.fixture(scope="module")
def due():
    """Two steps on one device."""
    params, state, grads = sharded_arguments()
    step = jax.jit(plain_step(TX))
    return jax.device_get(step(*step(params, state, grads), grads))


COLLECTIVES = re.compile(r"= \S+ (all-gather|all-reduce|all-to-all|collective-permute)")


@pytest.mark.parametrize(
    ("spec", "state_spec"),
    [
        (P("x"), P("x")),
        (P(None, "x"), P(None, "x")),
        (P(), P("x")),  # whole parameters, a sharded state
    ],
)
def test_eight_devices_give_the_bits_of_one(spec, state_spec, interpreted, due):
    kernels = interpreted("tpu")
    mesh = mesh_of("explicit", x=8)
    params, state, grads = sharded_arguments()
    params, grads = placed((params, grads), mesh, spec)
    state = placed(state, mesh, state_spec)
    step = jax.jit(adam_jax.fused_step(TX))
    with jax.set_mesh(mesh):
        if spec == state_spec:
            assert not COLLECTIVES.findall(step.lower(params, state, grads).compile().as_text())
        params, state = step(*step(params, state, grads), grads)
    chex.assert_trees_all_equal(jax.device_get((params, state)), due)
    assert params["kernel"].sharding.is_equivalent_to(NamedSharding(mesh, state_spec), 2)
    assert kernels


def test_inside_shard_map_a_part_is_a_leaf(interpreted):
    kernels = interpreted("tpu")
    mesh = mesh_of(x=8)
    arguments = sharded_arguments()
    specs = jax.tree.map(lambda x: P("x") if x.size > 1000 else P(), arguments)
    # Pallas's interpreter does not tell what varies.
    parts = partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=specs[:2], check_vma=False)
    steps = plain_step(TX), adam_jax.fused_step(TX)
    chex.assert_trees_all_equal(*(jax.jit(parts(step))(*arguments) for step in steps))
    assert kernels


def test_shards_of_partial_blocks_are_refused(interpreted):
    """Never a silent gather."""
    interpreted("tpu")
    mesh = mesh_of("explicit", x=8)
    params = {"kernel": jnp.ones((160, 256), jnp.bfloat16)}
    state = placed(TX.init(params), mesh, P())
    params = placed(params, mesh, P("x"))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"8 shards of blocks.*shard_map"):
        jax.jit(adam_jax.fused_step(TX))(params, state, params)


def test_automatic_meshes_are_refused(interpreted):
    interpreted("tpu")
    mesh = mesh_of(x=8)
    arguments = placed(sharded_arguments(), mesh, P("x"))
    with pytest.raises(ValueError, match=r"shard_map, or use a mesh with explicit axes"):
        jax.jit(adam_jax.fused_step(TX))(*arguments)


if __name__ == "__main__":
    compare(sys.argv[1], sys.argv[2:] or CASES)
