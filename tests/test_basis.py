"""Chains in another basis: SOAP and GaLore as published, and the laws of a change of basis."""

import pickle

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import TOLERANCES, assert_close, mesh_of, plain_step, refused, trajectory

import adam_jax
from adam_jax import storage
from adam_jax.basis import Basis, SingularVectors, eigenvectors, singular_vectors

RNG = np.random.default_rng(0)


def fixed(left=None, right=None):
    """A basis of two given matrices, for leaves of their shape."""

    def init(shape, dtype):
        fits = len(shape) == 2 and (left is None or shape[0] == len(left))
        made = [None if side is None else jnp.asarray(side, dtype) for side in (left, right)]
        return SingularVectors(*made) if fits and made != [None, None] else None

    return Basis(
        parts=SingularVectors,
        init=init,
        sides=tuple,
        gather=lambda parts, grad: parts,
        renew=lambda parts, grad, first: parts,
        every=1,
        follows=False,
    )


def orthogonal(n):
    return np.linalg.qr(RNG.normal(size=(n, n)))[0]


# --- As published ---------------------------------------------------------------------------------


def soap(gradients, lr=3e-3, b1=0.95, b2=0.98, eps=1e-8, beta=0.95, every=3):
    """Vyas et al. 2024, algorithms 3 and 4, with Adam's bias correction, as in the authors' code.

    There, too, the first gradient only finds the basis.
    """
    first = gradients[0]
    shape = first.shape
    weights, mean, square = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    left, right = (1 - beta) * first @ first.T, (1 - beta) * first.T @ first
    u, w = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
    yield weights
    for t, grad in enumerate(gradients[1:], 1):
        turned = u.T @ grad @ w
        mean = b1 * mean + (1 - b1) * grad
        square = b2 * square + (1 - b2) * turned**2
        step = u.T @ mean @ w / (1 - b1**t) / (np.sqrt(square / (1 - b2**t)) + eps)
        weights = weights - lr * u @ step @ w.T
        yield weights
        left = beta * left + (1 - beta) * grad @ grad.T
        right = beta * right + (1 - beta) * grad.T @ grad
        if t % every == 0:
            u, w = np.linalg.qr(left @ u)[0], np.linalg.qr(right @ w)[0]


def galore(gradients, rank=2, every=4, lr=1e-2, b1=0.9, b2=0.999, eps=1e-8):
    """Zhao et al. 2024, algorithm 2, for either of the two sides."""
    weights, mean, square = np.zeros(gradients[0].shape), 0.0, 0.0
    for t, grad in enumerate(gradients):
        u, _, wh = np.linalg.svd(grad)
        if t % every == 0:
            p, w = u[:, :rank], wh[:rank].T
        left = grad.shape[0] <= grad.shape[1]
        small = p.T @ grad if left else grad @ w
        mean, square = b1 * mean + (1 - b1) * small, b2 * square + (1 - b2) * small**2
        step = mean / (1 - b1 ** (t + 1)) / (np.sqrt(square / (1 - b2 ** (t + 1))) + eps)
        weights = weights - lr * (p @ step if left else step @ w.T)
        yield weights


PUBLISHED = {
    "SOAP": (adam_jax.in_basis(eigenvectors(every=3), adam_jax.adam(3e-3, b1=0.95, b2=0.98)), soap),
    "GaLore": (adam_jax.in_basis(singular_vectors(2, every=4), adam_jax.adam(1e-2)), galore),
}
each_method = pytest.mark.parametrize("name", PUBLISHED)


@each_method
@pytest.mark.parametrize("shape", [(4, 5), (5, 4)])  # eigenvectors of 0 would be arbitrary
def test_as_published(name, shape, x64):
    tx, algorithm = PUBLISHED[name]
    gradients = [RNG.normal(size=shape) * np.arange(1, 1 + shape[1]) for _ in range(15)]
    path, _ = trajectory(tx, jnp.zeros(shape), gradients)
    for found, due in zip(path, algorithm(gradients), strict=True):
        assert_close(found, due, "reference")


@each_method
def test_a_batch_of_matrices_is_each_of_them(name, x64):
    tx, _ = PUBLISHED[name]
    gradients = RNG.normal(size=(9, 2, 2, 4, 5))
    together, _ = trajectory(tx, jnp.zeros((2, 2, 4, 5)), gradients)
    for i, j in ((0, 0), (1, 0), (1, 1)):
        alone, _ = trajectory(tx, jnp.zeros((4, 5)), gradients[:, i, j])
        assert_close([p[i, j] for p in together], alone, "reference")


# --- Laws -----------------------------------------------------------------------------------------

