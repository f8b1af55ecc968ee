"""In the frameworks that people train with: Flax NNX, Flax Linen, Equinox, Orbax."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from support import QUICK, assert_close, mesh_of, plain_step, refused, user_jit

import adam_jax
from adam_jax import backward, storage

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 3)).astype(np.float32)
Y = np.sin(X.sum(axis=1, keepdims=True))

WEIGHTS = [RNG.normal(size=shape) for shape in ((64,), (64, 64))]  # a bias and a kernel
GRADS = [[RNG.normal(size=weight.shape) for weight in WEIGHTS] for _ in range(3)]


class Case(NamedTuple):
    """An optimizer that keeps its state in an unusual way, and the dtype of the parameters."""

    tx: optax.GradientTransformationExtraArgs
    dtype: str = "float32"


def keeping(optimizer=adam_jax.adamw, **kwargs):
    return Case(optimizer(1e-2, **kwargs))


def rounded_by(rounding, **kwargs):
    return Case(optax.chain(adam_jax.adamw(1e-2, **kwargs), rounding), "bfloat16")


# Every storage and every rounding, and every stage that keeps a moment. (The last axis of the
# kernel is an output in Flax and an input in Equinox; `block_mean` cannot tell and need not here.)
INT8, INT4 = storage.int8(), storage.int4()
CASES = {
    "dtype, stochastic, round_stochastically": rounded_by(
        adam_jax.round_stochastically(), mu_storage="bfloat16", nu_storage=storage.stochastic()
    ),
    "float16, block_mean, compensate": rounded_by(
        adam_jax.compensate(), mu_storage="float16", nu_storage=storage.block_mean()
    ),
    "int8, int4, compensate int8": rounded_by(
        adam_jax.compensate("int8"), mu_storage=INT8, nu_storage=INT4
    ),
    "int4, factored": keeping(mu_storage=INT4, nu_storage=storage.factored()),
    "amsgrad, int8": keeping(adam_jax.amsgrad, mu_storage=INT8, nu_storage=INT8),
    "ademamix, int8": keeping(adam_jax.ademamix, mu_storage=INT8, nu_storage=INT8),
    "lion, int8": keeping(adam_jax.lion, mu_storage=INT8),
}
cases = pytest.mark.parametrize("name", CASES)


def train_nnx(tx, steps=60):
    model = nnx.Sequential(
        nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 1, rngs=nnx.Rngs(1))
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def train_linen(tx, steps=60):
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)])
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), X), tx=tx)

    @user_jit
    def step(state):
        loss = lambda params: jnp.mean((state.apply_fn(params, X) - Y) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(steps):
        state, loss = step(state)
        losses.append(float(loss))
    return losses, state.params


def train_equinox(tx, steps=60):
    model = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        loss = lambda model: jnp.mean((jax.vmap(model)(X) - Y) ** 2)  # noqa: E731
        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for _ in range(steps):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    return losses, jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


@pytest.mark.parametrize(
    ("train", "name"),
    [(train_nnx, "adam"), (train_linen, "adamw"), (train_equinox, "nadam"), (train_nnx, "nadam")],
)
def test_training_equals_optax(train, name):
    """Losses that fall, and bit for bit optax's; nadam's nearly: the bias has only one element.

    `nnx.jit` has no options for XLA: where conftest.py has it compile quickly, NNX's are near too.
    """
    with jax.numpy_dtype_promotion("standard"):
        ours, our_params = train(getattr(adam_jax, name)(1e-2))
        theirs, their_params = train(getattr(optax, name)(1e-2))
    assert ours[-1] < ours[0] / 2
    if name == "nadam" or (QUICK and train is train_nnx):
        assert_close((ours, our_params), (theirs, their_params), "contracted")
    else:
        assert ours == theirs
        chex.assert_trees_all_equal(our_params, their_params)


# --- The frameworks do to the numbers what a plain loop does --------------------------------------


@functools.cache
def train_plainly(name, jitted):
    """Leaves of parameters and state after the steps, by the plain loop on a list of arrays."""
    tx, dtype = CASES[name].tx, CASES[name].dtype
    params = [jnp.asarray(weight, dtype) for weight in WEIGHTS]
    state = tx.init(params)
    step = jax.jit(plain_step(tx)) if jitted else plain_step(tx)
    for grads in GRADS:
        params, state = step(params, state, [jnp.asarray(grad, dtype) for grad in grads])
    return params, jax.tree.leaves(state)


def filled(tree, arrays):
    """A tree of a bias and a kernel with other numbers."""
    old, structure = jax.tree.flatten(tree)
    return structure.unflatten(jnp.asarray(a, o.dtype) for a, o in zip(arrays, old, strict=True))


def nnx_model(dtype):
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0), param_dtype=dtype)
    nnx.update(model, filled(nnx.state(model), WEIGHTS))
    return model


def update_nnx(model, optimizer, grads):
    optimizer.update(model, grads)


def nnx_leaves(model, optimizer):
    return jax.tree.leaves(nnx.state(model)), jax.tree.leaves(optimizer.opt_state)


def follow_nnx(case, jitted):
    model = nnx_model(case.dtype)
    optimizer = nnx.Optimizer(model, case.tx, wrt=nnx.Param)
    update = nnx.jit(update_nnx, donate_argnums=(0, 1)) if jitted else update_nnx
    for grads in GRADS:
        update(model, optimizer, filled(nnx.state(model), grads))
    return nnx_leaves(model, optimizer)


def follow_nnx_functionally(case):
    """Model and optimizer as one state, merged and split again inside `jax.jit`."""
    model = nnx_model(case.dtype)
    like = nnx.state(model)
    definition, state = nnx.split((model, nnx.Optimizer(model, case.tx, wrt=nnx.Param)))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, grads):
        model, optimizer = nnx.merge(definition, state)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer))

    for grads in GRADS:
        state = update(state, filled(like, grads))
    return nnx_leaves(*nnx.merge(definition, state))


def follow_linen(case, jitted):
    model = nn.Dense(64, param_dtype=case.dtype)
    params = filled(model.init(jax.random.key(0), jnp.ones((1, 64))), WEIGHTS)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=case.tx)
    update = lambda state, grads: state.apply_gradients(grads=grads)  # noqa: E731
    update = jax.jit(update, donate_argnums=0) if jitted else update
    for grads in GRADS:
        before, state = state, update(state, filled(state.params, grads))
        kept = [leaf for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim]
        assert all(leaf.is_deleted() == jitted for leaf in kept)
    return jax.tree.leaves(state.params), jax.tree.leaves(state.opt_state)


class EquinoxLayer(eqx.Module):
    """Its function is a leaf too, so that the filtered module has a None."""

    bias: jax.Array
    kernel: jax.Array
    activation: Callable


def equinox_model(dtype):
    return EquinoxLayer(*(jnp.asarray(weight, dtype) for weight in WEIGHTS), jax.nn.relu)


def follow_equinox(case, jitted):
    tx, model = case.tx, equinox_model(case.dtype)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    def update(model, state, grads):
        arrays, rest = eqx.partition(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, arrays)
        return eqx.combine(optax.apply_updates(arrays, updates), rest), state

    update = eqx.filter_jit(update, donate="all") if jitted else update
    for grads in GRADS:
        grads = filled(eqx.filter(model, eqx.is_inexact_array), grads)
        model, state = update(model, state, grads)
    return jax.tree.leaves(eqx.filter(model, eqx.is_array)), jax.tree.leaves(state)


# What a framework does to a state it does to all trees of parts alike: three of them are compiled.
COMPILED = ["int8, int4, compensate int8", "int4, factored", "float16, block_mean, compensate"]
RUNS = [(name, False) for name in CASES] + [(name, True) for name in CASES if name in COMPILED]


@pytest.mark.parametrize(("name", "jitted"), RUNS)
@pytest.mark.parametrize("follow", [follow_nnx, follow_linen, follow_equinox])
@pytest.mark.usefixtures("promoting")
def test_equals_the_plain_loop(follow, jitted, name):
    """Parameters and state, to the bit, in whatever the framework wraps them."""
    actual = follow(CASES[name], jitted)
    chex.assert_trees_all_equal(actual, train_plainly(name, jitted), strict=True)


@pytest.mark.parametrize("name", ["int8, int4, compensate int8", "ademamix, int8"])
@pytest.mark.usefixtures("promoting")
def test_nnx_functional_style(name):
    actual = follow_nnx_functionally(CASES[name])
    chex.assert_trees_all_equal(actual, train_plainly(name, True), strict=True)


def test_nnx_stacked_layers():
    """Each layer gets the updates it would get alone."""
    create = nnx.vmap(lambda rngs: nnx.Linear(64, 64, rngs=rngs))
    layers = nnx.split_rngs(splits=3)(create)(nnx.Rngs(0))
    single = nnx.Linear(64, 64, rngs=nnx.Rngs(0))

    def tx(stacked):
        blocks = functools.partial(storage.transformer_blocks, stacked=stacked)
        return adam_jax.adamw(1e-2, nu_storage=storage.block_mean(blocks))

    of_layer = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: E731
    optimizers = [nnx.Optimizer(single, tx(0), wrt=nnx.Param) for _ in range(3)]
    together = nnx.Optimizer(layers, tx(1), wrt=nnx.Param)
    grads = jax.tree.map(jnp.copy, nnx.state(layers))
    for _ in range(2):
        before = nnx.to_pure_dict(nnx.state(layers))
        updates = together.update(layers, grads)
        for i, alone in enumerate(optimizers):
            nnx.update(single, of_layer(before, i))
            expected = alone.update(single, of_layer(grads, i))
            chex.assert_trees_all_equal(of_layer(updates, i), expected)
    assert together.opt_state[0].nu["kernel"].shape == (3, 1, 64)


def test_nnx_low_precision_gradients():
    """With float32 parameters the updates are float32, as optax's are."""
    model = nnx_model("float32")
    seen = []
    look = optax.stateless(lambda updates, _: seen.extend(jax.tree.leaves(updates)) or updates)
    tx = optax.chain(adam_jax.adamw(1e-7), look)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(lambda weight: weight.astype("bfloat16"), nnx.state(model))
    optimizer.update(model, grads)
    assert {leaf.dtype for leaf in seen} == {jnp.dtype("float32")}


