"""MNIST digits on canvases, what finds and reads them without a network, and a picture of them."""

from typing import NamedTuple

import numpy as np
from boxes import Detections, iou
from drawing import OURS, STYLES, THEIRS, plt
from scipy import ndimage
from sklearn.linear_model import LogisticRegression

SIDE, MOST, CLASSES = 64, 4, 10  # pixels along a canvas, digits on one, kinds of digits
SIZES = range(20, 37)  # of a digit's picture, which MNIST frames with a margin of a seventh
VISIBLE = 0.2  # a darker pixel belongs to no digit


# --- Data -----------------------------------------------------------------------------------------


class Canvases(NamedTuple):
    images: np.ndarray  # (n, SIDE, SIDE) float32 in [0, 1]
    boxes: np.ndarray  # (n, MOST, 4) float32, tight around the digits
    labels: np.ndarray  # (n, MOST) int32


def paint(digits: np.ndarray, labels: np.ndarray, count: int, seed: int) -> Canvases:
    """Canvases with one to MOST of the digits, of random sizes at random places.

    At most a tenth of a new digit's box may lie on earlier boxes; a digit for which 20 tries find
    no such place is left out.
    """
    random = np.random.default_rng(seed)
    canvases = Canvases(
        np.zeros((count, SIDE, SIDE), np.float32),
        np.zeros((count, MOST, 4), np.float32),
        np.full((count, MOST), -1, np.int32),
    )
    matrices = {size: resampling(digits.shape[1], size) for size in SIZES}
    for image, boxes, classes in zip(*canvases, strict=True):
        taken = np.zeros_like(image)
        for row in range(random.integers(1, MOST + 1)):
            chosen, matrix = random.integers(len(digits)), matrices[random.choice(SIZES)]
            digit = matrix @ digits[chosen] @ matrix.T
            digit = digit[tight(digit)]
            height, width = digit.shape
            for _ in range(20):
                x, y = random.integers(SIDE - width + 1), random.integers(SIDE - height + 1)
                place = np.s_[y : y + height, x : x + width]
                if taken[place].mean() <= 0.1:
                    taken[place] = 1
                    image[place] = np.maximum(image[place], digit)
                    boxes[row], classes[row] = (x, y, x + width, y + height), labels[chosen]
                    break
    return canvases


def tight(image: np.ndarray) -> tuple[slice, slice]:
    """The rows and the columns from the first visible pixel to the last."""
    return ndimage.find_objects((image > VISIBLE).astype(int))[0]


def resampling(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) that makes new pixels of old ones, each the mean over its interval."""
    ends, pixels = np.linspace(0, old, new + 1)[:, None], np.arange(old)
    shared = np.minimum(ends[1:], pixels + 1) - np.maximum(ends[:-1], pixels)
    return (shared.clip(0) * new / old).astype(np.float32)


# --- Baseline -------------------------------------------------------------------------------------


def components(digits: np.ndarray, labels: np.ndarray, images: np.ndarray) -> Detections:
    """Connected components of the canvases, read by logistic regression on 16 x 16 pixels."""

    def crop(image, place):
        image = image[place]
        return (resampling(image.shape[0], 16) @ image @ resampling(image.shape[1], 16).T).ravel()

    crops = [crop(digit, tight(digit)) for digit in digits]
    classifier = LogisticRegression(C=0.1, max_iter=1000).fit(crops, labels)
    most = 2 * MOST
    found = Detections(
        np.zeros((len(images), most, 4), np.float32),
        np.full((len(images), most), -1),
        np.full((len(images), most), -np.inf),
    )
    for image, boxes, classes, scores in zip(images, *found, strict=True):
        pieces, _ = ndimage.label(image > VISIBLE, structure=np.ones((3, 3)))
        places = [(y, x) for y, x in ndimage.find_objects(pieces) if y.stop - y.start >= 8][:most]
        if places:
            chances = classifier.predict_proba([crop(image, place) for place in places])
            boxes[: len(places)] = [(x.start, y.start, x.stop, y.stop) for y, x in places]
            classes[: len(places)] = classifier.classes_[chances.argmax(axis=1)]
            scores[: len(places)] = chances.max(axis=1)
    return found


# --- Picture --------------------------------------------------------------------------------------


def draw_canvas(axes, image, boxes, labels, found_boxes, found_labels, scores) -> None:
    """A canvas, what is found with a score of a half or more, and the truth dashed."""

    def frame(box, style):
        (x, y), (width, height) = box[:2] - 0.5, box[2:] - box[:2]
        axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, **style))

    axes.imshow(image, cmap="gray_r", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    truth = boxes[labels >= 0]
    taken = [*truth, *found_boxes[scores >= 0.5]]
    for box, label, score in zip(found_boxes, found_labels, scores, strict=True):
        if score >= 0.5:
            frame(box, STYLES[OURS] | {"linewidth": 3})
            # The score stands where it covers least: over its box, under it, right or left of it.
            (x0, y0, x1, y1), size = box, np.array([16, 5])
            spots = [(x0, y0 - 6), (x0, y1 + 1), (x1 + 1, y0), (x0 - 17, y0)]
            spots = np.clip(spots, 0, SIDE - size)
            spots = np.concatenate([spots, spots + size], axis=1).astype(np.float32)
            spot = spots[iou(spots[:, None], np.array(taken)[None]).sum(axis=1).argmin()]
            taken.append(spot)
            style = {"fontsize": 8, "color": "#8c3d00", "weight": "bold", "va": "top"}
            axes.text(*spot[:2], f"{label}: {score:.2f}", **style)
    for box in truth:
        frame(box, STYLES[THEIRS])
