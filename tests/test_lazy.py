"""Lazy rows: PyTorch's SparseAdam, the laws on every member, and what is refused."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from support import assert_close, make_step, mesh_of, refused, trajectory
from tables import MEMBERS, keeping
from torch_references import STEPS, Given, Run, recorded

import adam_jax
from adam_jax import storage

ROWS, COLUMNS = 40, 3


def sparse_gradients(rng, steps, rows=ROWS, columns=COLUMNS, most=6):
    """For each step a few rows with gradients, at times none; never the last row."""
    gradients = np.zeros((steps, rows, columns))
    for grads in gradients:
        reached = rng.choice(rows - 1, rng.integers(most), replace=False)
        grads[reached] = rng.normal(size=(len(reached), columns)) * 10 ** rng.uniform(-3, 3)
    return gradients


def bits(tree):
    """Every array as bytes, so that -0 differs from 0."""
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


def scanned(tx, params, gradients):
    """The parameters after every step."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]


# --- PyTorch --------------------------------------------------------------------------------------


def sparse_adam(dtype, **options):
    """300 steps of PyTorch's SparseAdam."""
    rng = np.random.default_rng(0)
    gradients = sparse_gradients(rng, 300).astype(dtype)
    table = rng.normal(size=(ROWS, COLUMNS)).astype(dtype)
    problem = Given(f"sparse, {dtype}", {"table": table}, {"table": gradients})
    return Run(problem, "SparseAdam", options, [step for step in STEPS if step <= 300])


