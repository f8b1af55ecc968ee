"""The page `examples/course/explorable.html`: its arithmetic is JavaScript, and it is not trusted.

Its scripts run in V8 beside adam_jax in float64, and the page in a browser where one is installed.
"""

import json
import re
from itertools import product

import browser_explorable
import compare
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from py_mini_racer import MiniRacer
from support import assert_close

import adam_jax

PAGE = browser_explorable.PAGE.read_text()
STEPS = 200


def quadratic(p):
    """The page's own surface: a ditch across both axes, fifty times as steep as it is long."""
    x, y = p
    return 5 * (x - y) ** 2 + 0.1 * (x + y) ** 2


LOSSES = {"quadratic": quadratic, "rosenbrock": compare.rosenbrock, "beale": compare.beale}


class Script:
    """The scripts of the page that need no browser, in V8."""

    def __init__(self):
        self.engine = MiniRacer()
        for name in ("arithmetic", "chains"):
            script = re.search(rf'<script id="{name}">(.*?)</script>', PAGE, re.DOTALL)
            self.engine.eval(script[1])

    def __call__(self, expression, **values):
        """The value of an expression, with `values` as its variables: numbers keep every bit."""
        names, arguments = ", ".join(values), ", ".join(map(json.dumps, values.values()))
        return json.loads(
            self.engine.eval(f"JSON.stringify((({names}) => {expression})({arguments}))")
        )


@pytest.fixture(scope="module")
def script():
    return Script()


# On the surfaces a small rate, because a chain that bounces multiplies the last digit by 10⁵.
DEFAULTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "learning_rate": 0.002}
# On recorded gradients anything goes: these, the last two from the ends of the sliders, take turns.
OTHERS = [
    {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "learning_rate": 0.1},
    {"b1": 0.999, "b2": 0.9999, "eps": 1e-12, "learning_rate": 1e-4},
    {"b1": 0.0, "b2": 0.0, "eps": 1.0, "learning_rate": 1.0},
]


@pytest.fixture(scope="module")
def offered(script):
    """Every combination of choices that the page offers, each with its own stages and code."""
    return script("combinations()")


@pytest.fixture(scope="module")
def gradients():
    """The gradients of two weights: of all magnitudes, and zero at times."""
    rng = np.random.default_rng(0)
    scale = 10 ** rng.uniform(-3, 3, (STEPS, 1))
    return rng.normal(size=(STEPS, 2)) * scale * (rng.random((STEPS, 2)) < 0.9)


def run_code(code):
    """The optimizer of a reader who copies the code, and that of its last line, if there is one."""
    session: dict = {}
    exec(code, session)
    member = re.search(r"^# = (.*)$", code, re.MULTILINE)
    return session["tx"], member and eval(member[1], session)


def descend(optimizers, gradient, starts, recorded):
    """The points of every optimizer (steps, optimizers, starts, 2)."""

    def step(carry, recorded):
        points, states = carry
        slopes = gradient(points, recorded)
        each = zip(optimizers, slopes, states, strict=True)
        moves, states = zip(*(tx.update(g, state) for tx, g, state in each), strict=True)
        points = points + jnp.stack(moves)
        return (points, states), points

    carry = jnp.stack([starts] * len(optimizers)), tuple(tx.init(starts) for tx in optimizers)
    return np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, recorded)[1])(carry))


def points(path):
    """Where the steps of a path of the page end."""
    return np.asarray([at["point"] for at in path[1:]])


def test_every_chain_on_every_surface(script, offered, x64):
    """200 steps by the page's gradients are those of adam_jax by the gradients of the losses."""
    settings = [one | DEFAULTS for one in offered]
    starts = jnp.asarray([script("SURFACES")[name]["start"] for name in LOSSES])

    def gradient(points, _):
        slopes = [jax.vmap(jax.grad(loss))(points[:, i]) for i, loss in enumerate(LOSSES.values())]
        return jnp.stack(slopes, axis=1)

    optimizers = [run_code(script("code_of(s)", s=one))[0] for one in settings]
    paths = descend(optimizers, gradient, starts, jnp.zeros(STEPS))
    for i, one in enumerate(settings):
        for j, name in enumerate(LOSSES):
            surface = "(({ gradient, start }) => descend(stages_of(s), gradient, start, steps))"
            path = script(f"{surface}(SURFACES[name])", s=one, name=name, steps=STEPS)
            assert_close(points(path), paths[:, i, j], "JavaScript")
            assert np.hypot(*(paths[-1, i, j] - starts[j])) > 0.1


