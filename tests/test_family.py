"""Every member of the family against its reference: optax, PyTorch, or the paper in NumPy."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import chains
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from support import TOLERANCES, matrices_only, plain_step, stack, user_jit
from torch_references import Run, recorded

import adam_jax

STEPS = 500

# --- The problem: gradients as a function of the parameters and the step --------------------------


def random_gradients(dtype):
    """One for every step, of all sizes."""
    rng = np.random.default_rng(0)
    scales = 10 ** rng.uniform(-3, 2, STEPS)
    return [(scale * rng.normal(size=(5, 4))).astype(dtype) for scale in scales]


def rosenbrock(xy):
    x, y = xy
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def network(weights, x):
    """The error of three inputs, eight hidden units and an output: 41 weights."""
    w1, b1, w2, b2 = jnp.split(weights, [24, 32, 40])
    y = jnp.sin(x.sum(axis=1))
    hidden = jnp.tanh(x @ w1.reshape(3, 8) + b1[None])
    return jnp.mean((hidden @ w2 + b2 - y) ** 2)


class Problem:
    """Three in one, a leaf for each, so that a member is compiled once for all of them."""

    name = "family"

    def __init__(self, dtype):
        rng = np.random.default_rng(1)
        x = rng.normal(size=(32, 3)).astype(dtype)
        self.random = random_gradients(dtype)
        self.params = {
            "network": (0.5 * rng.normal(size=41)).astype(dtype),
            "random": rng.normal(size=(5, 4)).astype(dtype),
            "rosenbrock": np.asarray([-1.2, 1.0], dtype),
        }
        loss = lambda p: rosenbrock(p["rosenbrock"]) + network(p["network"], x)  # noqa: E731
        self._gradient = jax.jit(jax.grad(loss))

    def gradient(self, params, t):
        descending = {name: params[name] for name in ("rosenbrock", "network")}
        return self._gradient(descending) | {"random": self.random[t]}


problem_in = functools.cache(Problem)

# --- References: from the parameters to a function that takes a step ------------------------------


def of_transformation(tx):
    def start(params):
        state = tx.init(params)
        bitwise = next(iter(params.values())).dtype == "float32"  # float64 has a tolerance
        update = (user_jit if bitwise else jax.jit)(plain_step(tx))

        def step(params, grads):
            nonlocal state
            with jax.numpy_dtype_promotion("standard"):
                params, state = update(params, state, grads)
            return params

        return step

    return start


def of_paper(algorithm):
    """An algorithm is a generator over one leaf: send it a gradient, get the new leaf."""

    def start(params):
        leaves = {}
        for name, p in params.items():
            leaves[name] = algorithm(np.array(p))
            next(leaves[name])

        def step(params, grads):
            return {name: leaf.send(np.asarray(grads[name])) for name, leaf in leaves.items()}

        return step

    return start


def atan2(theta, lr=1e-2, b1=0.9, b2=0.999):
    """Everett et al. 2024: Adam with a arctan2(m, sqrt(v)) for the division."""
    m = v = t = 0
    while True:
        g = yield theta
        t += 1
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        theta = theta - lr * 4 / np.pi * np.arctan2(m / (1 - b1**t), np.sqrt(v / (1 - b2**t)))


def laprop(theta, lr=1e-2, b1=0.9, b2=0.999, eps=1e-15):
    """Ziyin et al. 2020, algorithm 1."""
    n = m = t = 0
    while True:
        g = yield theta
        t += 1
        n = b2 * n + (1 - b2) * g**2
        m = b1 * m + (1 - b1) * g / (np.sqrt(n / (1 - b2**t)) + eps)
        theta = theta - lr * m / (1 - b1**t)


def adopt(theta, lr=1e-2, b1=0.9, b2=0.9999, eps=1e-6, clip=True):
    """Taniguchi et al. 2024, algorithm 2."""
    g = yield theta
    m, v, t = 0, g**2, 0
    while True:
        g = yield theta
        t += 1
        direction = g / np.maximum(np.sqrt(v), eps)
        m = b1 * m + (1 - b1) * (np.clip(direction, -(t**0.25), t**0.25) if clip else direction)
        v = b2 * v + (1 - b2) * g**2
        theta = theta - lr * m


def ademamix(theta, lr=1e-3, b1=0.9, b2=0.999, b3=0.99, alpha=2.0, eps=1e-8, decay=0.1):
    """Pagliardini et al. 2024, algorithm 1 with constant alpha and b3."""
    m1 = m2 = v = t = 0
    while True:
        g = yield theta
        t += 1
        m1, m2 = b1 * m1 + (1 - b1) * g, b3 * m2 + (1 - b3) * g
        v = b2 * v + (1 - b2) * g**2
        direction = (m1 / (1 - b1**t) + alpha * m2) / (np.sqrt(v / (1 - b2**t)) + eps)
        theta = theta - lr * (direction + decay * theta)


def lion(theta, lr=1e-3, b1=0.9, b2=0.99, decay=0.1):
    """Chen et al. 2023, algorithm 2."""
    m = 0
    while True:
        g = yield theta
        step = np.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g
        theta = theta - lr * (step + decay * theta)


def cautious_adamw(theta, lr=1e-2, b1=0.9, b2=0.999, eps=1e-8, decay=0.1):
    """Liang et al. 2024, algorithm 1, with the mean of the mask bounded below as in their code."""
    m = v = t = 0
    while True:
        g = yield theta
        t += 1
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        phi = (u * g > 0).astype(float)
        theta = theta - lr * (u * phi / max(phi.mean(), 1e-3) + decay * theta)


def keras_amsgrad(theta, lr=1e-3, b1=0.9, b2=0.999, eps=1e-3):
    """Keras's Adam(amsgrad=True): the maximum of the raw v, epsilon next to its root."""
    m = v = v_max = t = 0
    while True:
        g = yield theta
        t += 1
        alpha = lr * np.sqrt(1 - b2**t) / (1 - b1**t)
        m, v = m + (g - m) * (1 - b1), v + (g**2 - v) * (1 - b2)
        v_max = np.maximum(v_max, v)
        theta = theta - alpha * m / (np.sqrt(v_max) + eps)


