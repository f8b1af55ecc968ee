"""What the notebooks of the course share: descents, pictures, data, and the checks of exercises.

from course_helpers import check, descend, set_up
set_up("en")  # or "zh": the language of the pictures and of the checks
"""

import warnings

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.font_manager
import matplotlib.pyplot as plt
import numpy as np
import optax

import adam_jax
from adam_jax import storage

# One colour for one optimizer in all of this project; a line and a marker too, for print in grey.
COLORS = {
    "SGD": "black",
    "Momentum": "#e69f00",
    "Nesterov": "#009e73",
    "AdaGrad": "#cc79a7",
    "RMSProp": "#56b4e9",
    "Adam": "#d55e00",
    "AMSGrad": "#0072b2",
}
LINES = dict(
    zip(COLORS, [":", "--", "-.", (0, (5, 1)), (0, (1, 1)), "-", (0, (8, 2, 1, 2))], strict=True)
)
MARKERS = dict(zip(COLORS, "s^vDPo*", strict=True))
CHINESE_FONTS = [
    "Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", "Heiti SC",
    "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Noto Sans CJK JP",
]  # fmt: skip
_language = "en"


def set_up(language):
    """Numbers in float64 on the CPU, and pictures with labels in English ("en") or Chinese."""
    global _language
    _language = language
    jax.config.update("jax_enable_x64", True)  # to compare with numbers worked out by hand
    jax.config.update("jax_platforms", "cpu")  # all of it is small
    matplotlib.rcParams.update(
        {"figure.constrained_layout.use": True, "figure.dpi": 120, "font.size": 9}
    )
    if language == "zh":
        there = matplotlib.font_manager.get_font_names()
        fonts = [font for font in CHINESE_FONTS if font in there]
        if not fonts:  # the pictures have boxes then, and one line says why
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            print("没有找到中文字体，图中的汉字会显示为方框；可安装 Noto Sans CJK SC。")
        matplotlib.rcParams["font.family"] = ["DejaVu Sans", *fonts[:1]]


def say(en, zh):
    return zh if _language == "zh" else en


# --- Descents -------------------------------------------------------------------------------------


def descend(tx, loss, start, steps):
    """The points of a descent, the start among them."""

    def step(carry, _):
        point, state = carry
        updates, state = tx.update(jax.grad(loss)(point), state, point)
        point = optax.apply_updates(point, updates)
        return (point, state), point

    start = jnp.asarray(start)
    _, points = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return jnp.concatenate([start[None], points])


def through(tx, gradients):
    """What an optimizer makes of a sequence of gradients, at parameters that stay 0."""
    gradients = jnp.asarray(gradients)
    params = jnp.zeros_like(gradients[0])
    step = lambda state, gradient: tx.update(gradient, state, params)[::-1]  # noqa: E731
    return jax.lax.scan(step, tx.init(params), gradients)[1]


def look(name):
    """A stage that changes nothing and keeps what passes."""
    return optax.snapshot(name, lambda updates: updates)


# --- Pictures -------------------------------------------------------------------------------------


def style(name):
    return {"color": COLORS[name], "linestyle": LINES[name]}


def label(axes, text, place, shift=(5, 0), color="black", **changes):
    """Write the name of a line beside one of its points."""
    axes.annotate(
        text, place, shift, textcoords="offset points", va="center", color=color,
        annotation_clip=False, bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.7},
        **changes,
    )  # fmt: skip


def draw(loss, paths, **places):
    """Some of the paths over the valley, each with its name at one of its points."""
    _, axes = plt.subplots(figsize=(7, 2.8))
    grid = np.meshgrid(np.linspace(-8, 2.5, 200), np.linspace(-2.6, 2.6, 200))
    axes.contour(*grid, loss(grid), np.geomspace(0.05, 15, 9), colors="0.8", linewidths=0.8)
    axes.plot(0, 0, "k*", markersize=10, zorder=3)
    for name in places:
        axes.plot(*paths[name].T, marker=MARKERS[name], markersize=4, linewidth=1.2, **style(name))
    for name, (at, shift) in places.items():
        label(axes, name, paths[name][at], shift, COLORS[name])
    axes.set(xlim=(-8, 2.5), ylim=(-2.6, 2.6))
    axes.set_xlabel(say("θ₁, along the valley", "θ₁，沿谷方向"))
    axes.set_ylabel(say("θ₂, across", "θ₂，跨谷方向"))
    plt.show()