PARAMS = {
    "kernel": RNG.normal(size=(6, 5)),
    "bias": RNG.normal(size=5),
    "scale": np.float64(0.5),
    "empty": np.zeros((0, 3)),
    "none": None,
}


def tree(dtype="float32"):
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)


def gradients(params, steps=5):
    make = lambda p: jnp.asarray(RNG.normal(size=p.shape), p.dtype)  # noqa: E731
    return [jax.tree.map(make, params) for _ in range(steps)]


def test_the_identity_is_the_chain():
    params = tree()
    grads = gradients(params)
    tx = adam_jax.adamw(1e-2)
    due = trajectory(tx, params, grads)
    found, state = trajectory(adam_jax.in_basis(fixed(), tx), params, grads)
    chex.assert_trees_all_equal((found, state.inner), due)


def test_descent_is_the_same_in_an_orthogonal_basis(x64):
    params = tree("float64")
    grads = gradients(params)
    tx = adam_jax.in_basis(fixed(orthogonal(6), orthogonal(5)), adam_jax.sgd(0.1))
    found, _ = trajectory(tx, params, grads)
    due, _ = trajectory(adam_jax.sgd(0.1), params, grads)
    assert_close(found, due, "reference")


def test_a_permutation_commutes_with_elementwise_chains():
    params = tree()
    grads = gradients(params)
    order = (np.eye(6)[RNG.permutation(6)], np.eye(5)[RNG.permutation(5)])
    tx = adam_jax.nadamw(1e-2)
    found, _ = trajectory(adam_jax.in_basis(fixed(*order), tx), params, grads)
    due, _ = trajectory(tx, params, grads)
    chex.assert_trees_all_close(found, due, rtol=TOLERANCES["contracted"].rtol, atol=1e-7)


@each_method
def test_vectors_and_what_is_left_out_take_the_chain(name):
    """But for the first step, which with SOAP only finds the basis."""
    params = tree() | {"long": jnp.ones((2, 9, 1)), "kernel": None}
    basis = {"SOAP": eigenvectors(largest=8), "GaLore": singular_vectors(1)}[name]
    tx, grads = adam_jax.adam(1e-2), gradients(params)
    skipped = int(basis.follows)
    due, _ = trajectory(tx, params, grads[skipped:])
    found, _ = trajectory(adam_jax.in_basis(basis, tx), params, grads)
    chex.assert_trees_all_equal(found[skipped:], due)


def test_first_moments_turn_with_the_basis(x64):
    """In the leaf's own basis they are what they are without any: they are linear."""
    b1, shape = 0.9, (4, 6)
    tx = adam_jax.in_basis(
        eigenvectors(every=1),
        optax.chain(adam_jax.scale_by_moments(b1, None), adam_jax.first_moment()),
    )
    grads = RNG.normal(size=(7, *shape))
    state = tx.init(jnp.zeros(shape))
    mean = np.zeros(shape)
    for t, grad in enumerate(grads):
        update, state = jax.jit(tx.update)(jnp.asarray(grad), state)
        mean = mean if t == 0 else b1 * mean + (1 - b1) * grad
        assert_close(update, mean, "reference")


@each_method
def test_scan_and_vmap(name, x64):
    tx, _ = PUBLISHED[name]
    params = {"kernel": jnp.asarray(RNG.normal(size=(6, 5))), "bias": jnp.zeros(5)}
    grads = gradients(params, steps=4)

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    run = lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads)  # noqa: E731
    due, _ = trajectory(tx, params, grads)
    assert_close(jax.tree.map(lambda x: x[-1], jax.jit(run)(params, stacked)[1]), due[-1], "fused")
    several = jax.tree.map(lambda x: jnp.stack([x, x]), (params, stacked))
    found = jax.jit(jax.vmap(run))(*several)[1]
    assert_close(jax.tree.map(lambda x: x[1, -1], found), due[-1], "fused")


@each_method
@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_dtypes_and_shapes_stay(name, dtype):
    tx, _ = PUBLISHED[name]
    params = tree(dtype)
    state = tx.init(params)
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(5):
            updates, new = jax.jit(tx.update)(gradients(params, 1)[0], state, params)
            assert described(updates) == described(params)
            assert described(new) == described(state)
            state = new
    chex.assert_tree_all_finite((updates, state))