def paper_amsgrad(theta, lr=1e-3, b1=0.9, b2=0.999, eps=1e-8):
    """Reddi et al. 2018, algorithm 2: no correction at all."""
    m = v = v_max = 0
    while True:
        g = yield theta
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        v_max = np.maximum(v_max, v)
        theta = theta - lr * m / (np.sqrt(v_max) + eps)


# --- The table ------------------------------------------------------------------------------------


class Spec(NamedTuple):
    ours: optax.GradientTransformation
    reference: Callable | Run
    tolerance: str  # a key of TOLERANCES, or "bitwise": under jit in float32


SCHEDULE = optax.cosine_decay_schedule(1e-2, STEPS, 0.1)


def like_optax(name, tolerance, *args, library=optax, **options):
    return Spec(
        getattr(adam_jax, name)(*args, **options),
        of_transformation(getattr(library, name)(*args, **options)),
        tolerance,
    )


def like_torch(ours, optimizer, **options):
    return Spec(ours, Run(problem_in("float64"), optimizer, options), "torch")


SPECS = {
    # optax, its own arithmetic
    "sgd": like_optax("sgd", "bitwise", 1e-4),
    "sgd, momentum": like_optax(
        "sgd", "bitwise", optax.cosine_decay_schedule(1e-4, STEPS), momentum=0.9
    ),
    "sgd, nesterov": like_optax("sgd", "bitwise", 1e-5, momentum=0.9, nesterov=True),
    "momentum": Spec(adam_jax.momentum(1e-4), of_transformation(optax.sgd(1e-4, 0.9)), "bitwise"),
    "nesterov_momentum": Spec(
        adam_jax.nesterov_momentum(1e-4),
        of_transformation(optax.sgd(1e-4, 0.9, nesterov=True)),
        "bitwise",
    ),
    "adam": like_optax("adam", "bitwise", SCHEDULE),
    "adamw, masked": like_optax("adamw", "bitwise", 1e-2, weight_decay=0.1, mask=matrices_only),
    "nadam": like_optax("nadam", "bitwise", 1e-2),
    "nadamw": like_optax("nadamw", "bitwise", SCHEDULE),
    "amsgrad": like_optax("amsgrad", "bitwise", 1e-2),
    "amsgrad, uncorrected": like_optax(
        "amsgrad", "bitwise", 1e-2, bias_correction_mu=False, bias_correction_nu=False
    ),
    "amsgrad, mu uncorrected": like_optax("amsgrad", "bitwise", 1e-2, bias_correction_mu=False),
    "radam": like_optax("radam", "bitwise", 1e-4),
    "adabelief": like_optax("adabelief", "bitwise", 1e-2),
    "adabelief, nesterov": like_optax("adabelief", "bitwise", 1e-2, eps=1e-8, nesterov=True),
    "yogi": like_optax("yogi", "bitwise", 1e-2),
    "lamb": like_optax("lamb", "bitwise", 1e-2, weight_decay=0.1),
    "lion": like_optax("lion", "bitwise", 1e-3),
    # optax, with the same value by other operations: rsqrt, the square of a maximum
    "radam, threshold": like_optax("radam", "reference", 1e-4, b2=0.9, threshold=6.0),
    "radam, nesterov": like_optax("radam", "reference", 1e-4, nesterov=True),
    "adagrad": like_optax("adagrad", "reference", 1e-1),
    "rmsprop": like_optax("rmsprop", "reference", 1e-4),
    "rmsprop, eps outside": like_optax("rmsprop", "reference", 1e-4, eps_in_sqrt=False),
    "rmsprop, centered": like_optax(
        "rmsprop", "centered", 1e-4, decay=0.99, eps=1e-2, centered=True
    ),
    "rmsprop, all": like_optax(
        "rmsprop",
        "reference",
        optax.cosine_decay_schedule(1e-5, STEPS),
        initial_scale=1.0,
        momentum=0.9,
        nesterov=True,
        bias_correction=True,
    ),
    "adamax": like_optax("adamax", "reference", 1e-2),
    "adamaxw": like_optax("adamaxw", "reference", SCHEDULE, weight_decay=0.1),
    "adopt (optax)": like_optax("adopt", "reference", 1e-2, library=optax.contrib),
    "adopt (optax), unclipped": like_optax(
        "adopt", "reference", 1e-2, library=optax.contrib, use_clipping=False
    ),
    "ademamix (optax)": like_optax("ademamix", "reference", 1e-3, library=optax.contrib),
    "ademamix (optax), scheduled": like_optax(
        "ademamix",
        "reference",
        1e-3,
        library=optax.contrib,
        b3=optax.linear_schedule(0.9, 0.999, 100),
        alpha=optax.linear_schedule(0.0, 5.0, 100),
        weight_decay=0.1,
    ),
    # PyTorch
    "Adam (torch)": like_torch(adam_jax.adam(1e-2, eps=1e-6), "Adam", lr=1e-2, eps=1e-6),
    "AdamW (torch)": like_torch(
        adam_jax.adamw(1e-2, weight_decay=0.1), "AdamW", lr=1e-2, weight_decay=0.1
    ),
    "AMSGrad (torch)": like_torch(
        adam_jax.amsgrad(1e-2, max_before_correction=True), "Adam", lr=1e-2, amsgrad=True
    ),
    "NAdam (torch)": like_torch(adam_jax.nadam(1e-2, momentum_decay=4e-3), "NAdam", lr=1e-2),
    "NAdamW (torch)": like_torch(
        adam_jax.nadamw(1e-2, momentum_decay=1e-2, weight_decay=0.1),
        "NAdam",
        lr=1e-2,
        momentum_decay=1e-2,
        weight_decay=0.1,
        decoupled_weight_decay=True,
    ),
    "RAdam (torch)": like_torch(
        adam_jax.radam(1e-2, eps=1e-4, eps_hat=True), "RAdam", lr=1e-2, eps=1e-4
    ),
    "Adamax (torch)": like_torch(adam_jax.adamax(1e-2), "Adamax", lr=1e-2),
    "Adagrad (torch)": like_torch(
        adam_jax.adagrad(1e-1, 0.5, eps=1e-10, eps_in_sqrt=False),
        "Adagrad",
        lr=1e-1,
        initial_accumulator_value=0.5,
    ),
    "RMSprop (torch)": like_torch(
        adam_jax.rmsprop(1e-4, decay=0.99, eps_in_sqrt=False, momentum=0.9),
        "RMSprop",
        lr=1e-4,
        momentum=0.9,
    ),
    "RMSprop, centered (torch)": like_torch(
        adam_jax.rmsprop(1e-4, decay=0.99, eps=1e-2, eps_in_sqrt=False, centered=True),
        "RMSprop",
        lr=1e-4,
        eps=1e-2,
        centered=True,
    ),
    "SGD, momentum (torch)": like_torch(adam_jax.momentum(1e-4), "SGD", lr=1e-4, momentum=0.9),
    "SGD, nesterov (torch)": like_torch(
        adam_jax.nesterov_momentum(1e-4), "SGD", lr=1e-4, momentum=0.9, nesterov=True
    ),
    # the papers
    "adam_atan2 (paper)": Spec(adam_jax.adam_atan2(1e-2), of_paper(atan2), "reference"),
    "laprop (paper)": Spec(adam_jax.laprop(1e-2), of_paper(laprop), "reference"),
    "adopt (paper)": Spec(adam_jax.adopt(1e-2), of_paper(adopt), "reference"),
    "adopt, unclipped (paper)": Spec(
        adam_jax.adopt(1e-2, use_clipping=False),
        of_paper(lambda theta: adopt(theta, clip=False)),
        "reference",
    ),
    "ademamix (paper)": Spec(
        adam_jax.ademamix(1e-3, b3=0.99, alpha=2.0, weight_decay=0.1),
        of_paper(ademamix),
        "reference",
    ),
    "lion (paper)": Spec(adam_jax.lion(1e-3, weight_decay=0.1), of_paper(lion), "reference"),
    "cautious_adamw (paper)": Spec(
        adam_jax.cautious_adamw(1e-2, weight_decay=0.1), of_paper(cautious_adamw), "reference"
    ),
    "amsgrad (paper)": Spec(
        adam_jax.amsgrad(1e-3, bias_correction_mu=False, bias_correction_nu=False),
        of_paper(paper_amsgrad),
        "reference",
    ),
    "amsgrad (Keras)": Spec(
        adam_jax.amsgrad(1e-3, eps=1e-3, max_before_correction=True, eps_hat=True),
        of_paper(keras_amsgrad),
        "reference",
    ),
}