# --- Random trees ---------------------------------------------------------------------------------


def random_tree(rng, depth=2):
    """Dicts and lists in each other, with arrays of random shapes for leaves."""
    if depth == 0:
        return jnp.asarray(rng.normal(size=tuple(rng.integers(1, 4, size=rng.integers(0, 3)))))
    children = [random_tree(rng, depth - 1) for _ in range(rng.integers(1, 4))]
    return children if rng.random() < 0.5 else dict(zip("abc", children, strict=False))


def gradients_like(tree, rng, steps=3):
    return [
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), tree)
        for _ in range(steps)
    ]


def same(one, other):
    """Whether two trees have the same structure and, bit for bit, the same numbers."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.array_equal(a, b) for a, b in pairs
    )


# --- A small network ------------------------------------------------------------------------------


def digits():
    """1,797 handwritten digits of 8 × 8 pixels, shuffled: images (1797, 64) and labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()  # they ship inside scikit-learn
    order = np.random.default_rng(0).permutation(len(data.target))
    return jnp.asarray(data.data[order] / 16, jnp.float32), data.target[order]


def network(key, *widths):
    """The weights of dense layers, in float32."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {
            "kernel": jax.random.normal(key, (n, m), jnp.float32) * np.float32(np.sqrt(2 / n)),
            "bias": jnp.zeros(m, jnp.float32),
        }
        for key, n, m in zip(keys, widths, widths[1:], strict=False)
    ]


def cross_entropy(params, data):
    x, y = data
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    outputs = (x @ params[-1]["kernel"] + params[-1]["bias"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


def train(tx, params, data, steps, batch, key, watch=lambda params: None):
    """The weights in the end, and of every step the loss and what is watched."""

    def step(carry, key):
        params, state = carry
        chosen = jax.random.choice(key, len(data[1]), (batch,))
        loss, gradient = jax.value_and_grad(cross_entropy)(
            params, (data[0][chosen], data[1][chosen])
        )
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (loss, watch(params))

    start = params, tx.init(params)
    (params, _), (losses, watched) = jax.lax.scan(step, start, jax.random.split(key, steps))
    return params, losses, watched


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- The checks of the exercises ------------------------------------------------------------------


def check(number, answer, *found):
    """Tell whether exercise `number` is solved; `found` is what the notebook itself has found."""
    parts = answer.values() if isinstance(answer, dict) else [answer]
    if any(part is None for part in parts):
        print(say(f"Exercise {number} is open.", f"习题 {number} 尚未作答。"))
        return
    CHECKS[number](answer, *found)
    print(say(f"Exercise {number} is solved.", f"习题 {number} 已解出。"))


def is_close(answer, due, rtol=1e-3):
    right = np.shape(answer) == np.shape(due) and np.allclose(answer, due, rtol=rtol, atol=1e-12)
    assert right, say("not the right number", "数值不对")


def check_rescaled(rates):
    """Exercise 1."""
    loss = lambda p: 0.1 * p[0] ** 2 + 2 * p[1] ** 2  # noqa: E731
    start = np.array([-7.0, 2.0])
    for name, factory in {"SGD": adam_jax.sgd, "Adam": adam_jax.adam}.items():
        here = descend(factory(0.4), loss, start, 10)
        there = descend(factory(rates[name]), lambda phi: loss(10 * phi), start / 10, 10)
        assert np.allclose(here, 10 * there, atol=1e-5), say(
            f"{name} walks elsewhere", f"{name} 走的不是同一条路"
        )


def check_first_step(rate):
    """Exercise 2."""
    tx = optax.chain(
        adam_jax.scale_by_moments(None, 0.99), adam_jax.normalize(), adam_jax.scale_by_lr(rate)
    )
    is_close(-through(tx, np.array([[3.0]]))[0, 0], 0.05)


def check_moments(answer):
    """Exercise 3."""
    seen = through(adam_jax.scale_by_moments(0.5, 0.75), np.array([4.0, -2.0]))
    is_close(answer, (seen.mu.value[-1], seen.nu.value[-1]))


def check_half(b1):
    """Exercise 4."""
    alone = through(adam_jax.scale_by_moments(b1, None), np.eye(1, 11)[0]).mu.value
    is_close(alone[10] / alone[0], 0.5)


def check_weight(weight):
    """Exercise 5."""
    rates = jnp.array([0.9, 0.5, 0.99])
    moments = through(adam_jax.scale_by_moments(lambda count: rates[count]), np.ones(3))
    is_close(weight, moments.mu.weight[-1])


def check_expected(value):
    """Exercise 6: over all sequences, v is the moving average of the mean of the squares."""
    means = np.sqrt(np.full(10, ((-3) ** 2 + 1**2) / 2))
    is_close(value, through(adam_jax.scale_by_moments(None, 0.99), means).nu.value[-1])


POINTS, TARGETS = np.array([[1.0, 0], [0, 1], [1, 1], [2, 1]]), np.array([0.0, 1, 1, 1])


def small_regression(theta):
    return jnp.mean((POINTS @ theta - TARGETS) ** 2) / 2


def check_fourth(theta):
    """Exercise 7."""
    due = descend(adam_jax.adam(0.1), small_regression, np.zeros(2), 4)[-1]
    is_close(theta, tuple(due), rtol=1e-5)


def check_large_epsilon(theta):
    """Exercise 8."""
    due = descend(adam_jax.adam(0.1, eps=0.75), small_regression, np.zeros(2), 1)[-1]
    is_close(theta, tuple(due))


def check_quarter(eps):
    """Exercise 9."""
    is_close(-through(adam_jax.adam(1.0, eps=eps), np.array([1e-3]))[0], 0.25)


def check_bound(bound):
    """Exercise 10, by the gradients that reach it."""
    b1, b2 = 0.9, 0.99
    stream = np.concatenate([np.zeros(5000), (b2 / b1) ** np.arange(300.0)])
    steps = through(adam_jax.adam(1.0, b1, b2, eps=0.0), stream)
    is_close(bound, float(jnp.abs(steps).max()))


def check_prediction(answer, found):
    """Exercises 11 and 14."""
    if isinstance(answer, dict):
        for name, laws in found.items():
            assert answer[name] == laws, say(f"not what {name} breaks", f"{name} 破坏的不是这些")
    assert answer == found, say("not these", "不是这些")


def check_three_stages(make):
    """Exercise 12."""
    stream = np.random.default_rng(12).normal(size=8)
    stage = make(0.1, 0.9, 0.99, 0.5)
    state, outputs = stage.start, []
    for g in stream:
        state, update = stage.step(state, g)
        outputs.append(update)
    is_close(outputs, through(adam_jax.adam(0.1, 0.9, 0.99, eps=0.5), stream), rtol=1e-9)


def check_agreement(tx):
    """Exercise 13."""
    stream = np.random.default_rng(13).normal(size=(20, 3))
    before = np.concatenate([np.zeros((1, 3)), stream[:-1]])
    due = np.where(stream * before >= 0, stream, 0)
    trees = [{"a": g[0], "b": [g[1:]]} for g in jnp.asarray(stream)]
    state = tx.init(trees[0])
    for tree, row in zip(trees, due, strict=True):
        output, state = tx.update(tree, state)
        assert np.array_equal(np.hstack([output["a"], output["b"][0]]), row), say(
            "not what agrees with the step before", "与上一步不矛盾的不是这些"
        )


def check_member(tx):
    """Exercise 15, against the formulas of both papers, in NumPy."""
    gradients = np.random.default_rng(11).normal(size=(30, 3))
    m = v = np.zeros(3)
    limit = 2 / (1 - 0.999) - 1
    for t, (g, step) in enumerate(zip(gradients, through(tx, gradients), strict=True), start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * (g - m) ** 2  # belief: g - m where Adam has g
        expected = m / (1 - 0.9**t)
        length = limit - 2 * t * 0.999**t / (1 - 0.999**t)
        if length >= 5:  # rectify: only then divide, and not by the whole root
            ratio = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            expected = expected * np.sqrt(ratio) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(step, -0.01 * expected, rtol=1e-6, err_msg=f"t = {t}")


def check_adamax(tx):
    """Exercise 16, against the paper's formula, in NumPy."""
    gradients = np.random.default_rng(14).normal(size=(30, 3))
    m = u = np.zeros(3)
    for t, (g, step) in enumerate(zip(gradients, through(tx, gradients), strict=True), start=1):
        m, u = 0.9 * m + 0.1 * g, np.maximum(0.999 * u, np.abs(g))
        np.testing.assert_allclose(
            step, -0.01 * m / (1 - 0.9**t) / u, rtol=1e-5, err_msg=f"t = {t}"
        )


