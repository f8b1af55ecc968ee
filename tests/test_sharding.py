"""Where the state lives on many devices: beside its parameters, and split with `zero`."""

import collections
import math
import re

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support import assert_close, matrices_only, mesh_of, refused, user_jit
from tables import keeping

import adam_jax
from adam_jax import storage

INT8, INT4, FACTORED = storage.int8(), storage.int4(), storage.factored()
EIGHT_BITS = keeping("int8")

# --- Which layout ---------------------------------------------------------------------------------

# Nothing is computed here, so this mesh needs no devices.
FOUR_BY_TWO = AbstractMesh((4, 2), ("data", "model"))
LEAVES = {
    "kernel": ((512, 768), P(None, "model")),
    "square": ((256, 256), P("model")),
    "embedding": ((1600, 512), P("model", None)),  # 50 blocks of 32 rows, 25 on each of two devices
    "bias": ((768,), P("model")),
    "vector": ((4800,), P("model")),  # 150 blocks
    "odd": ((7, 5), P()),
    "sharded": ((64, 64), P("data", "model")),
    "scale": ((), P()),
}


def given(mesh=FOUR_BY_TWO, dtype=jnp.float32):
    """The parameters of LEAVES without their arrays."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in LEAVES.items()
    }


def layouts(tx, params, zero=None):
    """The layout of every part of a state, by its place."""
    shardings = adam_jax.state_shardings(tx, params, zero=zero)
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    place = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return {place(path): sharding.spec for path, sharding in leaves}


LABELS = {name: "large" if name in ("kernel", "embedding") else "small" for name in LEAVES}

# For each chain, the places that show something, without zero and with it. The mesh is 4 ("data")
# by 2 ("model").
EXPECTED = {
    "adamw": (adam_jax.adamw(1e-3), {
        "0/count": (P(), P()),
        "0/weights": (P(), P()),
        "0/mu/kernel": (P(None, "model"), P("data", "model")),
        "0/nu/square": (P("model"), P("model", "data")),
        "0/nu/bias": (P("model"), P(("model", "data"))),
        "0/nu/odd": (P(), P()),
        "0/mu/sharded": (P("data", "model"), P("data", "model")),
        "0/mu/scale": (P(), P()),
    }),
    "8-bit": (adam_jax.adamw(1e-3, **EIGHT_BITS), {
        "0/mu/codes/kernel": (P(None, "model"), P("data", "model")),
        "0/mu/scales/kernel": (P(None, "model"), P("data", "model")),
        # Eight parts of 200 rows would cut blocks, and 25 blocks are not divided by four.
        "0/nu/codes/embedding": (P("model", None), P("model", "data")),
        "0/nu/scales/embedding": (P("model", None), P("model", "data")),
        "0/mu/codes/sharded": (P("data", "model"), P("data", "model")),
        "0/mu/scales/sharded": (P(None, "model"), P(None, "model")),  # of two blocks
        "0/mu/codes/vector": (P("model"), P(("model", "data"))),
        "0/mu/scales/vector": (P("model"), P("model")),
        "0/mu/whole/bias": (P("model"), P(("model", "data"))),
        "0/mu/codes/bias": (P(), P()),  # a placeholder
    }),
    "4-bit, factored": (adam_jax.adamw(1e-3, mu_storage=INT4, nu_storage=FACTORED), {
        "0/mu/codes/kernel": (P(None, "model"), P("data", "model")),
        "0/mu/scales/kernel": (P(None, "model"), P("data", "model")),
        "0/nu/rows/kernel": (P(None, None), P("data", None)),
        "0/nu/columns/kernel": (P(None, "model"), P(None, "model")),
    }),
    "rounded": (optax.chain(adam_jax.adamw(1e-3), adam_jax.compensate("int8")), {
        "1/residual/kernel": (P(None, "model"), P("data", "model")),
    }),
    "laprop": (adam_jax.laprop(1e-3, **EIGHT_BITS), {
        "0/nu/codes/kernel": (P(None, "model"), P("data", "model")),
        "2/mu/scales/kernel": (P(None, "model"), P("data", "model")),
    }),
    "ademamix": (adam_jax.ademamix(1e-3, **EIGHT_BITS), {
        "2/mu_slow/scales/kernel": (P(None, "model"), P("data", "model")),
    }),
    "masked": (optax.masked(adam_jax.adamw(1e-3), matrices_only), {
        "inner_state/0/mu/kernel": (P(None, "model"), P("data", "model")),
    }),
    "partition": (optax.partition({"large": adam_jax.adamw(1e-3, **EIGHT_BITS),
                                   "small": adam_jax.lion(1e-4)}, LABELS), {
        "inner_states/large/inner_state/0/mu/codes/kernel": (P(None, "model"), P("data", "model")),
        "inner_states/small/inner_state/0/mu/square": (P("model"), P("model", "data")),
    }),
    "MultiSteps": (optax.MultiSteps(adam_jax.adamw(1e-3, **EIGHT_BITS), 4), {
        "acc_grads/kernel": (P(None, "model"), P("data", "model")),
        "inner_opt_state/0/nu/codes/kernel": (P(None, "model"), P("data", "model")),
        "mini_step": (P(), P()),
    }),
    "inject_hyperparams": (optax.inject_hyperparams(adam_jax.adamw)(1e-3), {
        "hyperparams/learning_rate": (P(), P()),
        "inner_state/0/mu/kernel": (P(None, "model"), P("data", "model")),
    }),
    "schedule_free": (optax.contrib.schedule_free(adam_jax.adamw(1e-3, b1=0.0), 1e-3), {
        "z/kernel": (P(None, "model"), P("data", "model")),
        "base_optimizer_state/0/nu/kernel": (P(None, "model"), P("data", "model")),
    }),
    # An axis is dropped, and of a square matrix nobody can tell by its lengths which one.
    "adafactor": (optax.adafactor(1e-3), {
        "0/v_row/kernel": (P(None), P("data")),
        "0/v_col/kernel": (P("model"), P("model")),
        "0/v_row/square": (P(None), P(None)),
        "0/v_col/square": (P(None), P(None)),
        "0/v_row/bias": (P(None), P(None)),  # of length 1
        "0/v/bias": (P("model"), P(("model", "data"))),
    }),
    # An axis is added: ten updates.
    "lbfgs": (optax.lbfgs(memory_size=10), {
        "0/diff_params_memory/kernel": (P(None, None, "model"), P(None, "data", "model")),
        "0/weights_memory": (P(), P()),
    }),
    "add_noise": (optax.chain(optax.add_noise(0.1, 0.5, 0), adam_jax.adamw(1e-3)), {
        "0/rng_key": (P(), P()),
        "1/0/mu/kernel": (P(None, "model"), P("data", "model")),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_layouts(name):
    tx, expected = EXPECTED[name]
    params = given(dtype=jnp.bfloat16 if name == "rounded" else jnp.float32)
    without, split = layouts(tx, params), layouts(tx, params, "data")
    assert {place: (without[place], split[place]) for place in expected} == expected


@pytest.mark.parametrize("name", EXPECTED)
def test_every_part_can_lie_as_it_shall(name):
    """The tree is that of the state, every layout divides its part, and `zero` never costs."""
    tx, params = EXPECTED[name][0], given()
    state = jax.eval_shape(tx.init, params)
    plain, split = (adam_jax.state_shardings(tx, params, zero=zero) for zero in (None, "data"))

    def local(part, sharding):
        return math.prod(sharding.shard_shape(part.shape))

    jax.tree.map(
        lambda part, a, b: None if local(part, b) <= local(part, a) else pytest.fail(str(part)),
        state, plain, split,
    )  # fmt: skip


def test_a_parameter_that_is_the_whole_tree():
    """Every path ends in the empty one: counts and weights are replicated."""
    kernel = given()["kernel"]
    state = adam_jax.state_shardings(adam_jax.adamw(1e-3, **EIGHT_BITS), kernel, zero="data")
    assert state[0].mu.scales.spec == P("data", "model")
    assert state[0].count.spec == state[0].weights.spec == state[-1].count.spec == P()


def test_the_longest_place_counts():
    """The parameters `a` and `b/a` end alike."""
    params = {"a": given()["bias"], "b": {"a": given()["kernel"]}}
    state = adam_jax.state_shardings(adam_jax.adamw(1e-3), params)
    assert state[0].mu["a"].spec == P("model")
    assert state[0].mu["b"]["a"].spec == P(None, "model")


def test_memory_kinds_are_kept():
    sharding = NamedSharding(mesh_of(data=8), P("data"), memory_kind="unpinned_host")
    params = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)
    state = adam_jax.state_shardings(adam_jax.adamw(1e-3), params)
    assert state[0].mu.memory_kind == "unpinned_host"


def test_init_that_is_not_compiled_follows_the_same_rule():
    first_row = storage.Storage(
        save=lambda moment, leaf: moment[0],
        load=lambda stored, leaf: jnp.broadcast_to(stored[None], leaf.shape),
    )
    tx = adam_jax.scale_by_moments(mu_storage=first_row, nu_storage=storage.stochastic())
    mesh = mesh_of(x=8)
    params = {
        "kernel": jax.device_put(jnp.zeros((64, 128)), NamedSharding(mesh, P(None, "x"))),
        "bias": jax.device_put(jnp.zeros(64), NamedSharding(mesh, P())),
    }
    state, shardings = tx.init(params), adam_jax.state_shardings(tx, params)
    assert shardings.mu["kernel"].spec == P("x")
    made = jax.tree.map(lambda part: part.sharding, (state.mu, state.nu))
    assert made == (shardings.mu, shardings.nu)


# --- On eight devices -----------------------------------------------------------------------------

# Batch and weights are small integers, so that the gradients are the same in every order of adding.
RNG = np.random.default_rng(0)
START = {"kernel": RNG.normal(size=(1600, 512)), "bias": RNG.normal(size=512)}
BATCHES = [
    {"x": RNG.integers(-2, 3, (16, 1600)), "weights": RNG.integers(-2, 3, (16, 512))}
    for _ in range(3)
]
LARGEST = START["kernel"].size * 4  # bytes of the largest moment in float32


def floats(tree, sharding):
    return jax.tree.map(lambda x: jax.device_put(np.float32(x), sharding), tree)


def training_step(tx):
    def loss(params, batch):
        return jnp.sum((batch["x"] @ params["kernel"] + params["bias"][None]) * batch["weights"])

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return step


def collectives(compiled):
    """How many elements the collectives of each kind give to a device."""
    found = re.findall(
        r" = (\([^)]*\)|\S+) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    elements = collections.Counter()
    for results, kind in found:
        for shape in re.findall(r"\[([\d,]*)\]", results):
            elements[kind] += math.prod(map(int, filter(None, shape.split(","))))
    return elements


def bytes_on_one(tree):
    """But for placeholders."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != bool]
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


