"""Adam where second moments are hard to keep: rare rows, heavy tails, and a small transformer.

Every way to keep the moments runs the chain below from the same weights on the same gradients. The
published maps of 8 and 4 bits are transcribed from their papers, not run by those libraries.
"""

import json
import math
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import commandline
import drawing
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import transformer
from flax import nnx
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.stats import t as student
from tqdm import tqdm

import adam_jax
from adam_jax import storage


def chain(learning_rate: optax.Schedule, kept: dict) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        adam_jax.scale_by_moments(b1=0.9, b2=0.999, **kept),
        adam_jax.bias_correct(eps=1e-8),
        adam_jax.scale_by_lr(learning_rate),
    )


# --- The maps of two papers -----------------------------------------------------------------------


class Coded(NamedTuple):
    """The parts of a moment in codes, a byte each: what is compared is their values."""

    codes: Any
    scales: Any
    whole: Any = None


def dynamic_map(bits: int, signed: bool) -> np.ndarray:
    """The 2^bits values of the dynamic map of Dettmers et al. (arXiv 2110.02861), in order.

    Leading zeros are a power of ten, and the bits after the first one a fraction: the middle of one
    of equal steps from 0.1 to 1. Without a sign there is one more bit for the fraction. The two
    codes that are left stand for 0 and 1.
    """
    values = [0.0, 1.0]
    for digits in range(bits - 1):
        edges = np.linspace(0.1, 1, 2 ** (digits + (not signed)) + 1)
        middles = 10.0 ** (digits + 2 - bits) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *-middles] if signed else [*middles]
    return np.sort(np.array(values, np.float32))


def linear_map(bits: int) -> np.ndarray:
    """The values (i + 1) / 2^bits of Li et al. (arXiv 2309.01507): none is zero."""
    return np.arange(1, 2**bits + 1, dtype=np.float32) / 2**bits


class Scales(NamedTuple):
    """What a moment is divided by: found from it, and spread over its elements again."""

    of: Callable[[jax.Array], jax.Array]
    over: Callable[[jax.Array, tuple[int, ...]], jax.Array]


def of_blocks(block: int) -> Scales:
    """The largest magnitude among so many neighbours in row-major order."""

    def of(x):
        flat = jnp.pad(jnp.abs(x).ravel(), (0, -x.size % block))
        return flat.reshape(-1, block).max(axis=1)

    def over(scales, shape):
        return jnp.repeat(scales, block)[: math.prod(shape)].reshape(shape)

    return Scales(of, over)


def of_axes() -> Scales:
    """Of a row's and a column's largest magnitude the smaller: Li et al.'s rank-1 normalization."""

    def of(x):
        others = (tuple(a for a in range(x.ndim) if a != axis) for axis in range(x.ndim))
        return jnp.concatenate([jnp.abs(x).max(axis=other) for other in others])

    def over(scales, shape):
        pieces = jnp.split(scales, np.cumsum(shape)[:-1])
        return reduce(jnp.minimum, jnp.ix_(*pieces))

    return Scales(of, over)


def nearest(values: np.ndarray, scales: Scales, only: str) -> storage.Storage:
    """Keep a moment over its scales as the number of the nearest of some values."""
    between = (values[:-1] + values[1:]) / 2

    def save(moment, leaf):
        kept = scales.of(moment)
        over = scales.over(kept, leaf.shape)
        share = moment / jnp.where(over == 0, 1, over)
        codes = jnp.searchsorted(between, share, method="scan_unrolled")
        return Coded(codes.astype(jnp.uint8), kept)

    def load(stored, leaf):
        return jnp.asarray(values)[stored.codes] * scales.over(stored.scales, leaf.shape)

    return storage.Storage(save, load, only=only, parts=Coded)


def dynamic_8_bit(block: int) -> dict:
    """Both moments as in Dettmers et al., whose block is 2,048 (the library's is 256 today).

    They also keep the moments of embeddings in 32 bits. Here all large leaves are kept alike.
    """
    return {
        "mu_storage": nearest(dynamic_map(8, signed=True), of_blocks(block), only="mu"),
        "nu_storage": nearest(dynamic_map(8, signed=False), of_blocks(block), only="nu"),
    }


def linear_4_bit() -> dict:
    """Both moments as in the 4-bit AdamW of Li et al.: B128/DE and Rank-1/Linear."""
    return {
        "mu_storage": nearest(dynamic_map(4, signed=True), of_blocks(128), only="mu"),
        "nu_storage": nearest(linear_map(4), of_axes(), only="nu"),
    }


# --- How the moments are kept ---------------------------------------------------------------------


class Choice(NamedTuple):
    name: str
    kept: dict  # by scale_by_moments
    color: str
    line: str = "-"


