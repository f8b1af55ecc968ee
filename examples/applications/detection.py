"""A detector's backbone and its heads, each with a learning rate of its own, by optax.partition.

A YOLO or a Faster R-CNN, both small, finds and reads handwritten digits (MNIST's, of random sizes
at random places) on canvases of 64 x 64 pixels. The gradient is clipped as a whole; then each part
of the weights has its own chain of three stages, which is Adam. Beside it optax.adam trains the
same detector in the same partition on the same batches: the largest difference of a weight is 0.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import application
import jax
import jax.numpy as jnp
import numpy as np
import optax
from boxes import Detections, align, around, detected, iou, mean_average_precision, move, nms, rows
from digits import shipped_digits
from digits_on_canvas import CLASSES, MOST, SIDE, Canvases, components, draw_canvas, paint
from drawing import OURS, THEIRS, plt, save
from flax import nnx
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

import adam_jax

RATES = {"backbone": 4e-3, "heads": 8e-3}


def adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.chain(
        adam_jax.scale_by_moments(b1=0.9, b2=0.999),
        adam_jax.bias_correct(eps=1e-8),
        adam_jax.scale_by_lr(learning_rate),
    )


def partitioned(adam: Callable, steps: int) -> optax.GradientTransformation:
    """The gradient clipped to length 1, then `adam` with the rate of its part, which decays."""
    schedule = partial(optax.warmup_cosine_decay_schedule, 0.0, warmup_steps=steps // 10)
    parts = {part: adam(schedule(rate, decay_steps=steps)) for part, rate in RATES.items()}
    part_of = lambda path, _: "backbone" if path[0].key == "backbone" else "heads"  # noqa: E731
    labels = partial(jax.tree_util.tree_map_with_path, part_of)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(parts, labels))


BATCH, TRAINING, HELD_OUT = 32, 8000, 500


# --- What both models share -----------------------------------------------------------------------


class Backbone(nnx.Module):
    """What is seen at every fourth pixel of a row and a column: (n, 64, 64) to (n, 16, 16, 32)."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = convolution(1, 16, rngs, strides=2)
        self.second = convolution(16, 32, rngs, strides=2)
        self.third = convolution(32, 32, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(images[..., None]))
        return nnx.relu(self.third(nnx.relu(self.second(x))))


def convolution(before: int, width: int, rngs: nnx.Rngs, strides: int = 1) -> nnx.Conv:
    return nnx.Conv(before, width, (3, 3), strides, padding=1, rngs=rngs)


CELL = 8  # pixels along a cell of the grid
CENTRES = np.mgrid[:SIDE:CELL, :SIDE:CELL][::-1].reshape(2, -1).T.astype(np.float32) + CELL / 2


# --- YOLO -----------------------------------------------------------------------------------------