def check_decayed(weight):
    """Exercise 17."""
    tx, theta = adam_jax.adamw(0.1, weight_decay=0.5), jnp.ones(())
    state = tx.init(theta)
    for _ in range(10):
        updates, state = tx.update(jnp.zeros(()), state, theta)
        theta = theta + updates
    is_close(weight, float(theta))


def check_schedule(schedule):
    """Exercise 18."""
    steps = -through(adam_jax.adam(schedule, eps=0.0), np.ones(100))
    due = np.concatenate([np.arange(1, 11) / 100, 0.1 * np.arange(90, 0, -1) / 90])
    is_close(steps, due, rtol=1e-6)


def check_storage(how):
    """Exercise 19."""
    wanted = jnp.geomspace(1e-6, 1e6, 64 * 64, dtype=jnp.float32).reshape(64, 64)
    stage = adam_jax.scale_by_moments(None, 0.5, nu_storage=how)
    _, state = stage.update(jnp.sqrt(2 * wanted), stage.init(wanted))  # makes v what is wanted
    moments, _ = stage.update(wanted, state)
    assert nbytes(state.nu) == 2 * wanted.size, say("not 16 bits a number", "不是每个数 16 位")
    error = jnp.max(jnp.abs(moments.nu.previous.value / wanted - 1))
    assert error < 1e-3, say(f"off by {error:.1e}", f"误差 {error:.1e}")