class SharedNNX(nnx.Module):
    """One kernel in two places, statistics and random numbers."""

    def __init__(self, rngs):
        self.first, self.second = (nnx.Linear(64, 64, rngs=rngs) for _ in range(2))
        self.second.kernel = self.first.kernel
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(self.norm(self.first(x))))


@pytest.mark.usefixtures("promoting")
def test_nnx_shared_parameters_and_other_variables():
    model = SharedNNX(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, CASES["amsgrad, int8"].tx, wrt=nnx.Param)
    x = jnp.asarray(WEIGHTS[1], "float32")

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0] / 2
    assert model.first.kernel is model.second.kernel
    kernels = [leaf for leaf in jax.tree.leaves(optimizer.opt_state) if leaf.dtype == "int8"]
    assert len(kernels) == 1
    assert jnp.any(model.norm.mean[...] != 0)


def test_equinox_ensembles():
    """`eqx.filter_vmap` over whole optimizers: each member goes its own way."""
    tx = CASES["lion, int8"].tx
    model = eqx.filter(equinox_model("float32"), eqx.is_inexact_array)
    models = [model, filled(model, GRADS[0])]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    first_step = lambda model: tx.update(model, tx.init(model), model)  # noqa: E731
    actual = eqx.filter_jit(eqx.filter_vmap(first_step))(stack(models))
    chex.assert_trees_all_equal(actual, stack(list(map(eqx.filter_jit(first_step), models))))


