"""The page `examples/course/explorable.html`: its arithmetic is JavaScript, and it is not trusted.

Its scripts run in V8 beside adam_jax in float64; `browser_explorable.py` uses it in a browser.
"""

import json
import re
from itertools import product
from random import Random

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


def far(script, s, path="path_of(s, stages_of(s))"):
    """How far the last point of a path is from the minimum."""
    return np.hypot(*np.subtract(script(f"{path}.at(-1).point", s=s), minimum(script, s)))


def minimum(script, s):
    return script("SURFACES")[s["surface"]]["minimum"]


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


# --- Beside the chain: other optimizers, noise, the scale of the loss, Reddi's problem -----------


def numbers(seed, count):
    """The page's generator: x ← 1664525 x + 1013904223 modulo 2³², and twelve numbers to a sum."""
    found = np.empty(12 * count)
    for i in range(len(found)):
        seed = (1664525 * seed + 1013904223) % 2**32
        found[i] = seed / 2**32
    return sum(found.reshape(-1, 12).T) - 6  # in the page's order, so with its roundings


def test_the_noise_is_the_same_everywhere(script):
    drawn = np.asarray(script("[1, 2].map((seed) => noises(seed, 500))"))
    for seed, noise in enumerate(drawn, start=1):
        np.testing.assert_array_equal(noise.ravel(), numbers(seed, 1000))
        assert abs(noise.mean()) < 0.1
        assert 0.9 < noise.std() < 1.1
        assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 0.1
        assert abs(np.corrcoef(noise.T)[0, 1]) < 0.1
    assert abs(np.corrcoef(*drawn.reshape(2, -1))[0, 1]) < 0.1


def reddi(_, t):
    """Along x 3, −1, −1 in turn, along y their mean."""
    return jnp.stack([jnp.where(t % 3 == 1, 3.0, -1.0), jnp.asarray(1 / 3)])


@pytest.mark.parametrize("name", [*LOSSES, "reddi"])
def test_noise_and_scale(script, name, x64):
    """c (∇f + σ ξ), for the chain and what stands beside it; Reddi's steps stay in the square."""
    s = script("opened('', name)", name=name) | {"scale": 30, "noise": 0.5, "seed": 3}
    # Enough to come to the edge of the square; on the others small, as above.
    s |= {"learning_rate": 0.02 if name == "reddi" else 0.002, "sgd_rate": 1e-4}
    noise = jnp.asarray(numbers(3, 2 * STEPS).reshape(STEPS, 2))
    slope = reddi if name == "reddi" else lambda p, _: jax.grad(LOSSES[name])(p)
    project = (lambda p: jnp.clip(p, -1, 1)) if name == "reddi" else lambda p: p

    def follow(tx):
        def step(carry, now):
            (point, state), (t, xi) = carry, now
            move, state = tx.update(s["scale"] * (slope(point, t) + s["noise"] * xi), state)
            return (project(point + move), state), project(point + move)

        start = jnp.asarray(s["start"], float)
        steps = jnp.arange(1, STEPS + 1), noise
        return np.asarray(jax.lax.scan(step, (start, tx.init(start)), steps)[1])

    chain, _ = run_code(script("code_of(s)", s=s))
    assert np.any(follow(chain) == -1) == (name == "reddi")
    for stages, tx in {"stages_of(s)": chain, **beside(script, s)}.items():
        path = script(f"path_of(s, {stages})", s=s)[: STEPS + 1]
        assert_close(points(path), follow(tx), "JavaScript")


def beside(script, s):
    """The stages, as the page names them, and the optimizer that a reader takes from its label."""
    names = script("Object.keys(BESIDE)")
    assert names == ["adam", "adagrad", "momentum", "sgd"]
    labels = [script(f"BESIDE.{name}(s)[0]", s=s) for name in names]
    return {
        f"BESIDE.{name}(s)[1]": eval(f"adam_jax.{label}")
        for name, label in zip(names, labels, strict=True)
    }


@pytest.mark.parametrize(("learning_rate", "sgd_rate"), [(0.1, 0.02), (20, 1.0)])
def test_what_stands_beside(script, gradients, learning_rate, sgd_rate, x64):
    s = script("opened()") | {"learning_rate": learning_rate, "sgd_rate": sgd_rate}
    optimizers = beside(script, s)
    recorded = lambda points, now: jnp.broadcast_to(now, points.shape)  # noqa: E731
    due = descend([*optimizers.values()], recorded, jnp.zeros((1, 2)), jnp.asarray(gradients))
    for i, stages in enumerate(optimizers):
        path = script(
            f"descend({stages}, (point, t) => gradients[t - 1], [0, 0], gradients.length)",
            s=s, gradients=gradients.tolist(),
        )  # fmt: skip
        assert_close(points(path), due[:, i, 0], "JavaScript")


