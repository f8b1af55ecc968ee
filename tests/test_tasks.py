"""Several losses: the laws of their combinations, and the papers' algorithms in NumPy."""

import functools
import itertools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import optimize
from support import assert_close, mesh_of, refused

import adam_jax
from adam_jax import tasks
from adam_jax._random import random_bits

METHODS = {
    "weighted": lambda k: tasks.weighted(np.full(k, 1 / k)),
    "mgda": lambda k: tasks.mgda(),
    "cagrad": lambda k: tasks.cagrad(0.5),
    "pcgrad": lambda k: tasks.pcgrad(seed=3),
    "aligned_mtl": lambda k: tasks.aligned_mtl(),
    "gradnorm": lambda k: tasks.gradnorm(k),
}
each_method = pytest.mark.parametrize("method", METHODS)
SIZE = 12


def tree(matrix):
    """The rows of a matrix as gradients of a tree: a matrix, a scalar, a vector, None, nothing."""
    matrix = jnp.asarray(matrix)
    k = len(matrix)
    return {
        "kernel": matrix[:, :6].reshape(k, 2, 3),
        "scale": matrix[:, 6],
        "bias": matrix[:, 7:],
        "frozen": None,
        "empty": matrix[:, :0].reshape(k, 0, 3),
    }


def vector(update):
    """What `tree` made of a vector, as it was."""
    return np.concatenate([np.ravel(update[name]) for name in ("kernel", "scale", "bias")])


@functools.partial(jax.jit, static_argnums=0)
def first_step(method, grads, c):
    """Of a method, as a function of the gradients, of which each leaf has the axis of tasks."""
    k = len(jax.tree.leaves(grads)[0])
    stage = tasks.cagrad(c) if method == "cagrad" else METHODS[method](k)
    return stage.update(grads, stage.init(None), value=jnp.ones(k))[0]


def combined(method, matrix, dtype=float, c=0.5):
    """What a method makes of the rows of a matrix."""
    return np.asarray(first_step(method, jnp.asarray(matrix, dtype), jnp.asarray(c, float)))