@pytest.mark.parametrize(
    "rounding", [adam_jax.compensate, adam_jax.round_stochastically], ids=lambda r: r.__name__
)
@pytest.mark.usefixtures("promoting")
def test_equinox_and_rounding(rounding):
    """`optax.apply_updates` keeps bfloat16; `eqx.apply_updates` leaves the same in float32."""
    tx = optax.chain(adam_jax.adamw(1e-2), rounding())
    model = equinox_model("bfloat16")
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    updates, _ = tx.update(filled(arrays, GRADS[0]), tx.init(arrays), arrays)
    model = eqx.combine(optax.apply_updates(arrays, updates), rest)
    assert model.kernel.dtype == model.bias.dtype == "bfloat16"
    assert model.activation is jax.nn.relu
    wide = eqx.apply_updates(arrays, updates)
    assert wide.kernel.dtype == "float32"
    np.testing.assert_array_equal(wide.kernel, model.kernel.astype("float32"))


# --- What is done with a state besides updating it ------------------------------------------------


BIAS, KERNEL = jax.tree_util.DictKey("bias"), jax.tree_util.DictKey("kernel")
PARAMS = {"layer": {"bias": jnp.ones(64), "kernel": jnp.ones((64, 64))}, "none": None}


def abstract_state(name):
    params = jax.tree.map(lambda p: p.astype(CASES[name].dtype), PARAMS)
    return CASES[name].tx, params, jax.eval_shape(CASES[name].tx.init, params)