IN_FLOAT64 = [
    sparse_adam("float64", lr=1e-3, betas=(0.9, 0.999), eps=1e-8),
    sparse_adam("float64", lr=1e-1, betas=(0.8, 0.99), eps=1e-3),
]
IN_FLOAT32 = sparse_adam("float32", lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
RUNS = [*IN_FLOAT64, IN_FLOAT32]


@pytest.mark.parametrize("run", IN_FLOAT64, ids=str)
@pytest.mark.usefixtures("x64")
def test_sparse_adam(run):
    check_sparse_adam(run, "torch")


def test_sparse_adam_in_float32():
    check_sparse_adam(IN_FLOAT32, "sparse")


def check_sparse_adam(run, tolerance):
    rate, betas, eps = run.options.values()
    table, gradients = run.problem.params["table"], run.problem.gradients["table"]
    tx = adam_jax.lazy(adam_jax.adam(rate, *betas, eps=eps, eps_hat=True))

    ours = scanned(tx, jnp.asarray(table), jnp.asarray(gradients))
    assert_close(ours[run.rows], recorded(run)["table"], tolerance)
    assert np.array_equal(ours[-1][-1], table[-1])  # a row that no step reached
    assert np.max(np.abs(ours[-1][0] - table[0])) > rate


# --- The laws -------------------------------------------------------------------------------------

CASES = {
    **{name: (member(1e-2), "float32") for name, member in MEMBERS.items()},
    "clipped": (optax.chain(optax.clip_by_global_norm(1.0), adam_jax.adamw(1e-2)), "float32"),
    "apply_if_finite": (optax.apply_if_finite(adam_jax.adam(1e-2), 3), "float32"),
    "fused": (adam_jax.fuse(adam_jax.adamw(1e-2)), "float32"),
    "rows mixed": (
        optax.chain(
            adam_jax.adam(1e-2),
            optax.stateless(lambda u, _: jax.tree.map(lambda u: u + u[::-1], u)),
        ),
        "float32",
    ),
    "rmsprop, centered": (adam_jax.rmsprop(1e-2, centered=True, momentum=0.9), "float32"),
    "schedules": (
        adam_jax.adamw(optax.linear_schedule(1e-2, 0.0, 9), b1=lambda t: 0.9 - 0.1 / (t + 1.0)),
        "float32",
    ),
    "injected": (
        optax.inject_hyperparams(adam_jax.adamw, hyperparam_dtype=jnp.float32)(1e-2),
        "float32",
    ),
    "stochastic storage": (adam_jax.adamw(1e-2, **keeping("stochastic")), "float32"),
    "rounded": (
        optax.chain(adam_jax.adamw(1e-2), adam_jax.round_stochastically()),
        "bfloat16",
    ),
    "compensated": (optax.chain(adam_jax.adamw(1e-2), adam_jax.compensate("int8")), "bfloat16"),
    "bfloat16": (adam_jax.adamw(1e-2), "bfloat16"),
    "complex": (adam_jax.adamw(1e-2), "complex64"),
    "optax.adamw": (optax.adamw(1e-2), "float32"),
    "a partition": (
        optax.partition({"a": adam_jax.adam(1e-2), "b": adam_jax.adamw(1e-1)}, "b"),
        "float32",
    ),
}


REACHED = np.array([True, False, True, False, False, True])


@pytest.mark.parametrize("case", CASES)
def test_rows_without_a_gradient_stay_and_the_others_are_those_of_the_chain(case):
    """Bit for bit, weights and state, at a second step, where all rows have been reached once."""
    tx, dtype = CASES[case]
    check_rows(tx, {"table": (6, 2)}, dtype)


def test_leaves_of_any_shape():
    shapes = {"vector": (6,), "stack": (6, 2, 2), "empty": (0, 3), "none": None}
    check_rows(adam_jax.adamw(1e-2), shapes, "float32")


def check_rows(tx, shapes, dtype):
    rng = np.random.default_rng(0)

    def random_tree():
        return {
            name: None if shape is None else jnp.asarray(rng.normal(size=shape), dtype)
            for name, shape in shapes.items()
        }

    def reached_alone(grad):
        rows = REACHED[: len(grad)].reshape(-1, *[1] * (grad.ndim - 1))
        return jnp.where(rows, grad, jnp.zeros_like(grad))

    def check(*leaves):
        found, due, old = map(np.asarray, leaves)
        if found.shape[:1] == REACHED.shape:
            assert bits(found[REACHED]) == bits(due[REACHED])
            assert bits(found[~REACHED]) == bits(old[~REACHED])

    lazy, params = adam_jax.lazy(tx), random_tree()
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(params, lazy.init(params), params)
        params = optax.apply_updates(params, updates)
        grads = jax.tree.map(reached_alone, random_tree())
        due, due_state = tx.update(grads, state, params)
        updates, new_state = lazy.update(grads, state, params)
        new, due_new = (optax.apply_updates(params, each) for each in (updates, due))
    jax.tree.map(check, updates, due, jax.tree.map(lambda x: -np.zeros_like(x), updates))
    jax.tree.map(check, new_state, due_state, state)
    jax.tree.map(check, new, due_new, params)
    paths = jax.tree_util.tree_leaves_with_path(new_state)
    counts = [x for path, x in paths if path[-1] == jax.tree_util.GetAttrKey("count")]
    assert all(count == 2 for count in counts)


def test_a_scalar_is_one_row():
    """Of a scalar that is the whole tree, counts are told from moments."""
    tx = adam_jax.lazy(adam_jax.adam(0.1))
    scalar = jnp.float32(2.0)
    _, state = tx.update(scalar, tx.init(scalar), scalar)
    update, new = tx.update(jnp.float32(0.0), state, scalar)
    assert update == 0
    assert (new[0].mu, new[0].nu) == (state[0].mu, state[0].nu)
    assert new[0].count == 2
    assert jnp.all(new[0].weights[0] > state[0].weights[0])


def test_nan_and_minus_zero():
    """A gradient that is not a number is one; a weight of -0 stays it."""
    tx = adam_jax.lazy(adam_jax.adam(0.1))
    table = jnp.array([[-0.0, 1.0], [1.0, 2.0], [-0.0, -0.0]])
    grads = jnp.zeros((3, 2)).at[1, 0].set(jnp.nan)
    updates, _ = tx.update(grads, tx.init(table), table)
    new = table + updates
    assert jnp.isnan(new[1, 0])
    assert bits(new[jnp.array([0, 2])]) == bits(table[jnp.array([0, 2])])


def steps(tx, params, gradients):
    """The parameters after every step, call by call."""
    state, path = tx.init(params), []
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return jnp.stack(path)


@pytest.fixture
def problem(x64):
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.normal(size=(4, 2))), jnp.asarray(sparse_gradients(rng, 4, 4, 2, 4))


LAZY = adam_jax.lazy(adam_jax.adamw(1e-2, weight_decay=0.1))


def test_cutting_a_leaf_into_rows_commutes(problem):
    params, gradients = problem[0], problem[1][:3]
    whole = steps(LAZY, params, gradients)
    rows = [steps(LAZY, params[i : i + 1], gradients[:, i : i + 1]) for i in range(len(params))]
    chex.assert_trees_all_equal(jnp.concatenate(rows, axis=1), whole)


def test_jit_scan_vmap(problem):
    params, gradients = problem
    due = steps(LAZY, params, gradients)
    assert_close(jnp.stack(trajectory(LAZY, params, gradients)[0]), due, "fused")
    two = jnp.stack([params, params[::-1]]), jnp.stack([gradients, gradients[:, ::-1]])
    found = jax.vmap(partial(scanned, LAZY))(*two)
    assert_close(found, jnp.stack([due, due[:, ::-1]]), "fused")