SMALL_LEAVES = 200  # bytes of counts and weights, on every device

ON_MESHES = [("auto", "float32"), ("auto", "8-bit"), ("explicit", "8-bit")]
OPTIMIZERS = {"float32": adam_jax.adamw(1e-2), "8-bit": adam_jax.adamw(1e-2, **EIGHT_BITS)}


@pytest.mark.parametrize(("kind", "name"), ON_MESHES)
def test_zero(kind, name):
    """From a replicated start: the state in eight parts, the numbers of one device."""
    tx, mesh = OPTIMIZERS[name], mesh_of(kind, data=8)
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params = floats(START, everywhere)
    shardings = adam_jax.state_shardings(tx, params, zero="data")

    # No device holds a whole moment while the state is made, not even in 8 bits, or asks another.
    init = user_jit(tx.init, out_shardings=shardings).lower(params).compile()
    assert init.memory_analysis().temp_size_in_bytes < LARGEST / 3
    assert collectives(init) == {}
    state = init(params)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert bytes_on_one(state) <= whole / 8 + SMALL_LEAVES

    # The gradients are added up once, the weights gathered once, and there is nothing else.
    out = jax.tree.map(lambda p: p.sharding, params), shardings
    step = user_jit(training_step(tx), donate_argnums=(0, 1), out_shardings=out)
    batches = [floats(batch, rows) for batch in BATCHES]
    step = step.lower(params, state, batches[0]).compile()
    elements = sum(leaf.size for leaf in START.values())
    assert collectives(step) == {"all-reduce": elements, "all-gather": elements}

    alone, one = user_jit(training_step(tx)), jax.devices()[0]
    expected = floats(START, one)
    expected = expected, user_jit(tx.init)(expected)
    for here, there in zip(batches, BATCHES, strict=True):
        params, state = step(params, state, here)
        expected = alone(*expected, floats(there, one))
    if kind == "auto":
        chex.assert_trees_all_equal((params, state), expected)
    else:  # other constraints on the layout make other kernels, which contract elsewhere
        assert_close(params, expected[0], "contracted")
    assert bytes_on_one(state) <= whole / 8 + SMALL_LEAVES