def test_every_chain_at_other_rates(script, offered, gradients, x64):
    """On recorded gradients, and by the optimizer that the page says it is, where it names one."""
    settings = [one | OTHERS[i % len(OTHERS)] for i, one in enumerate(offered)]
    codes = [run_code(script("code_of(s)", s=one)) for one in settings]
    assert sum(member is not None for _, member in codes) == 15
    recorded = lambda points, now: jnp.broadcast_to(now, points.shape)  # noqa: E731
    optimizers = [member or tx for tx, member in codes]
    paths = descend(optimizers, recorded, jnp.zeros((1, 2)), jnp.asarray(gradients))
    for i, one in enumerate(settings):
        path = script(
            "descend(stages_of(s), (point, t) => gradients[t - 1], [0, 0], gradients.length)",
            s=one, gradients=gradients.tolist(),
        )  # fmt: skip
        assert_close(points(path), paths[:, i, 0], "JavaScript")


@pytest.mark.parametrize(
    "chosen",
    [
        {"lookahead": "nesterov", "maximum": "before", "division": "normalize"},
        {"lookahead": "none", "maximum": "after", "division": "rectify"},
    ],
)
def test_what_flows(script, gradients, chosen, x64):
    """The numbers that the page shows between the stages, not only where the path goes."""
    settings = {"correction": "on", "epsilon": "eps"} | chosen | DEFAULTS
    path = script(
        "descend(stages_of(s), (point, t) => gradients[t - 1], [0, 0], 8)",
        s=settings, gradients=gradients.tolist(),
    )  # fmt: skip
    stages = [getattr(adam_jax, name)(**kw) for name, kw in script("stages_of(s)", s=settings)]

    @jax.jit
    def flow(states, signal):
        signals = []
        for i, stage in enumerate(stages):
            signal, states[i] = stage.update(signal, states[i])
            signals.append(signal)
        return states, signals

    states = [stage.init(jnp.zeros(2)) for stage in stages]
    for at, gradient in zip(path[1:], gradients[:8], strict=True):
        states, signals = flow(states, jnp.asarray(gradient))
        for shown, signal in zip(at["flow"][1:], signals, strict=True):
            if not isinstance(signal, adam_jax.Moments):
                assert_close(np.asarray(shown), signal, "JavaScript")
                continue
            for average in ("mu", "nu"):
                for field, value in shown[average].items():
                    due = getattr(getattr(signal, average), field)
                    assert_close(np.asarray(value), due, "JavaScript")


def test_every_chain_is_offered_once(script, offered, gradients):
    """24 different ones; each combination that is refused would be one of them by another name."""
    rows = [dict(zip(offered[0], row, strict=True)) for row in product(*script("CHOICES").values())]
    refused = [row for row in rows if row not in offered]
    assert (len(offered), len(refused)) == (24, 24)
    follow = "descend(stages_of(s), (point, t) => gradients[t - 1], [0, 0], gradients.length)"
    rates = DEFAULTS | {"eps": 0.1}
    known, others = (
        {str(script(follow, s=row | rates, gradients=gradients.tolist())[-1]) for row in part}
        for part in (offered, refused)
    )
    assert len(known) == 24
    assert others <= known


def test_every_chain_can_be_reached(offered):
    """By choices that are enabled, one after another."""
    near = lambda a, b: sum(a[key] != b[key] for key in a) == 1  # noqa: E731
    reached, new = [], [offered[0]]
    while new:
        reached += new
        new = [b for b in offered if b not in reached and any(near(a, b) for a in new)]
    assert len(reached) == len(offered)


def test_the_surfaces_and_colours_are_those_of_compare(script):
    surfaces = script("SURFACES")
    for surface in compare.SURFACES:
        (name,) = (name for name, loss in LOSSES.items() if loss is surface.loss)
        for field in ("start", "minimum", "view"):
            assert tuple(surfaces[name][field]) == getattr(surface, field)
    light = PAGE[: PAGE.index("prefers-color-scheme")]
    for name in ("SGD", "Adam", "AMSGrad"):
        assert re.search(rf"--{name.lower()}: ([#\w]+);", light)[1] == compare.COLORS[name]


def test_the_page_is_one_small_file():
    """No network, no build: nothing is loaded from elsewhere."""
    assert len(PAGE.encode()) < 150_000
    assert not re.search(r"https?:|@import|\burl\((?!#)|\bimport\(|\bfetch\(|\bsrc=", PAGE)
    assert re.findall(r"<link .*>", PAGE) == ['<link rel="icon" href="data:,">']


@pytest.mark.skipif(bool(browser_explorable.missing()), reason=browser_explorable.missing())
def test_in_a_browser():
    browser_explorable.check()