def check_bytes(number):
    """Exercise 20."""
    leaf = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    how = {"mu_storage": storage.int4(), "nu_storage": storage.int4()}
    state = jax.eval_shape(adam_jax.scale_by_moments(**how).init, leaf)
    is_close(number, nbytes([moment[:2] for moment in (state.mu, state.nu)]), rtol=1e-9)


def check_errors(answer):
    """Exercise 21."""
    check_prediction(answer, set("ABDEFHI"))


def check_mended(step):
    """Exercise 22: a function of (w, g, m, v, t), with t = 1 at the first step."""
    rng = np.random.default_rng(15)
    w = theta = jnp.asarray(rng.normal(size=3))
    m = v = jnp.zeros(3)
    tx = adam_jax.adam(0.01, eps=0.1)
    state = tx.init(theta)
    for t, g in enumerate(jnp.asarray(rng.normal(size=(5, 3))), start=1):
        w, m, v = step(w, g, m, v, t)
        updates, state = tx.update(g, state, theta)
        theta = theta + updates
        np.testing.assert_allclose(w, theta, rtol=1e-9, err_msg=f"t = {t}")


CHECKS = {
    1: check_rescaled,
    2: check_first_step,
    3: check_moments,
    4: check_half,
    5: check_weight,
    6: check_expected,
    7: check_fourth,
    8: check_large_epsilon,
    9: check_quarter,
    10: check_bound,
    11: check_prediction,
    12: check_three_stages,
    13: check_agreement,
    14: check_prediction,
    15: check_member,
    16: check_adamax,
    17: check_decayed,
    18: check_schedule,
    19: check_storage,
    20: check_bytes,
    21: check_errors,
    22: check_mended,
}