# --- In frameworks --------------------------------------------------------------------------------


def test_linen():
    """Boxes stay around the parts of a kernel, and their names are no layout: 2 scales on 8."""
    mesh = mesh_of(x=8)
    kernel_init = nn.with_partitioning(nn.initializers.ones, ("x", None))
    model, x = nn.Dense(64, kernel_init=kernel_init), jnp.ones((1, 64))
    places = nn.get_sharding(jax.eval_shape(model.init, jax.random.key(0), x), mesh)
    params = jax.jit(model.init, out_shardings=places)(jax.random.key(0), x)
    tx = adam_jax.adamw(1e-3, **EIGHT_BITS)
    shardings = adam_jax.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    codes, scales, whole = (part["params"] for part in state[0].nu)
    assert isinstance(codes["kernel"], nn.Partitioned)
    assert codes["kernel"].value.sharding.spec == P("x", None)
    assert scales["kernel"].value.sharding.spec == P(None, None)
    assert whole["bias"].sharding.spec == P()


class Network(nnx.Module):
    def __init__(self, rngs):
        # The scales of 96 rows are three, which two devices do not divide: with its eager sharding
        # Flax would insist on the annotation for them too.
        place = lambda *names: nnx.with_partitioning(  # noqa: E731
            nnx.initializers.lecun_normal(), names, eager_sharding=False
        )
        self.up = nnx.Linear(64, 96, rngs=rngs, kernel_init=place(None, "model"))
        self.down = nnx.Linear(96, 64, rngs=rngs, kernel_init=place("model", None))

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def nnx_step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def test_nnx():
    """A state made in parts for `nnx.Optimizer`, and steps that leave everything in its place."""
    mesh = mesh_of(data=4, model=2)
    model = Network(nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, mesh)))

    tx = adam_jax.adamw(1e-2, **EIGHT_BITS)
    shardings = adam_jax.state_shardings(tx, nnx.state(model, nnx.Param), zero="data")
    init = jax.jit(tx.init, out_shardings=shardings)
    tx = optax.GradientTransformationExtraArgs(init, tx.update)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    everywhere = NamedSharding(mesh, P())
    optimizer.step[...] = jax.device_put(optimizer.step[...], everywhere)
    local = lambda x: x.addressable_shards[0].data.shape  # noqa: E731
    before = [local(x) for x in jax.tree.leaves((nnx.state(model), nnx.state(optimizer)))]
    places = [
        nnx.StateSharding(jax.tree.map(lambda x: x.sharding, nnx.state(node)))
        for node in (model, optimizer)
    ]
    step = nnx.jit(nnx_step, in_shardings=(*places, None), donate_argnums=(0, 1))
    x = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, P("data")))
    losses = [float(step(model, optimizer, x)) for _ in range(3)]
    assert losses[2] < losses[0]
    after = [local(x) for x in jax.tree.leaves((nnx.state(model), nnx.state(optimizer)))]
    assert after == before
    codes, scales, _ = optimizer.opt_state[0].nu
    assert local(codes["down"]["kernel"][...]) == (48, 16)
    assert local(scales["down"]["kernel"][...]) == (3, 16)