RUNS = [spec.reference for spec in SPECS.values() if isinstance(spec.reference, Run)]


def path_of(start, problem):
    params = jax.tree.map(jnp.asarray, problem.params)
    step, steps = start(problem.params), []
    for t in range(STEPS):
        params = step(params, problem.gradient(params, t))
        steps.append(jax.tree.map(np.asarray, params))
    return {name: np.stack([step[name] for step in steps]) for name in problem.params}


def both_paths(ours, reference, problem):
    """Both after every step; with PyTorch after those that are recorded."""
    path = path_of(of_transformation(ours), problem)
    if isinstance(reference, Run):
        return {name: path[name][reference.rows] for name in path}, recorded(reference)
    return path, path_of(reference, problem)


@pytest.mark.parametrize("name", SPECS)
def test_member(name, request):
    spec = SPECS[name]
    bitwise = spec.tolerance == "bitwise"
    if not bitwise:
        request.getfixturevalue("x64")
    problem = problem_in("float32" if bitwise else "float64")
    ours, theirs = both_paths(spec.ours, spec.reference, problem)
    rtol, atol, reason = (0, 0, "bitwise") if bitwise else TOLERANCES[spec.tolerance]
    for leaf, expected in theirs.items():
        assert np.all(np.isfinite(expected))
        assert np.all(expected[-1] != problem.params[leaf])
        np.testing.assert_allclose(
            ours[leaf], expected, rtol=rtol, atol=atol, err_msg=f"{leaf}: {reason}"
        )