EIGHT = storage.int8()
CHOICES = [
    Choice("float32", {}, "black"),
    Choice("int8()", {"mu_storage": EIGHT, "nu_storage": EIGHT}, "#d55e00"),
    Choice("int4()", {"mu_storage": storage.int4(), "nu_storage": storage.int4()}, "#0072b2"),
    Choice("int8() m, factored() v",
           {"mu_storage": EIGHT, "nu_storage": storage.factored()}, "#009e73"),
    Choice("int8() m, block_mean() v",
           {"mu_storage": EIGHT, "nu_storage": storage.block_mean()}, "#cc79a7"),
    Choice("dynamic 8-bit map, block 2048", dynamic_8_bit(2048), "#e69f00", "--"),
    Choice("dynamic 8-bit map, block 256", dynamic_8_bit(256), "#a6761d", ":"),
    Choice("4-bit linear map, rank-1", linear_4_bit(), "#56b4e9", "--"),
]  # fmt: skip

# --- The problems ---------------------------------------------------------------------------------


class Run(NamedTuple):
    """A problem from one seed."""

    params: Any
    gradient: Callable[[Any, jax.Array], Any]  # of the parameters, and random
    error: Callable[[Any], jax.Array]


def zipf(key: jax.Array) -> Run:
    """An embedding whose rows are met as often as Zipf's law has it, the most frequent one first.

    A batch of 64 draws a row each and sees its target under noise. The error is the mean square to
    the targets, in which rows count as often as they are met.
    """
    rows, width, batch = 2048, 32, 64
    often = 1 / jnp.arange(1.0, rows + 1)
    often = often / often.sum()
    target = jax.random.normal(key, (rows, width))

    def gradient(params, key):
        draw, noise = jax.random.split(key)
        met = jax.random.choice(draw, rows, (batch,), p=often)
        table = params["embedding"]
        seen = target[met] + jax.random.normal(noise, (batch, width))
        return {"embedding": jnp.zeros_like(table).at[met].add((table[met] - seen) / batch)}

    def error(params):
        return often @ jnp.mean(jnp.square(params["embedding"] - target), axis=1)

    return Run({"embedding": jnp.zeros((rows, width))}, gradient, error)


def tails(key: jax.Array) -> Run:
    """A quadratic whose gradients have noise by Student's t of 1.5 degrees: no finite variance."""
    target = jax.random.normal(key, (64, 128))

    def gradient(params, key):
        return {"kernel": params["kernel"] - target + jax.random.t(key, 1.5, target.shape)}

    def error(params):
        return jnp.mean(jnp.square(params["kernel"] - target)) / 2

    return Run({"kernel": jnp.zeros_like(target)}, gradient, error)


def characters(key: jax.Array) -> Run:
    """A transformer of 130,000 parameters on the language reference; loss on its last tenth."""
    alphabet, text = transformer.language_reference()
    split, window = len(text) * 9 // 10, transformer.CONTEXT + 1
    held_out = np.random.default_rng(0).integers(split, len(text) - window, 64)
    test = transformer.next_characters(text, held_out)
    text = jnp.asarray(text)
    model = transformer.Transformer(alphabet, nnx.Rngs(key), width=64, layers=2)
    graph, params = nnx.split(model)

    def loss(params, inputs, targets):
        logits = nnx.merge(graph, params)(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def gradient(params, key):
        starts = jax.random.randint(key, (8,), 0, split - window)
        return jax.grad(loss)(params, *transformer.next_characters(text, starts))

    return Run(params, gradient, lambda params: loss(params, *test))


class Problem(NamedTuple):
    title: str
    run: Callable[[jax.Array], Run]
    peak: float  # learning rate
    error: str
    over_seeds: Callable  # jax.vmap, or jax.lax.map where one run fills the machine


PROBLEMS = {
    "zipf": Problem("Zipf embedding", zipf, 1e-2, "weighted error", jax.vmap),
    "tails": Problem("Heavy-tailed gradients", tails, 1e-2, "loss", jax.vmap),
    "transformer": Problem(
        "Transformer", characters, 3e-3, "held-out loss", lambda f: partial(jax.lax.map, f)
    ),
}

# --- Runs -----------------------------------------------------------------------------------------

POINTS = 50  # of a curve


def points_of(steps: int) -> tuple[int, int]:
    """How many points a curve has, and the steps to each."""
    points = min(POINTS, steps)
    return points, steps // points


@partial(jax.jit, static_argnames=("problem", "choice", "steps"))
def curves(problem: str, choice: int, steps: int, keys: jax.Array) -> jax.Array:
    """The error at each point, for each key."""
    _, run, peak, _, over_seeds = PROBLEMS[problem]
    points, every = points_of(steps)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 10), steps)
    tx = chain(rate, CHOICES[choice].kept)

    def curve(key):
        start, draws = jax.random.split(key)
        params, gradient, error = run(start)

        def step(carry, count):
            params, state = carry
            grads = gradient(params, jax.random.fold_in(draws, count))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def point(carry, counts):
            carry, _ = jax.lax.scan(step, carry, counts)
            return carry, error(carry[0])

        counts = jnp.arange(points * every).reshape(points, every)
        return jax.lax.scan(point, (params, tx.init(params)), counts)[1]

    return over_seeds(curve)(keys)