@st.composite
def problems(draw, least=2, most=4):
    """Gradients of norm 1 at most: near to each other, or far, or in conflict, of any sizes."""
    k = draw(st.sampled_from([k for k in (1, 2, 4) if least <= k <= most]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    matrix = rng.normal(size=(k, SIZE)) + draw(st.sampled_from([0.0, 2.0])) * rng.normal(size=SIZE)
    if draw(st.booleans()):
        matrix[:, 2:] = 0  # no more than two of them are independent
    matrix *= 10 ** (draw(st.sampled_from([0.0, 1.0, 3.0])) * rng.uniform(-1, 0, size=(k, 1)))
    return matrix / np.linalg.norm(matrix, axis=1).max()


few = settings(max_examples=15)


# --- Each is its paper's algorithm ----------------------------------------------------------------


def shortest(matrix):
    """The shortest convex combination, by trying all sets of tasks that may take part."""
    products, best = matrix @ matrix.T, None
    for size in range(1, len(matrix) + 1):
        for chosen in map(list, itertools.combinations(range(len(matrix)), size)):
            # Equal inner products with the combination, and weights of sum 1.
            system = np.ones((size + 1, size + 1))
            system[:size, :size], system[size, size] = products[np.ix_(chosen, chosen)], 0
            weights = np.linalg.lstsq(system, np.eye(size + 1)[size], rcond=None)[0][:size]
            if weights.min() >= -1e-12:
                point = weights @ matrix[chosen]
                best = point if best is None or point @ point < best @ best else best
    return best


@given(problems())
@few
def test_mgda_is_the_shortest_combination(x64, matrix):
    assert_close(combined("mgda", matrix), shortest(matrix), "minimum")


@given(problems(2, 2))
@few
def test_mgda_of_two_tasks_is_sener_and_koltuns_algorithm_1(x64, matrix):
    one, two = matrix
    if one @ two >= one @ one:
        share = 1.0
    elif one @ two >= two @ two:
        share = 0.0
    else:
        share = (two - one) @ two / ((one - two) @ (one - two))
    assert_close(combined("mgda", matrix), share * one + (1 - share) * two, "reference")


def frank_wolfe(matrix, steps):
    """Sener and Koltun's algorithm 2: its steps go to a vertex, and near the end very slowly."""
    weights, products = np.full(len(matrix), 1 / len(matrix)), matrix @ matrix.T
    for _ in range(steps):
        vertex = np.eye(len(matrix))[np.argmin(products @ weights)]
        line = vertex - weights
        size = line @ products @ line
        if size > 0:
            weights = weights + np.clip(-(line @ products @ weights) / size, 0, 1) * line
    return weights @ matrix


@given(problems(3))
@few
def test_mgda_is_where_sener_and_koltuns_algorithm_2_goes(x64, matrix):
    ours, theirs = (np.linalg.norm(d) for d in (combined("mgda", matrix), frank_wolfe(matrix, 300)))
    assert ours - 1e-9 <= theirs <= ours + 0.02


@given(problems())
@few
def test_mgda_meets_the_conditions_of_a_minimum(x64, matrix):
    """Karush, Kuhn and Tucker: weights on the simplex; no task has less than those that count."""
    point = combined("mgda", matrix)
    inner = matrix @ point
    assert inner.min() >= point @ point - 1e-9
    if np.linalg.matrix_rank(matrix, tol=1e-6) == len(matrix):  # else the weights are not unique
        weights = np.linalg.lstsq(matrix.T, point, rcond=None)[0]
        assert weights.min() >= -1e-6
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        assert np.abs(weights * (inner - point @ point)).max() < 1e-9


@given(problems(), st.sampled_from([0.0, 0.1, 0.5, 0.9, 5.0]))
@few
def test_cagrad_is_optimal(x64, matrix, c):
    """A direction in the ball, and a bound on what any can reach there: they meet."""
    mean = matrix.mean(axis=0)
    radius = c * np.linalg.norm(mean)
    direction = (1 + c) * combined("cagrad", matrix, c=c)
    assert np.linalg.norm(direction - mean) <= radius + 1e-9
    bound = lambda w: w @ matrix @ mean + radius * np.linalg.norm(w @ matrix)  # noqa: E731
    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
    start = np.full(len(matrix), 1 / len(matrix))
    least = optimize.minimize(
        bound, start, bounds=[(0, 1)] * len(matrix), constraints=simplex, tol=1e-12
    )
    # As the authors solve it; where the sum of the tasks can be 0 it has a kink there.
    if np.linalg.norm(shortest(matrix)) > 1e-3:
        assert (matrix @ direction).min() == pytest.approx(least.fun, abs=1e-6)


@given(problems(2, 2))
@few
def test_cagrad_of_two_tasks_is_the_authors_code(x64, matrix):
    """Their toy.py, without the constants that it adds to norms."""
    one, two = matrix
    mean, c = (one + two) / 2, 0.5
    radius = c * np.linalg.norm(mean)
    between = lambda x: x * one + (1 - x) * two  # noqa: E731
    objective = lambda x: between(x) @ mean + radius * np.linalg.norm(between(x))  # noqa: E731
    x = optimize.minimize_scalar(
        objective, bounds=(0, 1), method="bounded", options={"xatol": 1e-12}
    ).x
    if np.linalg.norm(shortest(matrix)) > 1e-3:
        theirs = (mean + radius * between(x) / np.linalg.norm(between(x))) / (1 + c)
        np.testing.assert_allclose(combined("cagrad", matrix), theirs, atol=1e-5)


def surgery(matrix, order):
    """Yu et al., algorithm 1, with the mean for the sum."""
    parts = matrix.copy()
    for i, others in enumerate(order):
        for j in others:
            if i != j and parts[i] @ matrix[j] < 0:
                parts[i] -= parts[i] @ matrix[j] / (matrix[j] @ matrix[j]) * matrix[j]
    return parts.mean(axis=0)


@functools.partial(jax.jit, static_argnums=1)
def order_of(step, k):
    bits = random_bits(3, "pcgrad", 0, step, jnp.zeros((k, k)))
    return jnp.argsort(bits, axis=1)


@given(problems())
@few
def test_pcgrad_is_the_papers_algorithm(x64, matrix):
    order = np.asarray(order_of(0, len(matrix)))
    assert_close(combined("pcgrad", matrix), surgery(matrix, order), "reference")


def test_pcgrad_meets_the_others_in_every_order():
    """Over the steps each task of four meets each of the others first equally often."""
    steps = 600
    orders = np.asarray(jax.vmap(order_of, (0, None))(jnp.arange(steps), 4))
    assert np.all(np.sort(orders, axis=-1) == np.arange(4))
    first = np.stack([(orders[:, :, 0] == j).mean(axis=0) for j in range(4)])
    assert np.abs(first - 1 / 4).max() < 4 * np.sqrt(1 / 4 * 3 / 4 / steps)
    assert len({order.tobytes() for order in orders}) > steps / 2


def test_pcgrad_draws_by_seed_and_step():
    grads = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    runs = {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        stage = tasks.pcgrad(seed)
        state, runs[name] = stage.init(grads[0]), []
        for _ in range(3):
            update, state = stage.update(grads, state)
            runs[name].append(np.asarray(update))
        assert state.count == 3
    np.testing.assert_array_equal(runs["one"], runs["same"])
    assert not np.array_equal(runs["one"], runs["other"])
    assert not np.array_equal(runs["one"][0], runs["one"][1])


@given(problems())
@few
def test_aligned_mtl_is_the_papers_algorithm(x64, matrix):
    """By the singular values of the gradients themselves, where the stage has only products."""
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    kept = sizes**2 > len(matrix) * np.finfo(float).eps * sizes[0] ** 2
    aligned = sizes[kept][-1] * left[:, kept] @ right[kept]
    if sizes[kept][-1] > 1e-5:  # the products have half the digits
        assert_close(combined("aligned_mtl", matrix), aligned.mean(axis=0), "minimum")


def test_gradnorm_is_the_papers_algorithm(x64):
    """Chen et al., algorithm 1, with Adam for the weights, by 50 steps of random gradients."""
    rng, k, alpha, rate = np.random.default_rng(2), 3, 1.5, 0.025
    stage = tasks.gradnorm(k, alpha, learning_rate=rate)
    state, step = stage.init(jnp.zeros(SIZE)), jax.jit(stage.update)
    weights, mu, nu, initial = np.ones(k), np.zeros(k), np.zeros(k), None
    for t in range(1, 51):
        grads, losses = rng.normal(size=(k, SIZE)) * [[1], [3], [0.2]], rng.uniform(0.5, 2, k)
        update, state = step(jnp.asarray(grads), state, value=jnp.asarray(losses))
        assert_close(update, weights @ grads / k, "reference")
        initial = losses if initial is None else initial
        norms = np.linalg.norm(grads, axis=1)
        rates = losses / initial / (losses / initial).mean()
        slope = norms * np.sign(weights * norms - (weights * norms).mean() * rates**alpha)
        mu, nu = 0.9 * mu + 0.1 * slope, 0.999 * nu + 0.001 * slope**2
        adam = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8)
        weights = np.maximum(weights - rate * adam, 0)
        weights *= k / weights.sum()
        assert_close(state.weights, weights, "reference")
    assert weights[1] < weights[0] < weights[2]  # the longest gradient has the least weight


def test_gradnorm_comes_back_from_a_weight_of_zero():
    stage = tasks.gradnorm(2, learning_rate=2.0)
    grads = jnp.array([[3.0], [1.0]])

    def step(state, _):
        _, state = stage.update(grads, state, value=jnp.ones(2))
        return state, state.weights

    weights = np.asarray(jax.lax.scan(step, stage.init(jnp.zeros(1)), length=30)[1])
    assert np.min(weights) == 0
    assert weights[-1].min() >= 0
    assert max(w[0] for w in weights[1:]) > 0
    assert_close(np.sum(weights, axis=1), np.full(30, 2.0), "float32 mean")


# --- Laws -----------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0, 1e12])
def test_one_task_is_the_identity(method, size):
    """Bitwise, for all of them."""
    matrix = size * np.random.default_rng(0).normal(size=(1, SIZE)).astype("float32")
    np.testing.assert_array_equal(combined(method, matrix, "float32"), matrix[0])


@each_method
@given(problems(1, 1), st.sampled_from([2, 4]))
@settings(max_examples=5)
def test_equal_tasks_are_the_task(x64, method, matrix, k):
    """For all of them."""
    assert_close(combined(method, np.repeat(matrix, k, axis=0)), matrix[0], "reference")


def test_a_tree_of_gradients_is_one_vector(x64):
    """The inner products are over all leaves; None stays None."""
    matrix = np.random.default_rng(6).normal(size=(2, SIZE))
    update = first_step("mgda", tree(matrix), jnp.asarray(0.5))
    assert update["frozen"] is None
    assert_close(vector(update), combined("mgda", matrix), "reference")


@given(problems())
@few
def test_mgda_descends_for_every_task(x64, matrix):
    point = combined("mgda", matrix)
    assert (matrix @ point).min() >= point @ point - 1e-9


@given(problems(2, 2))
@few
def test_pcgrad_of_two_tasks_descends_for_both(x64, matrix):
    assert (matrix @ combined("pcgrad", matrix)).min() >= -1e-12


@given(problems())
@few
def test_cagrad_descends_for_the_worst_task_as_the_mean_at_least(x64, matrix):
    worst = lambda direction: (matrix @ direction).min()  # noqa: E731
    mean = matrix.mean(axis=0)
    direction = combined("cagrad", matrix)
    assert worst(direction) >= worst(mean) / 1.5 - 1e-9
    assert np.linalg.norm(1.5 * direction - mean) <= 0.5 * np.linalg.norm(mean) + 1e-9


def test_what_is_not_promised(x64):
    """The mean climbs for a task, CAGrad less, MGDA not; four tasks are too many for PCGrad."""
    conflict = np.array([[4.0, 0.0], [-1.0, 0.5]])
    inner = {m: (conflict @ combined(m, np.c_[conflict, np.zeros((2, 10))])[:2])[1]
             for m in METHODS}  # fmt: skip
    assert inner["weighted"] < inner["cagrad"] < 0 < inner["mgda"]
    assert inner["pcgrad"] > 0
    rng = np.random.default_rng(0)
    four = np.zeros((100, 4, SIZE))
    four[:, :, :2] = rng.normal(size=(100, 4, 2))
    assert min((m @ combined("pcgrad", m)).min() for m in four) < -1e-3


@each_method
@given(problems(4, 4), st.integers(-20, 20))
@settings(max_examples=8)
def test_scaling_all_gradients_scales_the_update(x64, method, matrix, exponent):
    """Bitwise for powers of two."""
    scaled = combined(method, matrix * 2.0**exponent)
    np.testing.assert_array_equal(scaled, combined(method, matrix) * 2.0**exponent)


@given(problems(), st.integers(0, 3), st.floats(0.1, 10))
@few
def test_pcgrad_is_linear_in_the_size_of_each_task(x64, matrix, task, factor):
    """What one gradient takes from another does not depend on the other's length."""
    task = task % len(matrix)
    longer = matrix.copy()
    longer[task] *= factor
    silent = matrix.copy()
    silent[task] *= 1e-9  # 0 has no direction that the others could be freed of
    base, more, none = (combined("pcgrad", m) for m in (matrix, longer, silent))
    assert_close(more, none + factor * (base - none), "minimum")


@given(problems())
@few
def test_mgda_of_orthogonal_tasks_has_weights_of_one_over_their_squares(x64, matrix):
    sizes = np.linalg.norm(matrix, axis=1)
    orthogonal = np.eye(len(sizes), SIZE) * sizes[:, None]
    expected = (1 / sizes**2) / np.sum(1 / sizes**2) @ orthogonal
    assert_close(combined("mgda", orthogonal), expected, "minimum")


@given(problems(), st.randoms(use_true_random=False))
@few
def test_the_order_of_the_tasks_does_not_matter(x64, matrix, random):
    order = random.sample(range(len(matrix)), len(matrix))
    for method in ("weighted", "mgda", "cagrad", "aligned_mtl", "gradnorm"):
        if method == "cagrad" and np.linalg.norm(shortest(matrix)) < 1e-3:
            continue  # there the direction of the shortest combination is not known
        if method == "aligned_mtl" and np.linalg.svd(matrix)[1][-1] < 1e-5:
            continue  # nor which eigenvalues are 0
        moved = combined(method, matrix[order])
        assert_close(moved, combined(method, matrix), "minimum")


@given(problems())
@few
def test_cagrad_goes_from_the_mean_to_mgda(x64, matrix):
    assert_close(combined("cagrad", matrix, c=0.0), matrix.mean(axis=0), "reference")
    point = shortest(matrix)
    if np.linalg.norm(point) > 1e-3:
        far = combined("cagrad", matrix, c=1e6)
        np.testing.assert_allclose(
            far / np.linalg.norm(far), point / np.linalg.norm(point), atol=1e-4
        )


def test_weights_may_follow_a_schedule():
    stage = tasks.weighted(lambda step: jnp.stack([step.astype(float), jnp.ones([])]))
    grads = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    state = stage.init(jnp.zeros(2))
    for step in range(3):
        update, state = stage.update(grads, state)
        np.testing.assert_array_equal(update, [step, 1])


# --- Numbers --------------------------------------------------------------------------------------


def test_complex_gradients_are_real_ones_of_twice_the_size(x64):
    rng = np.random.default_rng(4)
    real, imaginary, weights = (rng.normal(size=s) for s in ((3, 5), (3, 5), 3))
    grads = jnp.asarray(real + 1j * imaginary)
    assert_close(tasks.gram(grads), real @ real.T + imaginary @ imaginary.T, "reference")
    update = tasks.combine(grads, jnp.asarray(weights))
    assert update.dtype == complex
    assert_close(update, weights @ (real + 1j * imaginary), "reference")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arithmetic_is_float32(dtype):
    """Of gradients in low precision too; the result is rounded once, if the parameters are low."""
    low = jnp.asarray(np.random.default_rng(5).normal(size=(3, 4, 5)), dtype)
    weights = jnp.array([0.3, -0.2, 0.9])
    assert tasks.gram(low).dtype == "float32"
    chex.assert_trees_all_equal(tasks.gram(low), tasks.gram(low.astype("float32")))
    exact = tasks.combine(low.astype("float32"), weights)
    for params in (jnp.zeros((4, 5)), jnp.zeros((4, 5), dtype), None):
        update = tasks.combine(low, weights, params)
        assert update.dtype == (dtype if params is None else params.dtype)
        chex.assert_trees_all_equal(update, exact.astype(update.dtype))


def test_leaves_of_several_widths(x64):
    """The products are as wide as the widest leaf, each update as its own."""
    grads = {"half": jnp.ones((2, 3), jnp.bfloat16), "double": jnp.ones((2, 3))}
    assert tasks.gram(grads).dtype == "float64"
    update = tasks.combine(grads, jnp.array([0.5, 0.5]))
    chex.assert_trees_all_equal(update, jax.tree.map(lambda g: g[0], grads))


@pytest.mark.parametrize("method", ["mgda", "pcgrad", "aligned_mtl"])
def test_a_gradient_that_is_not_finite_is_seen(method):
    """By what counts such steps, around the rest of the chain; the next step is a good one."""
    tx = optax.chain(METHODS[method](2), optax.apply_if_finite(optax.scale(-1.0), 3))
    step = jax.jit(lambda grads, state: tx.update(grads, state))
    state, good = tx.init(jnp.zeros(3)), jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    for bad in (jnp.nan, jnp.inf):
        update, after = step(good.at[0, 1].set(bad), state)
        np.testing.assert_array_equal(update, np.zeros(3))
        assert after[1].total_notfinite == 1
        assert np.all(np.isfinite(step(good, after)[0]))


@pytest.mark.parametrize("updates", [{}, (), {"a": None}, [None, {}]], ids=str)
@each_method
def test_empty_trees_pass_through(method, updates):
    for stage in (METHODS[method](2), tasks.per_task(2, METHODS["mgda"](2))):
        assert stage.update(updates, stage.init(updates), updates)[0] == updates


# --- In each way to run them ----------------------------------------------------------------------


def stages(k):
    """Every method, alone or in a chain."""
    direction = optax.chain(adam_jax.scale_by_moments(), adam_jax.bias_correct())
    return {
        "pcgrad": tasks.pcgrad(),
        "gradnorm": tasks.gradnorm(k),
        "mgda of directions": optax.chain(tasks.per_task(k, direction), tasks.mgda()),
    }


ALL = stages(3)


def init_all(params):
    return {name: stage.init(params) for name, stage in ALL.items()}


def update_all(grads, states, params):
    steps = {
        name: stage.update(grads, states[name], params, value=jnp.array([1.0, 2.0, 3.0]))
        for name, stage in ALL.items()
        if name in states
    }
    return tuple({name: step[part] for name, step in steps.items()} for part in range(2))


jitted = jax.jit(update_all)


def gradients(seed=0, steps=2):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 16, 4), "bias": (3, 8), "scale": (3,), "empty": (3, 0, 2)}
    return [{n: rng.normal(size=s) for n, s in shapes.items()} for _ in range(steps)]