def test_every_member_has_a_reference():
    """So that a member that joins the package cannot forget the table."""
    named = {re.split("[ ,]", name)[0].lower() for name in SPECS}
    assert len(chains.members()) == 22
    assert set(chains.members()) <= named


@pytest.mark.parametrize(
    ("ours", "name"),
    [(adam_jax.amsgrad(1e-2), "AMSGrad (torch)"), (adam_jax.nadam(1e-2), "NAdam (torch)")],
    ids=["amsgrad", "nadam"],
)
def test_without_its_option_a_member_misses_its_reference(ours, name, x64):
    """The updates differ visibly: so the rows of the table above can fail."""
    mine, theirs = both_paths(ours, SPECS[name].reference, problem_in("float64"))
    for leaf in theirs:
        steps, due = (np.diff(path[leaf], axis=0) for path in (mine, theirs))
        assert np.linalg.norm(steps - due) / np.linalg.norm(due) > 0.05


# --- Cross-products that nobody ships -------------------------------------------------------------

CROSSES = {
    "rectified AdaBelief": optax.chain(
        adam_jax.scale_by_moments(second_moment=adam_jax.belief),
        adam_jax.rectify(),
        adam_jax.scale_by_lr(1e-4),
    ),
    "AMSGrad with atan2": optax.chain(
        adam_jax.scale_by_moments(),
        adam_jax.running_max(),
        adam_jax.atan2(),
        adam_jax.scale_by_lr(1e-2),
    ),
    "Nesterov Yogi": adam_jax.yogi(1e-2, nesterov=True),
    "RAdam with scheduled decays": adam_jax.radam(
        1e-4, b2=lambda count: 0.9 + 0.0999 * jnp.minimum(count.astype(float) / 100, 1.0)
    ),
    "cautious Lion": optax.chain(
        adam_jax.scale_by_moments(0.99, None),
        adam_jax.interpolate(0.9),
        adam_jax.cautious(),
        adam_jax.first_moment(),
        optax.scale_by_sign(),
        adam_jax.scale_by_lr(1e-3),
    ),
    "AdEMAMix with AMSGrad and atan2": optax.chain(
        adam_jax.scale_by_moments(),
        adam_jax.running_max(),
        adam_jax.debias(),
        adam_jax.mix_slow_moment(0.99, 2.0),
        adam_jax.atan2(),
        adam_jax.scale_by_lr(1e-3),
    ),
}
each_cross = pytest.mark.parametrize("tx", CROSSES.values(), ids=CROSSES.keys())


