"""Draw the article's comparison: the optimizers it tells of, on two classic surfaces, and the
problem of Reddi, Kale and Kumar on which Adam goes the wrong way and AMSGrad does not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from commandline import parser
from drawing import COLORS, plt, save, spread
from tqdm import tqdm

import adam_jax

OPTIMIZERS = {
    "SGD": adam_jax.sgd,
    "Momentum": adam_jax.momentum,
    "Nesterov": adam_jax.nesterov_momentum,
    "AdaGrad": adam_jax.adagrad,
    "RMSProp": adam_jax.rmsprop,
    "Adam": adam_jax.adam,
    "AMSGrad": adam_jax.amsgrad,
}


class Surface(NamedTuple):
    name: str
    loss: Callable[[jax.Array], jax.Array]
    start: tuple[float, float]
    minimum: tuple[float, float]
    view: tuple[float, float, float, float]  # x from, x to, y from, y to


def rosenbrock(p):
    """A curved valley: the way down into it is steep, the way along it is flat."""
    x, y = p
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def beale(p):
    """A plateau with steep walls around a flat basin."""
    x, y = p
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


SURFACES = [
    Surface("Rosenbrock's valley", rosenbrock, (-1.2, 1.0), (1.0, 1.0), (-1.6, 1.4, -0.4, 1.6)),
    Surface("Beale's plateau", beale, (1.0, 1.0), (3.0, 0.5), (-0.5, 4, -1.2, 1.6)),
]
# Each optimizer gets the best of these learning rates for the surface, the start and the length.
RATES = [a * 10.0**k for k in range(-5, 1) for a in (1, 2, 5)]
STEPS = 1000
LOWEST = 1e-15  # where the pictures of the loss end; in float32 a loss can be 0


def descend(tx: optax.GradientTransformation, loss, start, steps: int = STEPS):
    """The points of a descent and their losses."""

    def step(carry, _):
        point, state = carry
        value, gradient = jax.value_and_grad(loss)(point)
        updates, state = tx.update(gradient, state, point)
        return (optax.apply_updates(point, updates), state), (point, value)

    point = jnp.asarray(start)
    _, (points, losses) = jax.lax.scan(step, (point, tx.init(point)), length=steps)
    return points, losses


def best_descent(factory, surface: Surface):
    """The lowest descent (mean log loss) of those that never climb above their start."""
    run = jax.jit(jax.vmap(lambda rate: descend(factory(rate), surface.loss, surface.start)))
    points, losses = run(jnp.asarray(RATES))
    stays_below = jnp.all(losses <= losses[:, :1], axis=1)  # which a NaN is not
    height = jnp.where(stays_below, jnp.log(losses + 1e-12).mean(axis=1), jnp.inf)
    best = int(jnp.argmin(height))
    return RATES[best], np.asarray(points[best]), np.asarray(losses[best])


def draw_surfaces(path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for (above, below), surface in zip(axes.T, SURFACES, strict=True):
        x_from, x_to, y_from, y_to = surface.view
        grid = np.meshgrid(np.linspace(x_from, x_to, 300), np.linspace(y_from, y_to, 300))
        heights = np.asarray(surface.loss(grid))
        above.contour(*grid, heights, np.logspace(-2, 3.5, 12), colors="0.8", linewidths=0.8)
        print(f"{surface.name}, {STEPS} steps from {surface.start}")
        labels, ends = [], []
        for name, factory in tqdm(OPTIMIZERS.items(), surface.name, leave=False):
            rate, points, losses = best_descent(factory, surface)
            above.plot(*points.T, color=COLORS[name], linewidth=1.2)
            above.plot(*points[-1], "o", markersize=5, color=COLORS[name])
            lowest = np.minimum.accumulate(losses)
            below.plot(lowest, color=COLORS[name], linewidth=1.5)
            labels.append((f"{name}, {rate:g}", COLORS[name]))
            ends.append(np.log10(max(lowest[-1], LOWEST)))
            tqdm.write(f"  {name:<9} rate {rate:<7g} loss {losses[-1]:.2e}")
        above.plot(*surface.start, "ks", markersize=6)
        above.plot(*surface.minimum, "k*", markersize=12)
        above.set(title=surface.name, xlim=(x_from, x_to), ylim=(y_from, y_to))
        below.set(
            title="Lowest loss so far",
            yscale="log", xlabel="step", xlim=(0, STEPS), ylim=(LOWEST, 1e2),
        )  # fmt: skip
        below.grid(alpha=0.3)
        for (label, color), end in zip(labels, spread(ends, gap=1.1), strict=True):
            below.annotate(
                label, (STEPS, 10**end), (4, 0), textcoords="offset points",
                color=color, fontsize=9, va="center", annotation_clip=False,
            )  # fmt: skip
    save(figure, path)


# --- Adam's counterexample ------------------------------------------------------------------------

HORIZON = 1_000_000


def counterexample(tx: optax.GradientTransformation) -> np.ndarray:
    """Where x is on [-1, 1] while its loss is 1010 x at every 101st step and -10 x at the others.

    On the mean, x should go to -1. The large gradient comes rarely, and Adam divides it by itself.
    """

    def step(carry, t):
        x, state = carry
        gradient = jnp.where(t % 101 == 0, 1010.0, -10.0)
        updates, state = tx.update(gradient, state, x)
        x = jnp.clip(optax.apply_updates(x, updates), -1.0, 1.0)
        return (x, state), x

    x = jnp.zeros(())
    _, path = jax.jit(lambda: jax.lax.scan(step, (x, tx.init(x)), jnp.arange(HORIZON)))()
    return np.asarray(path)


def draw_counterexample(path: Path) -> None:
    decreasing = lambda count: 0.5 / jnp.sqrt(count + 1.0)  # noqa: E731
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = np.unique(np.geomspace(1, HORIZON, 2000).astype(int)) - 1
    print(f"Reddi's problem, {HORIZON} steps; the minimum is at -1")
    for name in ("Adam", "AMSGrad"):
        xs = counterexample(OPTIMIZERS[name](decreasing, b1=0.9, b2=0.99))
        axes.plot(steps + 1, xs[steps], color=COLORS[name])
        axes.annotate(
            f"{name}, ends at {xs[-1]:+.2f}".replace("-", "−"),
            (HORIZON, xs[-1]), (0, -14 if xs[-1] > 0 else 14), textcoords="offset points",
            color=COLORS[name], ha="right", va="center",
        )  # fmt: skip
        print(f"  {name:<9} ends at {xs[-1]:+.3f}")
    axes.axhline(-1, color="black", linestyle="--", linewidth=1)
    axes.text(1, -1.04, "the minimum", va="top")
    axes.set(
        title="A rare large gradient: Adam forgets it, AMSGrad does not",
        xlabel="step", ylabel="x", xscale="log", ylim=(-1.25, 1.15),
    )  # fmt: skip
    axes.grid(alpha=0.3)
    save(figure, path)


def main() -> None:
    where = parser(__doc__, directory=".").parse_args().directory
    draw_surfaces(where / "surfaces.png")
    draw_counterexample(where / "counterexample.png")
    print(f"pictures: {where / 'surfaces.png'}, {where / 'counterexample.png'}")


if __name__ == "__main__":
    main()
