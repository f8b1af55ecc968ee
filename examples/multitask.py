"""Two losses, one network: every way of `adam_jax.tasks` to make one gradient of two.

MultiMNIST after Sener and Koltun (arXiv 1810.04650): two digits laid over each other, one shared
encoder, a head that reads the left digit and one that reads the right. The table has the accuracy
of both for each method, beside networks that learn one digit alone.

Then the two losses of Liu et al. (arXiv 2110.14048), figure 1, from the paper's three starts: where
Adam on the mean, MGDA, PCGrad and CAGrad go.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import commandline
import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import Data, shipped_digits
from drawing import COLORS, plt, save
from flax import nnx
from mnist import cross_entropy
from tqdm import tqdm

import adam_jax
from adam_jax import tasks


def parts(params):
    """Which weights are shared."""
    part = lambda path, _: "shared" if path[0].key == "shared" else "heads"  # noqa: E731
    return jax.tree_util.tree_map_with_path(part, params)


def combined(combination: optax.GradientTransformation) -> optax.GradientTransformation:
    """One gradient for the shared weights, each head's own gradient for the heads, and Adam."""
    ways = {"shared": combination, "heads": tasks.weighted([1, 1])}
    return optax.chain(optax.partition(ways, parts), adam_jax.adam(1e-3))


def of_directions(combination: optax.GradientTransformation) -> optax.GradientTransformation:
    """Combine the directions that Adam has for each task: moments before, not after."""
    direction = optax.chain(adam_jax.scale_by_moments(), adam_jax.bias_correct())
    ways = {
        "shared": optax.chain(tasks.per_task(2, direction), combination),
        "heads": optax.chain(tasks.weighted([1, 1]), direction),
    }
    return optax.chain(optax.partition(ways, parts), adam_jax.scale_by_lr(1e-3))


METHODS = {
    "left alone": combined(tasks.weighted([1, 0])),
    "right alone": combined(tasks.weighted([0, 1])),
    "mean": combined(tasks.weighted([0.5, 0.5])),
    "pcgrad": combined(tasks.pcgrad()),
    "mgda": combined(tasks.mgda()),
    "cagrad": combined(tasks.cagrad(0.5)),
    "aligned_mtl": combined(tasks.aligned_mtl()),
    "gradnorm": combined(tasks.gradnorm(2)),
    "mgda of Adam's directions": of_directions(tasks.mgda()),
}

BATCH, CHUNK = 64, 100

# --- MultiMNIST -----------------------------------------------------------------------------------


def overlaid(left: jax.Array, right: jax.Array) -> jax.Array:
    """Two digits of 28 × 28 on 36 × 36, one at the top left, one at the bottom right, at half
    the resolution."""
    place = lambda images, before: jnp.pad(images, [(0, 0)] + [(before, 8 - before)] * 2)  # noqa: E731
    both = jnp.maximum(place(left, 0), place(right, 8))
    return both.reshape(-1, 18, 2, 18, 2).mean(axis=(2, 4))


def pairs(key: jax.Array, images: jax.Array, labels: jax.Array, count: int):
    """Random pairs of digits: the images, and the labels of the left and of the right."""
    left, right = jax.random.randint(key, (2, count), 0, len(images))
    return overlaid(images[left], images[right]), labels[jnp.stack([left, right])]


class Network(nnx.Module):
    """An encoder for both digits, and a head for each."""

    def __init__(self, rngs: nnx.Rngs):
        self.shared = nnx.Sequential(
            nnx.Linear(18 * 18, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 64, rngs=rngs), nnx.relu
        )
        self.left = nnx.Linear(64, 10, rngs=rngs)
        self.right = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        features = self.shared(images.reshape(len(images), -1))
        return jnp.stack([self.left(features), self.right(features)])