@cases
def test_tree_map_params(name):
    """Over all parts of a state that are shaped like the parameters, and back into `update`.

    A second tree beside the state needs `is_leaf`, because a part has None for the leaves that do
    not have it, and the function keeps those.
    """
    tx, params, state = abstract_state(name)
    places = {"layer": {"bias": "bias", "kernel": "kernel"}, "none": None}
    shape_of = lambda part: (part.shape,)  # noqa: E731
    chex.assert_trees_all_equal_structs(
        jax.tree.map(shape_of, state),
        optax.tree_map_params(tx, shape_of, state, transform_non_params=shape_of),
    )
    named = optax.tree_map_params(
        tx,
        lambda part, place: None if part is None else place,
        state,
        places,
        transform_non_params=lambda _: "scalar",
        is_leaf=lambda part: part is None,
    )
    paths = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree))  # noqa: E731
    assert paths(named).keys() == paths(state).keys()
    for path, place in paths(named).items():
        assert place == (path[-1].key if path[-1] in (BIAS, KERNEL) else "scalar")
    again = optax.tree_map_params(tx, lambda part: part, state)
    jax.eval_shape(tx.update, params, again, params)


def test_checkpoint_of_an_nnx_optimizer(tmp_path):
    """Restored into an optimizer that was never computed."""

    def create():
        model = nnx_model("bfloat16")
        return model, nnx.Optimizer(model, CASES["int8, int4, compensate int8"].tx, wrt=nnx.Param)

    model, optimizer = create()
    with jax.numpy_dtype_promotion("standard"):
        optimizer.update(model, nnx.state(model))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(optimizer))
        checkpointer.wait_until_finished()
        _, restored = nnx.eval_shape(create)
        state = checkpointer.restore(tmp_path / "state", nnx.state(restored))
    nnx.update(restored, state)
    chex.assert_trees_all_equal(nnx.state(restored), nnx.state(optimizer))