def start(grads):
    return jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)


def walked(step, states, all_grads, place=jnp.asarray):
    params, outputs = start(all_grads[0]), []
    for grads in all_grads:
        output, states = step(jax.tree.map(place, grads), states, params)
        outputs.append(output)
    return outputs, states


@functools.cache
def expected():
    """What the others must give."""
    return walked(jitted, init_all(start(gradients()[0])), gradients())


def test_jit_gives_the_numbers_of_the_plain_call(x64):
    """And does not compile again for the second step."""
    one, stage = jax.tree.map(jnp.asarray, gradients()[0]), ALL["pcgrad"]
    assert_close(stage.update(one, stage.init(None))[0], expected()[0][0]["pcgrad"], "reference")
    assert jitted._cache_size() == 1


def test_scan_and_vmap_give_the_same_numbers(x64):
    """Three models, of which some need more steps to their minimum than others, all steps in one.

    The carry also shows that no state leaf changes shape or dtype.
    """
    models = [gradients(seed) for seed in range(3)]
    params = start(models[0][0])
    step = lambda states, grads: update_all(grads, states, params)[::-1]  # noqa: E731
    run = lambda steps: jax.lax.scan(step, init_all(params), steps)[::-1]  # noqa: E731
    stack = lambda *leaves: np.stack(leaves)  # noqa: E731
    stacked = jax.tree.map(stack, *[jax.tree.map(stack, *model) for model in models])
    outputs, states = jax.jit(jax.vmap(run))(stacked)
    for i, model in enumerate(models):
        alone, last = walked(jitted, init_all(params), model)
        alone = jax.tree.map(stack, *alone)
        assert_close(jax.tree.map(lambda x, i=i: x[i], (outputs, states)), (alone, last), "fused")