def test_adam_is_not_drawn_twice(script, offered):
    """`is_adam` is true of the chain that is plain Adam, and of no other."""
    adam = [one for one in offered if script("is_adam(s)", s=one | DEFAULTS)]
    assert len(adam) == 1
    assert not script("is_adam(s)", s=adam[0] | DEFAULTS | {"b1": 0.5})
    assert script("is_adam(opened())")


def test_the_stars_are_reached(script):
    """By Adam as the page opens, on every surface but Reddi's, whose rates are chosen to fail."""
    for name in LOSSES:
        assert far(script, script("opened('', name)", name=name)) < 0.03


# --- What the answers say ------------------------------------------------------------------------


def test_the_answers(script):
    asked = {ask: script("opened(ask)", ask=ask) for ask in script("QUESTIONS")}
    page = re.search(r"const ASKED = (.*?)\n};", PAGE, re.DOTALL)[1]
    for ask in asked:  # each has words in both languages, and the numbers below stand in both
        assert re.search(rf"^  {ask}: {{\n    en: \[.*\n.*\],\n    zh: \[.*\n.*\],", page, re.M)
    says = lambda ask, *words: all(  # noqa: E731
        page.split(f"\n  {ask}: ")[1].split("\n  }")[0].count(word) >= 2 for word in words
    )
    path = lambda ask, more="": script(  # noqa: E731
        f"path_of({{...s, {more}}}, stages_of({{...s, {more}}}))", s=asked[ask]
    )
    steps = lambda ask, more="": np.asarray([at["flow"][-2] for at in path(ask, more)[1:]])  # noqa: E731

    assert says("debias", "3.16")
    np.testing.assert_allclose(np.abs(steps("debias")[0]), 0.1 / 0.001**0.5, rtol=1e-6)

    np.testing.assert_allclose(np.abs(steps("sign")), 1, rtol=1e-6)

    moved = np.abs(points(path("unit")) - points(path("unit", "scale: 1")))
    assert moved.max() < 1e-8
    assert abs(script("path_of(s, BESIDE.sgd(s)[1])[1].point", s=asked["unit"])[1]) > 100

    assert says("noise", "0.08", "0.2 ", "α = 1")
    adagrad = "path_of(s, BESIDE.adagrad(s)[1])"
    length = lambda flow: np.hypot(*np.transpose(flow[-50:])).mean()  # noqa: E731
    assert round(length(steps("noise")), 1) == 0.2
    slow = [at["flow"][-2] for at in script(adagrad, s=asked["noise"])[1:]]
    assert round(length(slow), 2) == 0.08
    for rate, adam_is_nearer in ((0.1, True), (1.0, False)):
        nearer = 0
        for seed in range(1, 21):
            s = asked["noise"] | {"learning_rate": rate, "seed": seed}
            ends = [
                np.hypot(*points(script(f"{one}.slice(-51)", s=s)).T).mean()
                for one in ("path_of(s, stages_of(s))", adagrad)
            ]
            nearer += ends[0] < ends[1]
        assert (nearer >= 19) if adam_is_nearer else (nearer <= 1)

    assert says("reddi", "0.76", "0.97")
    np.testing.assert_allclose(steps("reddi")[6:9, 0], [1.047, -0.762, -0.966], atol=1e-3)
    assert path("reddi")[-1]["point"][0] > 0.9
    for mended in ("maximum: 'before'", "maximum: 'after'", "b1: 0.9, b2: 0.999"):
        assert path("reddi", mended)[-1]["point"][0] < -0.7

    assert says("amsgrad", "0.18", "0.003")
    adam = "path_of(s, BESIDE.adam(s)[1])"
    assert round(far(script, asked["amsgrad"]), 2) == 0.18
    assert round(far(script, asked["amsgrad"], adam), 3) == 0.003

    assert says("rectify", "12 α", "0.026")
    np.testing.assert_allclose(np.abs(steps("rectify")[0]), 12, atol=0.5)
    ratio = "rectification(path_of(s, stages_of(s))[6].flow[1].nu)"
    assert round(script(ratio, s=asked["rectify"]), 3) == 0.026

    assert says("nesterov", "0.0016", "0.0030")
    assert round(far(script, asked["nesterov"]), 4) == 0.0016
    assert round(far(script, asked["nesterov"], adam), 4) == 0.0030

    assert says("epsilon", "0.001", "0.002", "0.02")
    roots = [at["flow"][1]["nu"]["value"] for at in path("epsilon")[1:]]
    assert np.sqrt(roots).max() < 1 < asked["epsilon"]["eps"] / 500
    momentum = points(script("path_of(s, BESIDE.momentum(s)[1])", s=asked["epsilon"]))
    assert np.hypot(*(momentum - points(path("epsilon"))).T).max() < 0.001


