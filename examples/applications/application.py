"""What the applications share: command line, two runs on the same batches, report and picture.

Each program trains its model with a chain of adam_jax and, on the same batches and from the same
weights, with optax's optimizer, and ends with its metric on data that it was not trained on.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent))  # the other examples: their digits and options
from commandline import hardware, new_file, positive

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, THEIRS = "adam_jax", "optax"
# As in mnist.py: where the two agree, the dashed line lies in the middle of the wide one.
STYLES = {
    OURS: {"color": "#d55e00", "linewidth": 5, "alpha": 0.45},
    THEIRS: {"color": "black", "linewidth": 1, "linestyle": "--"},
}


def parser(description: str, steps: int, plot: str) -> argparse.ArgumentParser:
    """The options that every application has; a program adds --model and what is its own."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--steps", type=positive, default=steps, help="training steps (default: %(default)s)"
    )
    made.add_argument(
        "--seed", type=int, default=0, help="of weights and batches (default: %(default)s)"
    )
    made.add_argument(
        "--alone", action="store_true", help="leave out the run beside it with optax's optimizer"
    )
    made.add_argument(
        "--plot", type=new_file, default=Path(plot), help="the picture (default: %(default)s)"
    )
    return made


def batches(seed: int, size: int, *arrays: np.ndarray) -> Iterable[tuple[np.ndarray, ...]]:
    """Batches of the arrays' rows for ever, in a new order at each pass."""
    shuffle = np.random.default_rng(seed)
    while True:
        order = shuffle.permutation(len(arrays[0]))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield tuple(array[chosen] for array in arrays)


def train(
    step: Callable, runs: dict[str, tuple], data: Iterable[tuple], steps: int
) -> dict[str, np.ndarray]:
    """Call `step(*run, *batch)`, which returns a loss, for every run with the same batches.

    A run is what its steps change in place: a model, its optimizer, and what else it has. The
    losses of each run are returned.
    """
    losses: dict[str, list] = {name: [] for name in runs}
    start = time.perf_counter()
    with tqdm(itertools.islice(data, steps), total=steps, unit="step") as bar:
        for number, batch in enumerate(bar):
            for name, run in runs.items():
                losses[name].append(step(*run, *batch))
            if number % 20 == 0:
                bar.set_postfix_str(f"loss {float(losses[OURS][-1]):.3f}")
    print(f"{steps} steps in {time.perf_counter() - start:.0f} s on {hardware()}")
    return {name: np.asarray(jnp.stack(values)) for name, values in losses.items()}


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


def draw_losses(axes: plt.Axes, losses: dict[str, np.ndarray], label: str) -> None:
    """The training losses of all runs, each the mean of some of the last steps."""
    window = max(1, min(50, len(losses[OURS]) // 10))
    for name, values in losses.items():
        smooth = np.convolve(values, np.full(window, 1 / window), "valid")
        axes.plot(np.arange(window, len(values) + 1), smooth, label=name, **STYLES[name])
    axes.set(title=f"Training loss, mean of {window} steps", xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