def test_a_saved_state_goes_on_with_the_same_bits(x64):
    all_grads = gradients(1, 4)
    outputs, _ = walked(jitted, init_all(start(all_grads[0])), all_grads)
    _, states = walked(jitted, init_all(start(all_grads[0])), all_grads[:2])
    restored = pickle.loads(pickle.dumps(jax.device_get(states)))
    later, _ = walked(jitted, restored, all_grads[2:])
    chex.assert_trees_all_equal(later, outputs[2:])


SPECS = {"kernel": P("x", "y"), "bias": P("x"), "scale": P(), "empty": P()}


def tasked(spec):
    return P(None, *spec)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_leaves_give_the_numbers_of_one_device(kind, x64):
    """Under jit: split leaves, beside ones that every device has whole."""
    mesh = mesh_of(kind, x=4, y=2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    params = jax.device_put(start(gradients()[0]), shardings)
    stage, outputs = ALL["mgda of directions"], []
    states = jax.jit(stage.init, out_shardings=adam_jax.state_shardings(stage, params))(params)
    in_front = {name: NamedSharding(mesh, tasked(spec)) for name, spec in SPECS.items()}
    step = jax.jit(stage.update)
    for grads in gradients():
        output, states = step(jax.device_put(grads, in_front), states, params)
        outputs.append(output)
    alone = [output["mgda of directions"] for output in expected()[0]]
    assert_close(jax.device_get(outputs), alone, "reference")
    assert outputs[0]["kernel"].sharding.is_equivalent_to(shardings["kernel"], 2)


def in_shard_map(update, **options):
    mesh = mesh_of(x=4, y=2)
    specs = {name: tasked(spec) for name, spec in SPECS.items()}
    return jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(specs,), out_specs=SPECS, **options))