# --- Links ---------------------------------------------------------------------------------------


def test_links_lead_back(script, offered):
    """Every state, written as a link and read again, in both languages."""
    random = Random(0)
    sliders, names = script("SLIDERS"), script("Object.keys(BESIDE)")

    def draw(key):
        low, high, step, _ = sliders[key]
        k = low + step * random.randint(0, round((high - low) / step))
        return script("SLIDERS[key][3].get(k)", key=key, k=k)

    for ask in ["", *script("QUESTIONS")]:
        s = script("opened(ask)", ask=ask)
        assert script("write_link(s, 'en')", s=s) == ("en" if not ask else f"en&ask={ask}")
        for surface, language in product(script("SURFACES"), ("en", "zh")):
            for s in (
                script("opened(ask, surface)", ask=ask, surface=surface),
                script("opened(ask, surface)", ask=ask, surface=surface)
                | random.choice(offered)
                | {key: draw(key) for key in sliders}
                | {"beside": names[: random.randint(0, 4)], "step": 7, "start": [0.125, -0.3]},
            ):
                link = script("write_link(s, language)", s=s, language=language)
                assert script("read_link(link)", link=f"#{link}") == [s, language]
                assert re.fullmatch(r"[\w&=.,-]+", link)


def test_any_link_can_be_read(script, offered):
    """What is unknown, out of range or refused in a link does not matter."""
    opened = script("opened()")
    for link in (
        "",
        "#",
        "#zz",
        "#ask=no&surface=no&b1=&step=x&start=1&start&__proto__=1&toString=2",
    ):
        assert script("read_link(link)[0]", link=link) == opened
    wild = "#zh&b1=-3&b2=7&eps=1e99&scale=0&noise=-1&seed=2.4&step=1e9&start=99,-99&beside=sgd,no"
    s, language = script("read_link(link)", link=wild)
    assert language == "zh"
    due = {"b1": 0, "b2": 0.9999, "eps": 1000, "scale": 1e-4, "noise": 0, "seed": 2, "step": 200}
    assert s == opened | due | {"start": [4, -1.2], "beside": ["sgd"]}
    refused = script("read_link('#correction=off&division=rectify&step=3')[0]")
    assert refused == opened | {"step": 3}


# --- The file ------------------------------------------------------------------------------------


def test_the_surfaces_and_colours_are_those_of_compare(script):
    surfaces = script("SURFACES")
    for surface in compare.SURFACES:
        (name,) = (name for name, loss in LOSSES.items() if loss is surface.loss)
        for field in ("start", "minimum", "view"):
            assert tuple(surfaces[name][field]) == getattr(surface, field)
    light = PAGE[: PAGE.index("prefers-color-scheme")]
    for name in ("SGD", "Momentum", "AdaGrad", "Adam", "AMSGrad"):
        assert re.search(rf"--{name.lower()}: ([#\w]+);", light)[1] == compare.COLORS[name]


def test_the_page_is_one_small_file():
    """No network, no build: nothing is loaded from elsewhere, there are only links to follow."""
    assert len(PAGE.encode()) < 200_000
    without_links = re.sub(r'<a href="[^"]*">', "<a>", PAGE)
    loads = r"https?:|@import|\burl\((?!#)|\bimport\(|\bfetch\(|\bsrc="
    assert not re.search(loads, without_links)
    assert re.findall(r"<link .*>", PAGE) == ['<link rel="icon" href="data:,">']


def test_its_links_lead_to_files_that_are_here():
    here = [link for link in re.findall(r'<a href="([^"]*)">', PAGE) if "://" not in link]
    assert len(here) == 4
    for link in here:
        assert (browser_explorable.PAGE.parent / link).is_file()
    (named,) = set(re.findall(r"<code>(tests/[^<]*)</code>", PAGE))
    assert (browser_explorable.PAGE.parents[2] / named).samefile(__file__)
