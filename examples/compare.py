"""Draw the article's comparison: the optimizers it tells of, on two classic surfaces, and the
problem of Reddi, Kale and Kumar on which Adam goes the wrong way and AMSGrad does not.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

import adam_jax

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm


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


OPTIMIZERS = {
    "SGD": adam_jax.sgd,
    "Momentum": adam_jax.momentum,
    "Nesterov": adam_jax.optimizers.nesterov,
    "AdaGrad": adam_jax.adagrad,
    "RMSProp": adam_jax.rmsprop,
    "Adam": adam_jax.adam,
    "AMSGrad": adam_jax.amsgrad,
}
SURFACES = [
    Surface("Rosenbrock's valley", rosenbrock, (-1.2, 1.0), (1.0, 1.0), (-1.6, 1.4, -0.4, 1.6)),
    Surface("Beale's plateau", beale, (1.0, 1.0), (3.0, 0.5), (-0.5, 4, -1.2, 1.6)),
]
# Each optimizer gets the best of these learning rates for the surface, the start and the length.
RATES = [a * 10.0**k for k in range(-5, 1) for a in (1, 2, 5)]
STEPS = 1000


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
    figure, axes = plt.subplots(2, 2, figsize=(12, 10), layout="constrained")
    for (left, right), surface in zip(axes, SURFACES, strict=True):
        x_from, x_to, y_from, y_to = surface.view
        grid = np.meshgrid(np.linspace(x_from, x_to, 300), np.linspace(y_from, y_to, 300))
        heights = np.asarray(surface.loss(grid))
        levels = np.logspace(-2, 3.5, 30)
        left.contourf(
            *grid, heights, levels, norm=LogNorm(), cmap="Greys", alpha=0.6, extend="both"
        )
        print(f"{surface.name}, {STEPS} steps from {surface.start}")
        for name, factory in tqdm(OPTIMIZERS.items(), surface.name, leave=False):
            rate, points, losses = best_descent(factory, surface)
            label = f"{name}, {rate:g}"
            (line,) = left.plot(*points.T, linewidth=1.5, label=label)
            left.plot(*points[-1], "o", markersize=5, color=line.get_color())
            right.plot(losses, linewidth=1.5, label=label)
            tqdm.write(f"  {name:<9} rate {rate:<7g} loss {losses[-1]:.2e}")
        left.plot(*surface.start, "ks", markersize=6)
        left.plot(*surface.minimum, "r*", markersize=14)
        left.set(
            title=surface.name, xlim=(x_from, x_to), ylim=(y_from, y_to), xlabel="x", ylabel="y"
        )
        right.set(title="Loss", yscale="log", xlabel="step", ylim=(1e-12, None))
        right.grid(alpha=0.3)
        right.legend(title="optimizer, learning rate")
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    for name, factory, color in (
        ("Adam", adam_jax.adam, "tab:red"),
        ("AMSGrad", adam_jax.amsgrad, "tab:blue"),
    ):
        xs = counterexample(factory(decreasing, b1=0.9, b2=0.99))
        axes.plot(steps + 1, xs[steps], color=color, label=f"{name}, ends at {xs[-1]:+.2f}")
        print(f"  {name:<9} ends at {xs[-1]:+.3f}")
    axes.axhline(-1, color="black", linestyle="--", linewidth=1, label="the minimum")
    axes.set(
        title="A rare large gradient: Adam forgets it, AMSGrad does not",
        xlabel="step", ylabel="x", xscale="log", ylim=(-1.1, 1.1),
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(),
        help="where to write surfaces.png and counterexample.png (default: here)",
    )
    directory = parser.parse_args().directory
    if not directory.is_dir():
        parser.error(f"--directory: there is no directory {directory}")
    draw_surfaces(directory / "surfaces.png")
    draw_counterexample(directory / "counterexample.png")
    print(f"pictures: {directory / 'surfaces.png'}, {directory / 'counterexample.png'}")


if __name__ == "__main__":
    main()