@cases
@pytest.mark.usefixtures("promoting")
def test_linen_partition_spec(name):
    """Each part of a moment has the layout of its kernel."""
    model = nn.Dense(
        64,
        kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "x")),
        param_dtype=CASES[name].dtype,
    )
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 64)))
    tx = CASES[name].tx
    state = jax.eval_shape(
        lambda params: TrainState.create(apply_fn=model.apply, params=params, tx=tx), params
    )
    specs = nn.get_partition_spec(state)
    assert specs.params["params"]["kernel"] == P(None, "x")
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    for path, spec in jax.tree_util.tree_leaves_with_path(specs.opt_state, is_leaf=is_spec):
        assert spec == (P(None, "x") if KERNEL in path else P())
    # The specs are a prefix of the state, as `out_shardings` of `jax.jit` must be.
    jax.tree.map(lambda spec, part: None, specs, state, is_leaf=is_spec)


def test_linen_sharded_from_the_start():
    """The state is made on the mesh, in the layout of the parameters, and stays there."""
    mesh = mesh_of(x=8)
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "x"))
    model = nn.Dense(64, kernel_init=kernel_init)
    tx = CASES["ademamix, int8"].tx

    def create(key):
        params = model.init(key, jnp.ones((1, 64)))
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def update(state):
        return state.apply_gradients(grads=state.params)

    shardings = nn.get_sharding(jax.eval_shape(create, jax.random.key(0)), mesh)
    state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
    state = jax.jit(update, out_shardings=shardings)(state)
    codes, scales, _ = nn.unbox(state.opt_state[0].mu)
    assert codes["params"]["kernel"].addressable_shards[0].data.shape == (64, 8)
    assert scales["params"]["kernel"].addressable_shards[0].data.shape == (2, 8)
    alone = jax.jit(update)(jax.device_put(create(jax.random.key(0)), jax.devices()[0]))
    chex.assert_trees_all_equal(state.opt_state, alone.opt_state)


def update_twice(tx, params):
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)


def linen_params(kernel_init=nn.initializers.ones):
    return nn.Dense(64, kernel_init=kernel_init).init(jax.random.key(0), jnp.ones((1, 64)))


# What each framework hands to an optimizer, and the place of its one large leaf.
WAYS = {
    "nnx.Optimizer": (lambda tx: follow_nnx(Case(tx), False), "kernel"),
    "nnx.split": (
        lambda tx: update_twice(tx, nnx.split(nnx_model("float32"), nnx.Param)[1]),
        "kernel",
    ),
    "nnx module": (lambda tx: update_twice(tx, nnx_model("float32")), "kernel"),
    "linen": (lambda tx: update_twice(tx, linen_params()), "params/kernel"),
    "linen, boxed": (
        lambda tx: update_twice(
            tx, linen_params(nn.with_partitioning(nn.initializers.ones, (None, "x")))
        ),
        "params/kernel",
    ),
    "equinox": (
        lambda tx: update_twice(tx, eqx.nn.MLP(64, 64, 1, 0, key=jax.random.key(0)).layers),
        "0/weight",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_blocks_get_one_path(way):
    """`block_mean` asks for the same place in `init` and in `update`."""
    asked = []

    def blocks(path, shape):
        asked.append((path, shape))
        return shape[0], 1

    follow, place = WAYS[way]
    follow(adam_jax.adam(1e-2, nu_storage=storage.block_mean(blocks)))
    assert set(asked) == {(place, (64, 64))}


# --- Wrappers that choose between an update and none, and low-precision parameters ----------------


@pytest.mark.parametrize(
    ("wrap", "skipped", "residual"),
    [
        (lambda tx: optax.apply_if_finite(tx, 3), jnp.nan, "bfloat16"),
        (lambda tx: optax.conditionally_transform(tx, lambda step: step != 1), 0.0, "int8"),
        (lambda tx: optax.conditionally_mask(tx, lambda step: step != 1), 1.0, "bfloat16"),
    ],
    ids=["apply_if_finite", "conditionally_transform", "conditionally_mask"],
)
@pytest.mark.usefixtures("promoting")
def test_conditional_wrappers_before_compensate(wrap, skipped, residual):
    """Around the optimizer, not the rounding: as if the skipped step had not been."""
    params = {"w": jnp.asarray(WEIGHTS[0], "bfloat16")}
    grads = [{"w": jnp.asarray(grads[0], "bfloat16")} for grads in GRADS]
    adam, compensate = adam_jax.adamw(1e-3), adam_jax.compensate(residual)
    wrapped, bare = optax.chain(wrap(adam), compensate), optax.chain(adam, compensate)
    skip = {"w": jnp.full(64, skipped, "bfloat16")}

    def train(tx, grads):
        step = plain_step(tx)
        here, state = params, tx.init(params)
        for grad in grads:
            here, state = step(here, state, grad)
        return here, state[-1]

    actual = train(wrapped, [grads[0], skip, *grads[1:]])
    chex.assert_trees_all_equal_dtypes(actual[0], params)
    chex.assert_trees_all_equal(actual, train(bare, grads))


def test_nnx_with_strict_promotion():
    losses, _ = train_nnx(adam_jax.adamw(1e-2))
    assert losses[-1] < losses[0] / 2


def test_an_unfiltered_equinox_module_is_refused_by_name():
    """Its functions are leaves too, and the message says how to leave them out."""
    model = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))
    with refused(TypeError, ".activation equinox.filter"):
        adam_jax.adam(1e-2).init(model)
    adam_jax.adam(1e-2).init(eqx.filter(model, eqx.is_inexact_array))