def test_equinox():
    """A module with functions in it, and so with None among its arrays."""
    mesh = mesh_of(x=8)
    arrays = eqx.filter(eqx.nn.MLP(64, 64, 64, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    arrays = jax.device_put(arrays, NamedSharding(mesh, P()))
    tx = adam_jax.adamw(1e-3, **EIGHT_BITS)
    shardings = adam_jax.state_shardings(tx, arrays, zero="x")
    jax.jit(tx.init, out_shardings=shardings).lower(arrays)
    assert shardings[0].mu.codes.layers[0].weight.spec == P(None, "x")
    assert shardings[0].mu.whole.layers[0].bias.spec == P("x")


# --- Wrong use ------------------------------------------------------------------------------------

TX = adam_jax.adamw(1e-3)
ON_MODEL = given()["kernel"]


def other_mesh():
    place = NamedSharding(AbstractMesh((2, 4), ("data", "model")), P())
    return jax.ShapeDtypeStruct((3,), jnp.float32, sharding=place)


@pytest.mark.parametrize(
    ("params", "zero", "names"),
    [
        (lambda: {"a": ON_MODEL}, "batch", "zero ('data', 'model') 'batch'"),
        (lambda: {"a": ON_MODEL}, True, "zero True"),
        (lambda: {"a": ON_MODEL, "b": np.ones(3)}, None, "['b'] no sharding"),
        (lambda: {"b": jnp.ones(3)}, None, "['b'] SingleDeviceSharding"),
        (lambda: {"a": ON_MODEL, "b": other_mesh()}, None, "['b'] ['a']"),
        (lambda: {"a": None}, None, "parameter"),
    ],
)
def test_wrong_use(params, zero, names):
    with refused(ValueError, names):
        adam_jax.state_shardings(TX, params(), zero=zero)


def test_inside_jit_nothing_is_known():
    with pytest.raises(ValueError, match="no sharding"):
        jax.jit(lambda params: adam_jax.state_shardings(TX, params))(jnp.ones(3))