@pytest.mark.parametrize("method", ["gradnorm", "mgda of directions"])
def test_shard_map_gives_the_numbers_of_one_device(method, x64):
    """Each device has a part of some leaves, and the whole of others."""

    def first(grads):
        params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)
        stage = ALL[method]
        return stage.update(grads, stage.init(params), params, value=jnp.arange(1.0, 4.0))[0]

    grads = gradients()[0]
    found = in_shard_map(first)(jax.tree.map(jnp.asarray, grads))
    assert_close(jax.device_get(found), expected()[0][0][method], "reference")


def test_shard_map_without_types_is_refused():
    """The products of the parts would be taken for those of the whole."""
    first = lambda grads: tasks.mgda().update(grads, optax.EmptyState())[0]  # noqa: E731
    with refused(ValueError, "jax.shard_map check_vma=True"):
        in_shard_map(first, check_vma=False)(jax.tree.map(jnp.asarray, gradients()[0]))


# --- With other stages ----------------------------------------------------------------------------


def losses(params):
    return jnp.stack([jnp.sum((params["w"] - 1) ** 2), 1e-3 * jnp.sum((params["w"] + 1) ** 2)])


def test_any_chain_follows():
    """`jax.jacrev` of the losses makes the gradients; `init` takes the parameters as they are."""
    params = {"w": jnp.array([3.0, -0.5])}
    tx = optax.chain(tasks.mgda(), adam_jax.adamw(0.05))
    state = tx.init(params)
    step = jax.jit(lambda state, params: tx.update(jax.jacrev(losses)(params), state, params))
    before = losses(params)
    for _ in range(100):
        updates, state = step(state, params)
        params = optax.apply_updates(params, updates)
    assert np.all(losses(params) < before)
    assert np.all(np.abs(params["w"]) <= 1.05)  # between the two minima


