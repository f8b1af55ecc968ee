"""What the applications share: command line, batches, progress, report and picture.

Each program trains its model with a chain of adam_jax and, on the same batches and from the same
weights, with optax's optimizer, and ends with its metric on data that it was not trained on.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent))  # the other examples: their digits and options
import commandline
from drawing import OURS, STYLES, last_means, plt


def parser(description: str | None, steps: int, plot: str) -> argparse.ArgumentParser:
    """The options that every application has; a program adds --model and what is its own."""
    made = commandline.parser(description, steps=steps, seed=0, plot=plot)
    made.add_argument(
        "--alone", action="store_true", help="leave out the run beside it with optax's optimizer"
    )
    return made


def batches(seed: int, size: int, *arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Batches of the arrays' rows for ever, in a new order at each pass."""
    shuffle = np.random.default_rng(seed)
    while True:
        order = shuffle.permutation(len(arrays[0]))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield tuple(array[chosen] for array in arrays)


def progress(data: Iterable[tuple], steps: int, losses: dict[str, list]) -> Iterator[tuple]:
    """So many batches, under a bar that shows our last loss; then the time is printed."""
    start = time.perf_counter()
    with tqdm(itertools.islice(data, steps), total=steps, unit="step") as bar:
        for number, batch in enumerate(bar):
            yield batch
            if number % 20 == 0:
                bar.set_postfix_str(f"loss {float(losses[OURS][-1]):.3f}")
    print(f"{steps} steps in {time.perf_counter() - start:.0f} s on {commandline.hardware()}")


def difference(ours: nnx.Module, theirs: nnx.Module) -> float:
    """The largest difference of a weight between two models."""
    pairs = zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (ours, theirs)), strict=True)
    return float(max(jnp.max(jnp.abs(a - b)) for a, b in pairs))


def report(metric: str, value: float, baseline: str, of_baseline: float, better=max) -> None:
    """Print the metric beside the baseline that it has to beat; better is max or min."""
    beats = value != of_baseline and better(value, of_baseline) == value
    print(
        f"{metric} {value:.4g}, {'better' if beats else 'NOT better'} than "
        f"{of_baseline:.4g} of {baseline}"
    )


def draw_losses(axes: plt.Axes, losses: dict[str, list], label: str) -> None:
    """The training losses of all runs, each the mean of some of the last steps."""
    window = max(1, min(50, len(losses[OURS]) // 10))
    for name, values in losses.items():
        axes.plot(*last_means(jax.device_get(values), window), label=name, **STYLES[name])
    axes.set(title=f"Training loss, mean of {window} steps", xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