class Row(NamedTuple):
    """The error of one way to keep the moments: means over the seeds.

    `half` is half of the interval, by Student's t, that has the mean difference to float32 from the
    same seeds with 95 %.
    """

    problem: str
    choice: str
    steps: list[int]
    mean: list[float]
    half: list[float]


def measured(problem: str, steps: int, seeds: int) -> list[Row]:
    keys = jax.random.split(jax.random.key(0), seeds)
    points, every = points_of(steps)
    at = [every * (point + 1) for point in range(points)]
    rows, float32 = [], None
    for n, choice in enumerate(tqdm(CHOICES, problem, leave=False)):
        errors = np.asarray(curves(problem, n, steps, keys), np.float64)
        float32 = errors if float32 is None else float32
        apart = errors - float32
        half = student.ppf(0.975, seeds - 1) * apart.std(axis=0, ddof=1) / math.sqrt(seeds)
        rows.append(Row(problem, choice.name, at, [*errors.mean(axis=0)], [*half]))
    return rows


# --- What is shown --------------------------------------------------------------------------------


def number(x: float) -> str:
    return f"{x:.1e}" if x >= 100 else f"{x:.3g}"


def table(rows: list[Row]) -> str:
    """One line a choice: the last error on each problem, and its distance to float32's."""
    problems = {row.problem: row.mean[-1] for row in rows if row.choice == CHOICES[0].name}
    heads = [f"{PROBLEMS[name].title}, {PROBLEMS[name].error}" for name in problems]
    lines = [f"| moments | {' | '.join(heads)} |", "|---" * (1 + len(problems)) + "|"]
    for choice in CHOICES:
        cells = []
        for row in rows:
            if row.choice != choice.name:
                continue
            last, float32 = row.mean[-1], problems[row.problem]
            cell = f"{last:.3g}"
            if last > 10 * float32:
                cell = f"{last:.1e}: diverges"
            elif choice is not CHOICES[0]:
                more, half = (100 * x / float32 for x in (last - float32, row.half[-1]))
                cell += f" ({more:+.1f} ± {half:.1f} %)"
            cells.append(cell)
        lines.append(f"| {choice.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """A panel a problem: means over the seeds, and shaded how far from float32's they may be.

    What diverges leaves the panel at its upper edge, without a shade.
    """
    problems = list(dict.fromkeys(row.problem for row in rows))
    figure, panels = plt.subplots(
        1, len(problems), figsize=(4.2 * len(problems), 4.6), layout="constrained", squeeze=False
    )
    for axes, problem in zip(panels[0], problems, strict=True):
        ours = [row for row in rows if row.problem == problem]
        top = 1.1 * max(ours[0].mean)
        for choice, row in zip(CHOICES, ours, strict=True):
            mean, half = np.asarray(row.mean), np.asarray(row.half)
            axes.plot(row.steps, mean, choice.line, color=choice.color, label=choice.name)
            if np.max(mean) < 2 * top:
                axes.fill_between(
                    row.steps, mean - half, mean + half, color=choice.color, alpha=0.15, linewidth=0
                )
        low = min(min(row.mean) for row in ours)
        axes.set(
            title=PROBLEMS[problem].title, xlabel="step", ylabel=PROBLEMS[problem].error,
            yscale="log", ylim=(0.9 * low, top),
        )  # fmt: skip
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(problems) + 1)
    drawing.save(figure, path)


def main() -> None:
    parser = commandline.parser(__doc__, steps=1500, seeds=5)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    for option, what in {"plot": "the curves", "json": "every figure"}.items():
        told = f"where to put {what} (default: nowhere)"
        parser.add_argument(f"--{option}", type=commandline.new_file, help=told)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: one run has no interval")

    print(f"{options.steps} steps, seeds 0 to {options.seeds - 1}; {commandline.hardware()}")
    print("mean (and its difference to float32, with an interval of 95 % by Student's t)\n")
    rows = [
        row for name in options.problems for row in measured(name, options.steps, options.seeds)
    ]
    print(table(rows))
    if options.plot:
        draw(rows, options.plot)
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))


if __name__ == "__main__":
    main()