def test_shared_parts_are_combined_and_heads_have_their_own_gradient():
    """`optax.partition` around the stage: the products are those of the shared leaves."""
    grads = {"shared": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "head": jnp.array([[5.0], [7.0]])}
    params = {"shared": jnp.zeros(2), "head": jnp.zeros(1)}
    parts = {"shared": tasks.mgda(), "head": tasks.weighted([1, 1])}
    tx = optax.partition(parts, {"shared": "shared", "head": "head"})
    update, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(update["shared"], [0.8, 0.4], rtol=1e-6)
    np.testing.assert_array_equal(update["head"], [12.0])


def adam_direction(eps=1e-8):
    return optax.chain(adam_jax.scale_by_moments(), adam_jax.bias_correct(eps=eps))


def per_task_grads():
    rng = np.random.default_rng(7)
    shapes = {"w": (2, 4, 3), "b": (2, 3)}
    return [
        {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
        for _ in range(2)
    ]


def test_per_task_is_a_chain_for_each_task():
    """What each task gets alone, with a norm of its own."""
    clipped = optax.chain(optax.clip_by_global_norm(0.5), adam_direction())
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    stage, step = tasks.per_task(2, clipped), jax.jit(clipped.update)
    state, alone = stage.init(params), [clipped.init(params) for _ in range(2)]
    for grads in per_task_grads():
        found, state = jax.jit(stage.update)(grads, state, params)
        for i in range(2):
            grad = jax.tree.map(lambda g, i=i: g[i], grads)
            expected, alone[i] = step(grad, alone[i], params)
            assert_close(jax.tree.map(lambda f, i=i: f[i], found), expected, "contracted")


def test_an_axis_of_tasks_is_an_axis():
    """Without `per_task`, if `init` gets parameters with the axis: the same numbers and moments."""
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    wide = jax.tree.map(lambda p: jnp.broadcast_to(p, (2, *p.shape)), params)
    one = optax.chain(tasks.per_task(2, adam_direction()), tasks.mgda())
    other = optax.chain(adam_direction(), tasks.mgda())
    state, other_state = one.init(params), other.init(wide)
    chex.assert_trees_all_equal(optax.tree.get(state, "mu"), optax.tree.get(other_state, "mu"))
    for grads in per_task_grads():
        update, state = jax.jit(one.update)(grads, state, params)
        other_update, other_state = jax.jit(other.update)(grads, other_state, params)
        assert_close(update, other_update, "contracted")
        chex.assert_trees_all_equal_shapes_and_dtypes(update, params)


def test_moments_of_each_task_do_not_see_the_size_of_its_loss():
    """Before the combination they make directions of one size; after it the smallest counts."""
    before = optax.chain(tasks.per_task(2, adam_direction(eps=0)), tasks.mgda())
    after = optax.chain(tasks.mgda(), adam_direction(eps=0))
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    changes = {}
    for name, tx in (("before", before), ("after", after)):
        ends, step = [], jax.jit(tx.update)
        for factor in (1.0, 2.0**10):
            state = tx.init(params)
            for grads in per_task_grads():
                grads = jax.tree.map(lambda g, f=factor: g * np.float32([[1], [f]])
                                     .reshape(2, *[1] * (g.ndim - 1)), grads)  # fmt: skip
                update, state = step(grads, state, params)
            ends.append(update["w"])
        changes[name] = np.abs(ends[0] - ends[1]).max()
    assert changes["before"] == 0
    assert changes["after"] > 0.1


def test_hyperparameters_may_be_injected():
    tx = optax.inject_hyperparams(tasks.cagrad, hyperparam_dtype=jnp.float32)(c=0.5)
    grads = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    state = tx.init(jnp.zeros(2))
    chex.assert_trees_all_close(
        tx.update(grads, state)[0], tasks.cagrad(0.5).update(grads, ())[0], rtol=1e-6
    )
    state.hyperparams["c"] = jnp.float32(0.0)
    np.testing.assert_array_equal(tx.update(grads, state)[0], [1.0, 0.5])


# --- Wrong calls ----------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize(
    ("updates", "params", "names"),
    [
        ({"a": np.ones((2, 3), "float32"), "b": np.float32(1)}, None, "['b'] shape ()"),
        ({"a": np.ones(3, "float32")}, {"a": np.ones(3)}, "['a'] shape (3,)"),
        (
            {"a": np.ones((2, 3), "float32"), "b": np.ones((3, 3), "float32")},
            None,
            "['b'] 3 2",
        ),
        (np.ones((0, 3), "float32"), None, "shape (0, 3) jax.jacrev"),
    ],
    ids=["scalar", "no axis", "other numbers", "no tasks"],
)
def test_gradients_without_their_axis(method, updates, params, names):
    for stage in (METHODS[method](2), tasks.per_task(2, tasks.mgda())):
        with refused(ValueError, names):
            stage.update(updates, stage.init(updates), params, value=np.ones(2))