@each_cross
def test_crosses_descend(tx, x64):
    problem = problem_in("float64")
    path = path_of(of_transformation(tx), problem)
    first, last = (
        problem.gradient(jax.tree.map(lambda p, t=t: p[t], path), t) for t in (0, STEPS - 1)
    )
    for name in ("rosenbrock", "network"):
        assert np.linalg.norm(last[name]) < np.linalg.norm(first[name])


@each_cross
def test_crosses_are_natural_and_keep_their_state(tx):
    """Law 7, and stable state leaves: shape and dtype, under scan."""
    grads = [{"w": g, "b": g[0]} for g in random_gradients("float32")[:10]]
    whole, alone = tx.init(grads[0]), {name: tx.init(p) for name, p in grads[0].items()}
    for g in grads:
        updates, whole = tx.update(g, whole)
        for name in g:
            update, alone[name] = tx.update(g[name], alone[name])
            np.testing.assert_array_equal(update, updates[name])
    step = lambda state, g: tx.update(g, state)[::-1]  # noqa: E731
    jax.eval_shape(lambda g: jax.lax.scan(step, tx.init(grads[0]), g), stack(grads))


@pytest.mark.parametrize(
    ("tx", "start"),
    [
        (CROSSES["AMSGrad with atan2"], 0),
        (
            optax.chain(
                adam_jax.scale_by_moments(b2=0.9, second_moment=adam_jax.belief),
                adam_jax.rectify(eps=0),
            ),
            5,  # by then the average is long enough to be divided by
        ),
    ],
    ids=["AMSGrad with atan2", "rectified AdaBelief"],
)
def test_crosses_are_scale_invariant(tx, start, x64):
    """Law 5, where nothing adds an epsilon and the division has begun."""
    grads = random_gradients("float64")[:20]
    states = [tx.init(grads[0]) for _ in range(2)]
    for t, g in enumerate(grads):
        one, states[0] = tx.update(g, states[0])
        two, states[1] = tx.update(1024 * g, states[1])
        assert np.array_equal(one, two) == (t >= start)