def test_all_rows_reached_is_the_chain_under_jit():
    """Bit for bit in what XLA makes of the two for a user: of the step with the parameters too."""
    rng = np.random.default_rng(0)
    start, *gradients = jnp.asarray(rng.normal(size=(11, 50, 20)), jnp.float32)

    def trained(tx):
        step = make_step(tx)
        params, state = start, tx.init(start)
        for grads in gradients:
            params, state, _ = step(params, state, grads)
        return params, state

    adamw = adam_jax.adamw(1e-2)
    chex.assert_trees_all_equal(trained(adam_jax.lazy(adamw)), trained(adamw))


# --- Inside and around ----------------------------------------------------------------------------


def check_rows_stay(tx, shape):
    params = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    grads = jnp.where(jnp.expand_dims(REACHED, tuple(range(1, params.ndim))), params, 0)
    lazy = adam_jax.lazy(tx)
    _, state = tx.update(params, tx.init(params), params)
    updates, new = lazy.update(grads, state, params)
    due, due_state = tx.update(grads, state, params)
    old = -jnp.zeros_like(updates), state[0].mu, state[0].nu
    for found, whole, before in zip(
        *map(jax.tree.leaves, ((updates, *new[0][1:3]), (due, *due_state[0][1:3]), old)),
        strict=True,
    ):
        if found.dtype != bool:  # a placeholder
            assert bits(found[~REACHED]) == bits(before[~REACHED])
            assert bits(found[REACHED]) == bits(whole[REACHED])


def test_blocks_inside_a_row():
    """Of a stack in 8 bits the codes and scales of a row are its own."""
    tx = adam_jax.adamw(1e-2, **keeping(storage.int8(block=4)))
    assert tx.init(jnp.ones((6, 40, 40)))[0].mu.codes.dtype == jnp.int8
    check_rows_stay(tx, (6, 40, 40))