@pytest.mark.parametrize("how", [None, "bfloat16", storage.int8()])
def test_parameters_with_a_last_field_named_whole(how):
    """They are not taken for the parts of a storage, whose last one has that name."""

    class Weights(NamedTuple):
        kernel: jax.Array
        whole: jax.Array

    params = Weights(jnp.ones((64, 64)), jnp.ones(3))
    tx = adam_jax.adam(1e-2, mu_storage=how)
    updates, _ = tx.update(params, tx.init(params), params)
    assert isinstance(updates, Weights)


# --- In the backward pass -------------------------------------------------------------------------


def stack_of_nnx():
    """Three layers in one module, and a function of the state of one."""

    make = nnx.vmap(lambda key: nnx.Linear(8, 8, rngs=nnx.Rngs(key)))
    graph, layers = nnx.split(make(jax.random.split(jax.random.key(0), 3)))
    return layers, lambda layer, x: nnx.merge(graph, layer)(x)


def stack_of_equinox():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(keys)
    arrays, rest = eqx.partition(layers, eqx.is_inexact_array)
    return arrays, lambda layer, x: jax.vmap(eqx.combine(layer, rest))(x)


def stack_of_linen():
    """As `nn.scan` makes the parameters."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8)(x), None

    scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    layers = scanned().init(jax.random.key(0), jnp.ones((1, 8)), None)
    return layers, lambda layer, x: Layer().apply(layer, x, None)[0]


@pytest.mark.parametrize("how", [None, storage.int8()], ids=["float32", "8-bit"])
@pytest.mark.parametrize("make", [stack_of_nnx, stack_of_equinox, stack_of_linen])
def test_a_stack_of_layers_is_stepped_in_the_backward_pass(make, how):
    layers, call = make()
    tx = adam_jax.adamw(1e-2, mu_storage=how)

    def loss(head, layers):
        layer = lambda x, layer: (x + jnp.tanh(call(layer, x)), None)  # noqa: E731
        x, _ = backward.scan(layer, jnp.tile(X, (1, 3))[:, :8], layers)
        return jnp.mean((x @ head - Y) ** 2)

    step = jax.jit(backward.value_and_step(loss, tx), donate_argnums=(0, 1, 2))
    head, structure = jnp.ones((8, 1)) / 8, jax.tree.structure(layers)
    carry, values = (head, layers, backward.init(tx, head, layers)), []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        due = float(loss(head, layers))
        for _ in range(60):
            value, *carry = step(*carry)
            values.append(float(value))
    assert values[0] == pytest.approx(due)
    assert values[-1] < values[0] / 2
    assert jax.tree.structure(carry[1]) == structure