def test_atan2_is_bounded(x64):
    """No epsilon, and no step beyond 2 alpha, whatever the gradients."""
    tx = adam_jax.adam_atan2(1.0)
    worst = np.concatenate([np.zeros(5000), (0.999 / 0.9) ** np.arange(500.0)])
    _, updates = jax.lax.scan(
        lambda state, g: tx.update(g, state)[::-1], tx.init(jnp.zeros(())), jnp.asarray(worst)
    )
    assert np.max(np.abs(updates)) <= 2
    assert np.max(np.abs(updates)) > 1.8


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.5), (0.99, 0.6), (0.999, 0.9)])
def test_rectification_under_a_falling_rate(before, after, x64):
    """With g = 1 no step exceeds 1: the average is longer than the new rate will leave it."""
    tx = adam_jax.radam(1.0, b2=lambda t: jnp.where(t < 2000, before, after))
    _, updates = jax.lax.scan(
        lambda state, _: tx.update(jnp.ones(()), state)[::-1], tx.init(jnp.ones(())), length=2500
    )
    assert np.all((updates <= 0) & (updates >= -1 - 1e-6))


@pytest.mark.parametrize("b2", [0.5, 0.7, 0.999])
def test_rectification_has_a_finite_derivative(b2):
    tx = adam_jax.radam(1.0, b2=b2)
    slope = jax.grad(lambda g: tx.update(g, tx.init(g))[0])(jnp.ones(()))
    assert np.isfinite(slope)


def test_adopt_skips_the_first_gradient_whatever_its_size():
    for dtype, size in (("float16", 1.0), ("float32", 1e33)):
        tx = adam_jax.adopt(1.0, use_clipping=False)
        grads = jnp.full(1, size, dtype)
        updates, state = tx.update(grads, tx.init(grads))
        np.testing.assert_array_equal(np.abs(updates), 0)
        assert all(np.all(np.isfinite(mu)) for mu in jax.tree.leaves(state[4].mu))


def test_delay_before_a_correction_is_finite():
    tx = optax.chain(adam_jax.scale_by_moments(), adam_jax.delay(), adam_jax.bias_correct())
    first, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    second, _ = tx.update(jnp.ones(1), state)
    np.testing.assert_array_equal(first, 0)
    np.testing.assert_allclose(second, 1, rtol=1e-4)


def test_centered_division_of_a_steady_gradient():
    """The variance rounds to 0 or below: no NaN."""
    tx = adam_jax.rmsprop(0.1, centered=True, bias_correction=True)
    g = jnp.full(1, 7.3)
    _, updates = jax.lax.scan(lambda state, _: tx.update(g, state)[::-1], tx.init(g), length=400)
    assert np.all(np.isfinite(updates))


def test_momentum_is_float32_for_low_precision():
    """Where optax.trace sums in bfloat16: 100 steps of momentum, and 500 behind RMSProp."""
    for factory, steps in (
        (adam_jax.momentum, 100),
        (lambda lr: adam_jax.rmsprop(lr, momentum=0.99), 500),
    ):
        ends = []
        for dtype in ("bfloat16", "float32"):
            tx = factory(1.0)
            g = jnp.ones((), dtype)
            _, updates = jax.lax.scan(
                lambda state, _, tx=tx, g=g: tx.update(g, state)[::-1], tx.init(g), length=steps
            )
            ends.append(float(updates[-1]))
        np.testing.assert_allclose(ends[0], ends[1], rtol=2**-7)