def train(tx: optax.GradientTransformation, data: Data, options: argparse.Namespace, bar: tqdm):
    """The accuracies of both digits for every seed, shape (seeds, 2)."""
    graph, _ = nnx.split(Network(nnx.Rngs(0)))
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)

    def losses(params, images, labels):
        values = jax.vmap(cross_entropy)(nnx.merge(graph, params)(images), labels)
        values = values * jnp.array([1.0, options.scale])
        return values, values

    @partial(jax.jit, donate_argnums=(0, 1))
    def chunk(params, state, keys):
        def step(carry, key):
            params, state = carry
            batch = pairs(key, images, labels, BATCH)
            grads, values = jax.jacrev(losses, has_aux=True)(params, *batch)
            updates, state = tx.update(grads, state, params, value=values)
            return (optax.apply_updates(params, updates), state), values

        return jax.lax.scan(step, (params, state), keys)[0]

    @jax.jit
    def accuracy(params):
        test = pairs(jax.random.key(0), *map(jnp.asarray, data[2:]), 4000)
        outputs = nnx.merge(graph, params)(test[0])
        return jnp.mean(jnp.argmax(outputs, axis=-1) == test[1], axis=1)

    accuracies = []
    for seed in range(options.seeds):
        params = nnx.state(Network(nnx.Rngs(seed)), nnx.Param)
        state = tx.init(params)
        keys = jax.random.split(jax.random.key(seed + 1), options.steps)
        for start in range(0, options.steps, CHUNK):
            params, state = chunk(params, state, keys[start : start + CHUNK])
            bar.update(len(keys[start : start + CHUNK]))
        accuracies.append(np.asarray(accuracy(params)))
    return np.stack(accuracies)


def table(found: dict[str, np.ndarray]) -> str:
    """Mean and, from the least to the most, the spread over the seeds."""
    cell = lambda a: f"{a.mean():.1%} ({100 * a.min():.1f}–{100 * a.max():.1f})"  # noqa: E731
    rows = ["| method | left digit | right digit |", "|---|---|---|"]
    alone = np.stack([found["left alone"][:, 0], found["right alone"][:, 1]], axis=1)
    for name, both in {"each alone": alone, **found}.items():
        if name not in ("left alone", "right alone"):
            rows.append(f"| {name} | {cell(both[:, 0])} | {cell(both[:, 1])} |")
    return "\n".join(rows)


MARKERS = dict(zip(list(METHODS)[2:], "os^Dv*P", strict=True))