LABELS = {"table": "lazy", "head": "dense"}
WRAPPED = {
    "a chain, clipped before": optax.chain(optax.clip_by_global_norm(1.0), LAZY),
    "masked": optax.chain(
        optax.masked(LAZY, {"table": True, "head": False}),
        optax.masked(adam_jax.adam(1e-2), {"table": False, "head": True}),
    ),
    "partition": optax.partition({"lazy": LAZY, "dense": adam_jax.adam(1e-2)}, LABELS),
    "injected": optax.inject_hyperparams(
        lambda learning_rate: adam_jax.lazy(adam_jax.adam(learning_rate))
    )(1e-2),
    "MultiSteps": optax.MultiSteps(LAZY, 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(LAZY, 3),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers(name):
    """Whatever is around it, rows that no step reached stay, and the others move."""
    tx = WRAPPED[name]
    params = {"table": jnp.ones((5, 2)), "head": jnp.ones(3)}
    grads = {"table": jnp.zeros((5, 2)).at[1].set(2.0), "head": jnp.full(3, 2.0)}
    update, state, new = jax.jit(tx.update), tx.init(params), params
    with jax.numpy_dtype_promotion("standard"):  # optax's wrappers need it
        for _ in range(4):
            updates, state = update(grads, state, new)
            new = optax.apply_updates(new, updates)
    rest = jnp.array([0, 2, 3, 4])
    assert bits(new["table"][rest]) == bits(params["table"][rest])
    assert jnp.all(new["table"][1] < 0.99)
    assert jnp.all(new["head"] < 0.99)


class Tables(nnx.Module):
    def __init__(self):
        self.users = nnx.Embed(6, 2, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(2, 1, rngs=nnx.Rngs(1))


def test_flax():
    """A batch with two users changes their rows alone, in a partition by the path."""
    model = Tables()
    before = jax.tree.map(np.array, nnx.state(model))
    labels = partial(
        jax.tree_util.tree_map_with_path, lambda path, _: "users" in jax.tree_util.keystr(path)
    )
    optimizers = {True: adam_jax.lazy(adam_jax.adamw(0.1)), False: adam_jax.adamw(0.1)}
    optimizer = nnx.Optimizer(model, optax.partition(optimizers, labels), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        loss = lambda model: jnp.sum(model.head(model.users(batch)) ** 2)  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))

    with jax.numpy_dtype_promotion("standard"):
        step(model, optimizer, jnp.array([1, 4]))
        step(model, optimizer, jnp.array([1, 1]))
    old, new = (state["users"]["embedding"][...] for state in (before, nnx.state(model)))
    changed = [row for row in range(6) if bits(old[row]) != bits(new[row])]
    assert changed == [1, 4]
    assert bits(before["head"]) != bits(nnx.state(model)["head"])


def test_devices_with_whole_rows(problem):
    """Inside jax.shard_map each has some rows, and the numbers are those of one device."""
    params, gradients = problem
    mesh = mesh_of(x=2)
    run = jax.shard_map(
        lambda params, gradients: scanned(LAZY, params, gradients),
        mesh=mesh, in_specs=(P("x"), P(None, "x")), out_specs=P(None, "x"),
    )  # fmt: skip
    assert_close(jax.jit(run)(params, gradients), scanned(LAZY, params, gradients), "fused")


def test_an_unfiltered_model():
    """In Equinox a model has parameters without gradients: None in their place."""
    model = {"table": jnp.ones((3, 2)), "scale": 2.0, "name": "tables"}
    grads = {"table": jnp.ones((3, 2)).at[1].set(0), "scale": None, "name": None}
    tx = adam_jax.lazy(adam_jax.adamw(0.1))
    state = tx.init({"table": model["table"], "scale": None, "name": None})
    updates, new = tx.update(grads, state, model)
    assert updates["scale"] is None
    assert np.array_equal(updates["table"] != 0, grads["table"] != 0)
    assert np.array_equal(new[0].mu["table"] != 0, grads["table"] != 0)


def test_a_norm_is_that_of_the_whole_gradient():
    """Of one leaf and of several, whatever rows it has."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}
    updates, _ = adam_jax.lazy(tx).update(grads, tx.init(grads), grads)
    chex.assert_trees_all_close(updates, {"a": jnp.array([-0.6, 0]), "b": jnp.array([0, -0.8])})


def test_leaves_of_which_one_needs_the_other():
    params = {"a": jnp.array([1.0, 0.0, 2.0]), "b": jnp.array([0.0, 3.0, 4.0])}
    tx = adam_jax.lazy(optax.stateless(lambda updates, _: dict.fromkeys(updates, updates["b"])))
    updates, _ = tx.update(params, tx.init(params), params)
    assert bits(updates) == bits({"a": jnp.array([0.0, -0.0, 4.0]), "b": jnp.array([-0.0, 3, 4])})


def test_means_inside_a_row():
    """One second moment a row, as Adam-mini has for an embedding, is the row's own."""
    means = storage.block_mean(lambda path, shape: (1, shape[1]))
    check_rows_stay(adam_jax.adamw(1e-2, nu_storage=means), (6, 1024))


# --- What is refused ------------------------------------------------------------------------------

WITHOUT_ROWS = {
    "mu.codes": adam_jax.adam(1e-3, mu_storage=storage.int4()),
    "mu.scales": adam_jax.adam(1e-3, mu_storage=storage.int8()),
    "nu.columns": adam_jax.adam(1e-3, nu_storage=storage.factored()),
    "nu['kernel']": adam_jax.adam(
        1e-3, nu_storage=storage.block_mean(lambda path, shape: (shape[0], 1))
    ),
    "v_row": optax.adafactor(1e-3, min_dim_size_to_factor=32),
    "diff_params_memory": optax.lbfgs(1e-3, linesearch=None),
}


@pytest.mark.parametrize("part", WITHOUT_ROWS)
@pytest.mark.parametrize("shape", [(64, 128), (128, 128)])
def test_what_has_no_rows_of_a_leaf_is_refused_by_name(part, shape):
    """Before any arithmetic: from the shapes alone."""
    tx, params = adam_jax.lazy(WITHOUT_ROWS[part]), {"kernel": jnp.ones(shape)}
    with refused(ValueError, f"['kernel'] {part} optax.partition"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("shape", [(8, 8), (8, 1)])
def test_another_basis_has_other_rows(shape):
    tx, params = adam_jax.in_basis(adam_jax.basis.eigenvectors(), adam_jax.adam(1e-3)), {}
    tx, params = adam_jax.lazy(tx), {"kernel": jnp.ones(shape), "bias": jnp.ones(3)}
    with refused(ValueError, "in_basis optax.partition"):
        tx.update(params, tx.init(params), params)
    vectors = {"bias": params["bias"]}
    tx.update(vectors, tx.init(vectors), vectors)


def test_a_part_of_a_chain_is_refused():
    params = jnp.ones(3)
    head = adam_jax.lazy(adam_jax.scale_by_moments())
    with refused(TypeError, "lazy chain"):
        head.update(params, head.init(params))
    tail = optax.chain(adam_jax.scale_by_moments(), adam_jax.lazy(adam_jax.bias_correct()))
    with refused(TypeError, "lazy Moments"):
        tail.update(params, tail.init(params))


def test_a_kernel_does_not_know_whole_rows():
    tx = adam_jax.fuse(adam_jax.lazy(adam_jax.adam(1e-3)))
    params = jnp.ones((64, 128))
    with refused(ValueError, "lazy 'reduce_or'"):
        jax.jit(tx.update)(params, tx.init(params), params)
