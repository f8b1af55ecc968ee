"""Boxes: geometry, suppression, the features inside them, and the metric of object detection.

A box is (x0, y0, x1, y1) in pixels: the first pixel inside, and the first one after. All images
have the same number of rows for boxes; a row to spare has the label -1, or the score -inf.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of boxes (..., 4), broadcast against each other."""
    area = lambda low, high: jnp.prod(jnp.maximum(high - low, 0), axis=-1)  # noqa: E731
    low_a, high_a, low_b, high_b = a[..., :2], a[..., 2:], b[..., :2], b[..., 2:]
    shared = area(jnp.maximum(low_a, low_b), jnp.minimum(high_a, high_b))
    return shared / jnp.maximum(area(low_a, high_a) + area(low_b, high_b) - shared, 1e-6)


def around(centres: jax.Array, sizes: jax.Array) -> jax.Array:
    return jnp.concatenate([centres - sizes / 2, centres + sizes / 2], axis=-1)


def move(boxes: jax.Array, by: jax.Array) -> jax.Array:
    """The centres moved by a share of the size, the sizes multiplied by exp(by[..., 2:])."""
    sizes = boxes[..., 2:] - boxes[..., :2]
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    return around(centres + sizes * by[..., :2], sizes * jnp.exp(by[..., 2:]))


def rows(of: jax.Array, chosen: jax.Array) -> jax.Array:
    """The chosen (n, k) rows of every image's (n, rows, columns)."""
    return jnp.take_along_axis(of, chosen[..., None], axis=1)


def nms(boxes: jax.Array, scores: jax.Array, threshold: float, count: int):
    """Non-maximum suppression in each image of boxes (n, k, 4) with scores (n, k).

    The best box is kept, those that overlap it by more than threshold go, and so on. Returned are
    the rows (n, count) of the boxes kept and their scores, -inf where no box was left.
    """

    def keep_best(scores, _):
        best = scores.argmax(-1)
        gone = iou(rows(boxes, best[:, None]), boxes) > threshold
        gone |= best[:, None] == jnp.arange(boxes.shape[1])[None]  # a box without area too
        return jnp.where(gone, -jnp.inf, scores), (best, scores.max(-1))

    _, (kept, its_scores) = jax.lax.scan(keep_best, scores, length=count)
    return kept.T, its_scores.T


def align(features: jax.Array, boxes: jax.Array, bins: int, stride: int) -> jax.Array:
    """RoIAlign: features (n, h, w, c) in the middle of bins x bins parts of each box (n, k, 4).

    A feature stands in the middle of stride x stride pixels. Between them they are interpolated
    linearly, which is a product with a matrix along each axis (He et al., arXiv 1703.06870).
    """

    def hats(low, high, cells):
        part = (jnp.arange(bins, dtype=float) + 0.5) / bins
        middles = low[..., None] + (high - low)[..., None] * part[None, None]
        middles = jnp.clip(middles / stride - 0.5, 0, cells - 1)
        distances = middles[..., None] - jnp.arange(cells, dtype=float)[None, None, None]
        return jnp.maximum(0, 1 - abs(distances))

    (x0, y0, x1, y1), (height, width) = jnp.moveaxis(boxes, -1, 0), features.shape[1:3]
    lines = jnp.einsum("nkyh,nhwc->nkywc", hats(y0, y1, height), features)
    return jnp.einsum("nkxw,nkywc->nkyxc", hats(x0, x1, width), lines)


class Detections(NamedTuple):
    boxes: np.ndarray  # (n, k, 4)
    labels: np.ndarray  # (n, k)
    scores: np.ndarray  # (n, k)


def detected(boxes: jax.Array, chances: jax.Array, count: int) -> Detections:
    """The best of boxes (n, k, 4), of which each has a chance (n, k, classes) of every class."""
    kept, scores = nms(boxes, chances.max(-1), 0.4, count)
    return Detections(rows(boxes, kept), rows(chances, kept).argmax(-1), scores)


def mean_average_precision(found: Detections, boxes: np.ndarray, labels: np.ndarray) -> float:
    """mAP@0.5: the area under the curve of precision over recall, averaged over the classes.

    Boxes (n, m, 4) and labels (n, m) are the truth. Detections are taken from the highest score
    down: one is right if, of its class, the object that it overlaps most it overlaps by at least
    0.5, and no detection before it has found that object. The precision at a recall is the best at
    that recall or more (PASCAL VOC 2010).
    """
    overlaps = np.asarray(iou(found.boxes[:, :, None], boxes[:, None]))
    areas = []
    for label in np.unique(labels[labels >= 0]):
        wanted = labels == label
        canvas, row = np.nonzero((found.labels == label) & (found.scores > -np.inf))
        order = np.argsort(-found.scores[canvas, row], kind="stable")
        right, taken = np.zeros(len(order)), np.zeros_like(wanted)
        for place, (c, r) in enumerate(zip(canvas[order], row[order], strict=True)):
            best = np.argmax(overlaps[c, r] * wanted[c])
            if overlaps[c, r, best] * wanted[c, best] >= 0.5 and not taken[c, best]:
                right[place] = taken[c, best] = True
        precision = right.cumsum() / np.arange(1, len(right) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        areas.append(np.sum(precision * right) / wanted.sum())
    return float(np.mean(areas))