def test_the_length_of_a_moving_average(x64):
    """The length by its definition: twice the mean age of the gradients in the average, plus 1."""
    rate = lambda t: 0.9 + 0.09 * jnp.sin(t.astype(float))  # noqa: E731
    for b2 in (0.9, rate):
        stage = adam_jax.scale_by_moments(b2=b2)
        state, weights = stage.init(jnp.zeros(())), np.zeros(0)
        for t in range(50):
            moments, state = stage.update(jnp.ones(()), state)
            decay = float(rate(jnp.asarray(t))) if callable(b2) else b2
            weights = np.append(decay * weights, 1 - decay)
            mean_age = (weights * np.arange(t, -1, -1)).sum() / weights.sum()
            assert float(moments.nu.length) == pytest.approx(2 * mean_age + 1, rel=1e-9)


def test_rectification_of_a_schedule_is_that_of_the_number(x64):
    problem = problem_in("float64")
    expected, ours = (
        path_of(of_transformation(adam_jax.radam(1e-3, b2=b2)), problem)
        for b2 in (0.999, lambda count: 0.999)
    )
    for leaf in expected:
        np.testing.assert_allclose(ours[leaf], expected[leaf], rtol=TOLERANCES["torch"].rtol)


# --- What the parts can do, every member can ------------------------------------------------------


@pytest.mark.parametrize("name", chains.members())
def test_common_options(name):
    """Decay with a mask, narrow moments, both looks ahead: each accepted, each with an effect."""
    factory = chains.members()[name]
    accepted = inspect.signature(factory).parameters
    assert {"weight_decay", "mask"} <= set(accepted)
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    rng = np.random.default_rng(0)
    grads = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype("float32"), params)] * 2
    grads[1] = jax.tree.map(lambda g: -0.3 * g + 0.1, grads[1])
    grads *= 4 if name == "radam" else 1  # it divides from its sixth step on

    def updates(**options):
        tx = factory(1e-2, **options)
        state = tx.init(params)
        for g in grads:
            update, state = tx.update(g, state, params)
        return update, state

    plain, _ = updates(weight_decay=None)
    decayed, _ = updates(weight_decay=0.5, mask=matrices_only)
    if name != "lamb":  # its trust ratio rescales what the decay adds
        np.testing.assert_allclose(decayed["w"], plain["w"] - 0.5e-2, rtol=1e-5)
    np.testing.assert_array_equal(decayed["b"], plain["b"])
    for option, value in (("nesterov", True), ("eps_hat", True), ("eps_root", 0.1)):
        if option in accepted and name not in ("sgd", "rmsprop"):
            base, _ = updates(**({"nesterov": False} if option == "nesterov" else {}))
            extra = (
                {"max_before_correction": True} if (name, option) == ("amsgrad", "eps_hat") else {}
            )
            changed, _ = updates(**{option: value}, **extra)
            assert np.any(changed["w"] != base["w"]), option
    for option in ("mu_dtype", "mu_storage", "nu_storage"):
        if option in accepted:
            _, state = updates(**{option: jnp.bfloat16})
            kept = {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.ndim(leaf)}
            assert jnp.dtype(jnp.bfloat16) in kept


@pytest.mark.parametrize("name", chains.members())
def test_members_keep_dtypes_and_inject(name):
    """bfloat16 parameters, float32 state, no drift; and optax.inject_hyperparams on the factory."""
    params = {
        "w": jnp.ones((2, 3), jnp.bfloat16),
        "none": None,
        "empty": jnp.ones((0,), jnp.bfloat16),
    }
    factory = chains.members()[name]
    injected = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)(1e-2)
    for tx in (factory(1e-2), injected, factory(1e-2, weight_decay=lambda count: 0.1)):
        state = tx.init(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, new_state = jax.eval_shape(tx.update, params, state, params)
        described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
        assert described(updates) == described(params)
        assert described(new_state) == described(state)