def draw_accuracies(found: dict[str, np.ndarray], scale: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    style = {"color": "black", "linestyle": "--", "linewidth": 1}
    axes.axvline(100 * found["left alone"][:, 0].mean(), **style)
    axes.axhline(100 * found["right alone"][:, 1].mean(), **style, label="each digit alone")
    for number, (name, marker) in enumerate(MARKERS.items()):
        both = 100 * found[name]
        look = {"marker": marker, "color": f"C{number}"}
        axes.scatter(*both.T, s=25, alpha=0.45, **look)
        axes.scatter(*both.mean(axis=0), s=110, edgecolor="black", label=name, **look)
    axes.set(
        title=f"Two digits; the right one's loss × {scale:g}",
        xlabel="left digit correct, %", ylabel="right digit correct, %",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(
        title="small: one seed\nlarge: the mean of the seeds",
        loc="center left", bbox_to_anchor=(1, 0.5), frameon=False,
    )  # fmt: skip
    save(figure, path)


# --- The two losses of CAGrad's figure 1 ----------------------------------------------------------

TOY_STEPS, TOY_RECORDED = 100_000, 1000
STARTS = np.array([[-8.5, 7.5], [-8.5, -5.0], [9.0, 9.0]], np.float32)
DEEPEST = -8.3552  # x2 at the minima of both losses, and of every mean of them
TOY_METHODS = {
    "Adam on the mean": tasks.weighted([0.5, 0.5]),
    "MGDA": tasks.mgda(),
    "PCGrad": tasks.pcgrad(),
    "CAGrad, c = 0.5": tasks.cagrad(0.5),
}


def toy(point: jax.Array) -> jax.Array:
    """Two losses of the plane: steep valleys at the top, two bowls side by side at the bottom."""
    x, y = point[0], point[1]
    valley = lambda depth: jnp.log(jnp.maximum(jnp.abs(depth), 5e-6)) + 6  # noqa: E731
    bowl = lambda center: ((x - center) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20  # noqa: E731
    top, bottom = (jnp.maximum(jnp.tanh(sign * 0.5 * y), 0.0) for sign in (1, -1))
    first = valley(0.5 * (-x - 7) - jnp.tanh(-y)) * top + bowl(7.0) * bottom
    second = valley(0.5 * (-x + 3) + jnp.tanh(-y) + 2) * top + bowl(-7.0) * bottom
    return jnp.stack([first, second])


def toy_paths(combination: optax.GradientTransformation) -> np.ndarray:
    """Where the method is at every hundredth step, from all starts: (recorded, starts, 2)."""
    tx = optax.chain(combination, adam_jax.adam(1e-3))

    def step(carry, _):
        point, state = carry
        updates, state = tx.update(jax.jacrev(toy)(point), state, point)
        return (optax.apply_updates(point, updates), state), None

    def record(carry, _):
        return jax.lax.scan(step, carry, length=TOY_STEPS // TOY_RECORDED)[0], carry[0]

    def path(start):
        (end, _), points = jax.lax.scan(record, (start, tx.init(start)), length=TOY_RECORDED)
        return jnp.concatenate([points, end[None]])

    return np.asarray(jax.jit(jax.vmap(path, out_axes=1))(jnp.asarray(STARTS)))


def draw_toy(path: Path) -> None:
    figure, row = plt.subplots(
        1, 4, figsize=(13, 4.1), layout="constrained", sharex=True, sharey=True
    )
    grid = np.meshgrid(np.linspace(-11, 11, 200), np.linspace(-11, 11, 200))
    heights = np.asarray(toy(jnp.asarray(grid))).mean(axis=0)
    print(
        f"the two losses of CAGrad's figure 1, {TOY_STEPS} steps of Adam 0.001; the least mean is"
    )
    print(f"  {np.asarray(toy(jnp.array([0.0, DEEPEST]))).mean():.2f}, at (0, {DEEPEST:.2f})")
    for axes, (name, combination) in zip(row, TOY_METHODS.items(), strict=True):
        paths = toy_paths(combination)
        axes.contour(*grid, heights, 14, colors="0.75", linewidths=0.8, linestyles="solid")
        axes.plot(paths[..., 0], paths[..., 1], color=COLORS["Adam"], linewidth=1.6)
        pareto = {"color": "0.45", "linewidth": 5, "solid_capstyle": "butt"}
        marks = [
            axes.plot(*STARTS.T, "ko", markersize=6, label="start")[0],
            axes.plot(*paths[-1].T, "s", color="#0072b2", label=f"after {TOY_STEPS:,} steps")[0],
            axes.plot([-7, 7], [DEEPEST] * 2, **pareto, zorder=1, label="no step helps both")[0],
            axes.plot(0, DEEPEST, "k*", markersize=13, zorder=3, label="least mean of both")[0],
        ]
        axes.set(title=name, xlabel="x1")
        ends = ", ".join(
            f"({x:.1f}, {y:.1f}) {np.asarray(toy(jnp.array([x, y]))).mean():.1f}"
            for x, y in paths[-1]
        )
        print(f"  {name:<17} ends at {ends}")
    row[0].set(ylabel="x2")
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def main() -> None:
    parser = commandline.parser(__doc__, steps=2000, seeds=3, directory=".")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="a factor on the right digit's loss, which some methods mind (default: %(default)s)",
    )
    options = parser.parse_args()
    start, found, data = time.perf_counter(), {}, shipped_digits()
    with tqdm(total=len(METHODS) * options.seeds * options.steps, unit="step") as bar:
        for name, tx in METHODS.items():
            bar.set_description(name)
            found[name] = train(tx, data, options, bar)
    print(
        f"two overlaid digits, {options.steps} batches of {BATCH}, {options.seeds} seeds, "
        f"the right digit's loss times {options.scale:g}; "
        f"{time.perf_counter() - start:.0f} s on {commandline.hardware()}"
    )
    print(table(found))
    draw_accuracies(found, options.scale, options.directory / "multitask.png")
    draw_toy(options.directory / "multitask-toy.png")
    print(f"pictures in {options.directory}: multitask.png, multitask-toy.png")


if __name__ == "__main__":
    main()