@each_method
def test_moments_are_refused(method):
    tx = optax.chain(adam_jax.scale_by_moments(), METHODS[method](2))
    grads = jnp.ones((2, 3))
    with refused(TypeError, f"{method} Moments"):
        tx.update(grads, tx.init(grads), value=jnp.ones(2))


@pytest.mark.parametrize(
    ("make", "error", "names"),
    [
        (lambda: tasks.weighted("ab"), TypeError, "weights"),
        (lambda: tasks.weighted(None), TypeError, "weights"),
        (lambda: tasks.weighted([True, False]), TypeError, "weights real numbers"),
        (lambda: tasks.weighted([1j]), TypeError, "weights real numbers"),
        (lambda: tasks.weighted(0.5), ValueError, "weights vector"),
        (lambda: tasks.weighted([]), ValueError, "weights vector"),
        (lambda: tasks.weighted([1.0, np.nan]), ValueError, "weights finite"),
        (lambda: tasks.cagrad(-0.1), ValueError, "c -0.1"),
        (lambda: tasks.cagrad("0.5"), TypeError, "c number '0.5'"),
        (lambda: tasks.pcgrad(1.5), TypeError, "seed integer 1.5"),
        (lambda: tasks.gradnorm(0), ValueError, "tasks 0"),
        (lambda: tasks.gradnorm(2.0), TypeError, "tasks integer 2.0"),
        (lambda: tasks.gradnorm(2, -1.0), ValueError, "alpha -1.0"),
        (lambda: tasks.gradnorm(2, learning_rate=-1.0), ValueError, "learning_rate -1.0"),
        (lambda: tasks.per_task(0, tasks.mgda()), ValueError, "tasks 0"),
        (lambda: tasks.per_task(2, adam_jax.adam), TypeError, "transformation"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(make, error, names):
    with refused(error, names):
        make()


def test_wrong_calls_have_a_remedy():
    grads, params = jnp.ones((2, 3)), jnp.ones(3)
    cases = [
        (tasks.weighted([1.0, 1.0, 1.0]), {}, "3 weights 2 tasks"),
        (tasks.weighted(lambda step: jnp.ones(3)), {}, "3 weights 2 tasks"),
        (tasks.gradnorm(2), {}, "value=losses update()"),
        (tasks.gradnorm(2), {"value": jnp.ones([])}, "losses shape ()"),
        (tasks.gradnorm(3), {"value": jnp.ones(3)}, "3 tasks gradients 2"),
        (tasks.per_task(3, tasks.mgda()), {}, "3 tasks gradients 2"),
    ]
    for stage, extra, names in cases:
        with refused(ValueError, names):
            stage.update(grads, stage.init(params), params, **extra)
    tx = tasks.per_task(2, adam_jax.scale_by_moments())
    with refused(TypeError, "Moments adam_jax.bias_correct"):
        tx.update(grads, tx.init(params), params)