class Yolo(nnx.Module):
    """One look: each cell of a grid says whether a digit's centre lies in it, its box, its class.

    Redmon et al., "You Only Look Once", arXiv 1506.02640.
    """

    def __init__(self, rngs: nnx.Rngs):
        self.backbone = Backbone(rngs)
        self.hidden = nnx.List([convolution(32, 64, rngs, strides=2), convolution(64, 64, rngs)])
        self.output = nnx.Linear(64, 5 + CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Boxes (n, cells, 4), logits of a digit (n, cells) and of its class (n, cells, 10)."""
        x = self.backbone(images)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        x = self.output(x).reshape(len(x), len(CENTRES), -1)
        centres = CENTRES[None] + CELL * (nnx.sigmoid(x[..., :2]) - 0.5)
        return around(centres, 2 * CELL * jnp.exp(x[..., 2:4])), x[..., 4], x[..., 5:]

    def loss(self, images: jax.Array, boxes: jax.Array, labels: jax.Array) -> jax.Array:
        found, objectness, classes = self(images)
        cells, there = cells_of(boxes), labels >= 0
        occupied = nnx.one_hot(jnp.where(there, cells, -1), len(CENTRES)).max(axis=1)
        digit = optax.sigmoid_binary_cross_entropy(objectness, occupied).sum() / occupied.sum()
        box = jnp.mean(1 - iou(rows(found, cells), boxes), where=there)
        entropy = cross_entropy(rows(classes, cells), labels.clip(0))
        return digit + box + jnp.mean(entropy, where=there)

    def detect(self, images: jax.Array) -> Detections:
        boxes, objectness, classes = self(images)
        chances = nnx.sigmoid(objectness)[..., None] * nnx.softmax(classes)
        return detected(boxes, chances, 2 * MOST)


def cells_of(boxes: jax.Array) -> jax.Array:
    """The cell in which the centre of each box lies."""
    x, y = jnp.moveaxis((boxes[..., :2] + boxes[..., 2:]) / 2 // CELL, -1, 0)
    return (y * (SIDE // CELL) + x).astype(int)


# --- Faster R-CNN ---------------------------------------------------------------------------------

SHAPES = np.array([(20, 22), (12, 18), (6, 20)], np.float32)  # of anchors: width and height
ANCHORS = around(CENTRES[:, None], SHAPES[None]).reshape(-1, 4)
REGIONS, BINS = 16, 5


class FasterRCNN(nnx.Module):
    """Two stages: anchors become proposals, and the features inside the best of them are read.

    Ren et al., "Faster R-CNN", arXiv 1506.01497, with RoIAlign of He et al., arXiv 1703.06870.
    """

    def __init__(self, rngs: nnx.Rngs):
        self.backbone = Backbone(rngs)
        self.proposing = convolution(32, 64, rngs, strides=2)
        self.proposal = nnx.Linear(64, 5 * len(SHAPES), rngs=rngs)
        self.reading = nnx.Linear(32 * BINS**2, 128, rngs=rngs)
        self.answer = nnx.Linear(128, 5 + CLASSES, rngs=rngs)

    def propose(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A box (n, anchors, 4) from every anchor, and the logit that it holds a digit."""
        x = self.proposal(nnx.relu(self.proposing(features)))
        x = x.reshape(len(x), len(ANCHORS), 5)
        return move(ANCHORS[None], x[..., :4]).clip(0, SIDE), x[..., 4]

    def read(self, features: jax.Array, regions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The regions (n, k, 4) refined, and the logits of their classes, the last one of none."""
        inside = align(features, regions, BINS, stride=4).reshape(*regions.shape[:2], -1)
        x = self.answer(nnx.relu(self.reading(inside)))
        return move(regions, x[..., :4]), x[..., 4:]

    def loss(self, images: jax.Array, boxes: jax.Array, labels: jax.Array) -> jax.Array:
        features = self.backbone(images)
        proposals, objectness = self.propose(features)
        digit, positive, negative = anchor_targets(boxes, labels >= 0)
        entropy = optax.sigmoid_binary_cross_entropy(objectness, positive.astype(float))
        first = jnp.sum(entropy, where=positive | negative) / jnp.sum(positive, dtype=float)
        first += jnp.mean(1 - iou(proposals, rows(boxes, digit)), where=positive)

        # The second stage learns from the proposals as they are, and from the truth.
        regions = jnp.concatenate([best(proposals, objectness), boxes], axis=1)
        refined, classes = self.read(features, jax.lax.stop_gradient(regions))
        overlaps = iou(regions[:, :, None], boxes[:, None])
        digit, hit = overlaps.argmax(-1), overlaps.max(-1) >= 0.5
        label = jnp.where(hit, rows(labels[..., None], digit)[..., 0], CLASSES)
        second = jnp.mean(1 - iou(refined, rows(boxes, digit)), where=hit)
        there = jnp.pad(labels >= 0, ((0, 0), (REGIONS, 0)), constant_values=True)
        return first + second + jnp.mean(cross_entropy(classes, label), where=there)

    def detect(self, images: jax.Array) -> Detections:
        features = self.backbone(images)
        boxes, classes = self.read(features, best(*self.propose(features)))
        return detected(boxes, nnx.softmax(classes)[..., :CLASSES], 2 * MOST)


def anchor_targets(boxes: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The digit that every anchor overlaps most, and whether it is to propose it, or nothing.

    It proposes what it overlaps by 0.5, or more than any other anchor does, and nothing if it
    overlaps no digit by 0.3; an anchor between the two is not trained.
    """
    overlaps = iou(ANCHORS[None, :, None], boxes[:, None])  # (n, anchors, MOST)
    nearest = jnp.where(there, overlaps.argmax(axis=1), -1)
    nearest = nnx.one_hot(nearest, len(ANCHORS), dtype=bool).any(axis=1)
    positive = nearest | (overlaps.max(-1) >= 0.5)
    return overlaps.argmax(-1), positive, ~positive & (overlaps.max(-1) < 0.3)


def best(proposals: jax.Array, objectness: jax.Array) -> jax.Array:
    """The proposals for the second stage."""
    return rows(proposals, nms(proposals, objectness, 0.6, REGIONS)[0])


MODELS = {"yolo": Yolo, "faster_rcnn": FasterRCNN}


# --- The step and the loop ------------------------------------------------------------------------


@nnx.jit
def step(model, optimizer, images, boxes, labels):
    value, grads = nnx.value_and_grad(lambda model: model.loss(images, boxes, labels))(model)
    optimizer.update(model, grads)
    return value


def train(runs: dict[str, tuple], data: Iterable[tuple], steps: int) -> dict[str, list]:
    """Model and optimizer of each run change in place; the losses are returned."""
    losses = {name: [] for name in runs}
    for batch in application.progress(data, steps, losses):
        for name, run in runs.items():
            losses[name].append(step(*run, *batch))
    return losses


# --- Picture and command line ---------------------------------------------------------------------


def draw(losses: dict, truth: Canvases, found: Detections, path: Path) -> None:
    """The losses, and held-out canvases with what is found, and with the truth dashed."""
    figure = plt.figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(4, 7))
    axes = left.subplots()
    application.draw_losses(axes, losses, "loss of boxes and classes")
    axes.set_yscale("log")
    for index, place in enumerate(right.subplots(2, 3).flat):
        draw_canvas(place, *(part[index] for part in (*truth, *found)))
    right.suptitle("Held out: found with class and score; the truth dashed")
    save(figure, path)


def main() -> None:
    made = application.parser(__doc__, steps=800, plot="detection-MODEL.png")
    made.add_argument("--model", choices=MODELS, default="yolo", help="(default: %(default)s)")
    options = made.parse_args()
    plot = options.plot.with_name(options.plot.name.replace("MODEL", options.model))
    digits = shipped_digits()
    canvases = paint(digits.train_images, digits.train_labels, TRAINING, options.seed)
    held_out = paint(digits.test_images, digits.test_labels, HELD_OUT, seed=10**6)
    model, runs = MODELS[options.model](nnx.Rngs(options.seed)), {}
    for name, optimizer in {OURS: adam, THEIRS: optax.adam}.items():
        tx, own = partitioned(optimizer, options.steps), nnx.clone(model)
        runs[name] = own, nnx.Optimizer(own, tx, wrt=nnx.Param)
    if options.alone:
        del runs[THEIRS]
    data = application.batches(options.seed, BATCH, *canvases)
    losses = train(runs, data, options.steps)

    model, _ = runs[OURS]
    detect = nnx.jit(lambda model, images: model.detect(images))
    found = Detections(*map(np.asarray, detect(model, held_out.images)))
    plain = components(digits.train_images, digits.train_labels, held_out.images)
    mean = lambda found: mean_average_precision(found, *held_out[1:])  # noqa: E731
    baseline = "connected components read by logistic regression"
    application.report("held-out mAP@0.5", mean(found), baseline, mean(plain))
    if not options.alone:
        print(f"largest difference of a weight {application.difference(model, runs[THEIRS][0]):g}")
    draw(losses, held_out, found, plot)
    print(f"losses and held-out canvases: {plot}")


if __name__ == "__main__":
    main()