def test_complex_descent_in_eigenvectors():
    """They are unitary: U U^H is the identity."""
    make = lambda: jnp.asarray(RNG.normal(size=(4, 5, 2)) @ np.array([1, 1j]), "complex64")  # noqa: E731
    grads = [make() for _ in range(6)]
    found, _ = trajectory(
        adam_jax.in_basis(eigenvectors(every=1), adam_jax.sgd(0.1)), jnp.zeros_like(grads[0]), grads
    )
    due, _ = trajectory(adam_jax.sgd(0.1), jnp.zeros_like(grads[0]), grads[1:])
    chex.assert_trees_all_close(found[1:], due, rtol=1e-5, atol=TOLERANCES["contracted"].atol)


# --- Used -----------------------------------------------------------------------------------------


@each_method
def test_in_a_framework_and_in_wrappers(name):
    """Flax NNX rebuilds the state; MultiSteps, apply_if_finite and a mask go around it."""
    tx, _ = PUBLISHED[name]
    wrapped = optax.apply_if_finite(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.masked(tx, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        ),
        3,
    )
    model = nnx.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("standard"):
        optimizer = nnx.Optimizer(model, optax.MultiSteps(wrapped, 2), wrt=nnx.Param)

        @nnx.jit
        def train_step(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda model: jnp.sum(model(jnp.ones((2, 6))) ** 2))(
                model
            )
            optimizer.update(model, grads)
            return loss

        losses = [train_step(model, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_bytes_of_galore():
    """Rank 64 of a 1024 × 4096 matrix: two moments of 64 rows and the vectors."""
    tx = adam_jax.in_basis(singular_vectors(64), adam_jax.adam(1e-3))
    state = jax.eval_shape(tx.init, jnp.zeros((1024, 4096)))
    large = sum(x.size * 4 for x in jax.tree.leaves(state) if x.size > 100 and x.dtype != bool)
    assert large == 4 * (2 * 64 * 4096 + 1024 * 64)


def test_second_moments_in_8_bits():
    params = {"kernel": jnp.ones((64, 80))}
    tx = adam_jax.in_basis(
        eigenvectors(), adam_jax.adam(1e-2, mu_storage=jnp.bfloat16, nu_storage=storage.int8())
    )
    path, state = trajectory(tx, params, gradients(params, 4))
    assert state.inner[0].nu.codes["kernel"].dtype.itemsize == 1
    assert jnp.mean(path[-1]["kernel"] != path[0]["kernel"]) > 0.9


@pytest.mark.parametrize("every", [2, 10])
def test_gradients_of_few_directions(every):
    """32 samples of 70 inputs: the eigenvectors of the others turn from step to step."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 70)), "float32")
    due = jnp.sin(jnp.sum(x, axis=1, keepdims=True))
    rng = np.random.default_rng(1)
    shapes = {"in": (70, 64), "out": (64, 1)}
    params = {
        k: jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, "float32") for k, s in shapes.items()
    }
    tx = adam_jax.in_basis(eigenvectors(every=every), adam_jax.adamw(3e-3, b1=0.95, b2=0.95))

    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - due) ** 2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    losses = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=60)[1])()
    assert jnp.max(losses) == losses[0]
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@each_method
def test_sharded(name, kind):
    """The numbers of one device, and everything stays where `state_shardings` put it."""
    basis = {"SOAP": eigenvectors(every=2), "GaLore": singular_vectors(4, every=2)}[name]
    tx = adam_jax.in_basis(basis, adam_jax.adam(1e-2))
    mesh = mesh_of(kind, data=8)
    grads = RNG.normal(size=(4, 16, 16)).astype("float32")
    due, _ = trajectory(tx, {"kernel": jnp.asarray(grads[0])}, [{"kernel": g} for g in grads])

    for spec, zero in ((P("data", None), None), (P(None, "data"), None), (P(), "data")):
        there = {"kernel": NamedSharding(mesh, spec)}
        params = jax.device_put({"kernel": grads[0]}, there)
        shardings = adam_jax.state_shardings(tx, params, zero=zero)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        sharded_step = jax.jit(plain_step(tx), out_shardings=(there, shardings))
        for grad in grads:
            params, state = sharded_step(params, state, jax.device_put({"kernel": grad}, there))
        assert_close(params, due[-1], "reordered")


@each_method
def test_a_state_survives_a_pickle(name):
    tx, _ = PUBLISHED[name]
    params = tree()
    _, state = trajectory(tx, params, gradients(params))
    again = pickle.loads(pickle.dumps(jax.device_get(state)))  # of NumPy's arrays
    grads = gradients(params, 1)[0]
    chex.assert_trees_all_equal(*(jax.jit(tx.update)(grads, s, params) for s in (state, again)))
    tx.update(grads, again, params)


def test_specs_of_the_parameters_go_onto_the_state():
    """As users write it: optax.tree_map_params with a tree of specs."""
    params = {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5), "stack": jnp.ones((2, 6, 1))}
    specs = {"kernel": P("x", None), "bias": P("x"), "stack": P(None, "x", None)}
    for tx in (tx for tx, _ in PUBLISHED.values()):
        state = jax.eval_shape(tx.init, params)
        found = optax.tree_map_params(tx, lambda _, spec: spec, state, specs)
        for trees in (found.basis, (found.inner[0].mu, found.inner[0].nu)):
            assert all(tree == specs for tree in trees)
        for part in state.basis:
            assert {k: x.ndim for k, x in part.items()} == {"kernel": 2, "bias": 1, "stack": 3}


@each_method
def test_shapes_in_init(name):
    """Of jax.eval_shape inside, as of the parameters themselves."""
    tx, _ = PUBLISHED[name]
    params = tree()
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        tx.init(shapes), tx.init(params), jax.eval_shape(tx.init, params)
    )


@each_method
def test_an_unfiltered_model(name):
    """In Equinox a model has parameters without gradients: None in their place."""
    tx, _ = PUBLISHED[name]
    params = tree()
    grads = gradients(params, 2)
    due, _ = trajectory(tx, params, grads)
    model, state = params | {"none": 2.0}, tx.init(params)
    for grad, new in zip(grads, due, strict=True):
        updates, state = tx.update(grad, state, model)
        assert updates["none"] is None
        model = eqx.apply_updates(model, updates)
        assert_close(model, new | {"none": 2.0}, "contracted")


@each_method
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_derivatives(name, mode):
    """By the rate and the weights, from a gradient of 0 on: finite, the basis held fixed."""
    shape = (4, 5)
    targets = jnp.asarray(RNG.normal(size=shape), "float32")

    def loss(params):
        return jnp.sum((jnp.sin(params) * params - targets) ** 2)

    def after_steps(rate, params):
        tx = {
            "SOAP": lambda: adam_jax.in_basis(eigenvectors(every=2), adam_jax.adam(rate)),
            "GaLore": lambda: adam_jax.in_basis(singular_vectors(2, every=2), adam_jax.adam(rate)),
        }[name]()

        def step(carry, scale):
            params, state = carry
            grads = scale * jax.grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (params + updates, state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.array([0.0, 0, 1, 1, 1]))
        return loss(params)

    derive = {"forward": jax.jacfwd, "reverse": jax.jacrev}[mode]
    derivatives = jax.jit(derive(after_steps, argnums=(0, 1)))(jnp.float32(1e-2), jnp.ones(shape))
    chex.assert_tree_all_finite(derivatives)
    assert abs(derivatives[0]) > 0


# --- Refused --------------------------------------------------------------------------------------


@each_method
def test_gradients_that_do_not_match(name):
    tx, _ = PUBLISHED[name]
    params = {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)}
    state = tx.init(params)
    bias = {"bias": params["bias"]}
    for grads, names in (
        (bias | {"kernel": jnp.ones((7, 5))}, "(7, 5) ['kernel']"),
        (bias | {"kernel": jnp.ones(30)}, "(30,) ['kernel']"),
        (bias | {"kernel": jnp.ones((2, 6, 5))}, "(2, 6, 5) ['kernel']"),
        (bias | {"kernel": None}, "no gradient ['kernel']"),
        (bias, "tree"),
    ):
        if grads.get("kernel") is not None and name == "GaLore" and grads["kernel"].ndim == 2:
            continue  # of the longer side it keeps no basis; the moments tell
        with refused(ValueError, f"{names} init()"):
            tx.update(grads, state, params)


def test_refusals():
    with refused(TypeError, "adam_jax.basis eigenvectors"):
        adam_jax.in_basis(adam_jax.adam(1e-3), eigenvectors())
    tx = adam_jax.in_basis(eigenvectors(), adam_jax.adam(1e-3, mu_storage=storage.int8()))
    with refused(ValueError, "codes kernel"):
        tx.init({"kernel": jnp.ones((64, 80))})
    tx = adam_jax.in_basis(eigenvectors(), adam_jax.scale_by_moments())
    with refused(TypeError, "in_basis Moments"):
        tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))))
    for make, names in (
        (lambda: eigenvectors(1.0), "decay 1.0"),
        (lambda: eigenvectors(every=0), "every 0"),
        (lambda: eigenvectors(largest=-1), "largest -1"),
        (lambda: singular_vectors(0), "rank 0"),
        (lambda: singular_vectors(2, every=0), "every 0"),
    ):
        with refused(ValueError, names):
            make()
    with refused(TypeError, "rank integer 0.5"):
        singular_vectors(0.5)
