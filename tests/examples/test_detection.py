"""The detectors of examples/applications: boxes, metric and targets by hand, and small runs."""

import re
import sys
from functools import partial

import boxes
import detection
import digits_on_canvas
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from digits import Data
from support import assert_close, random_grads, stack, user_jit

pytestmark = [
    # scikit-learn 1.4 calls an older scipy, and matplotlib 3.8 an older pyparsing.
    pytest.mark.filterwarnings("ignore:scipy.optimize:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'parseAll' argument:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def digits():
    """Ten pictures of 28 x 28 that are easy to tell apart: blocks of noise in a frame."""
    blocks = np.random.default_rng(0).integers(0, 2, (10, 5, 5))
    blocks[:, [0, -1], :] = blocks[:, :, [0, -1]] = 1
    images = np.pad(np.kron(blocks, np.ones((1, 4, 4))), ((0, 0), (4, 4), (4, 4)))
    images, labels = images.astype(np.float32), np.arange(10, dtype=np.int32)
    return Data(images, labels, images, labels)


# --- Boxes ----------------------------------------------------------------------------------------


def test_iou():
    a = jnp.array([[0.0, 0, 4, 2], [0, 0, 4, 2], [0, 0, 4, 2], [1, 1, 1, 1]])
    b = jnp.array([[0.0, 0, 4, 2], [2, 0, 6, 2], [4, 0, 6, 2], [1, 1, 1, 1]])
    overlaps = jax.jit(boxes.iou)(a[:, None], b[None])
    assert_close(overlaps.diagonal(), [1, 1 / 3, 0, 0], "float32 mean")
    assert_close(overlaps[0], [1, 1 / 3, 0, 0], "float32 mean")


def test_move_and_around():
    box = boxes.around(jnp.array([[3.0, 5.0]]), jnp.array([[4.0, 2.0]]))
    np.testing.assert_array_equal(box, [[1, 4, 5, 6]])
    np.testing.assert_array_equal(boxes.move(box, jnp.zeros((1, 4))), box)
    by = jnp.log(jnp.array([[jnp.e, 1, 2, 0.5]]))  # one width to the right, 2 as wide, 0.5 as high
    assert_close(boxes.move(box, by), [[3, 4.5, 11, 5.5]], "float32 mean")


def test_nms_keeps_the_best_of_what_overlaps():
    kinds = jnp.array([[0.0, 0, 4, 4], [1, 0, 5, 4], [8, 8, 9, 9], [2, 2, 2, 2]])  # 0 and 1: 0.6
    scores = jnp.array([[0.5, 0.9, 0.3, 0.1], [0.9, 0.5, 0.3, 0.4]])
    images = jnp.stack([kinds, kinds])
    nms = jax.jit(boxes.nms, static_argnums=3)
    kept, left = nms(images, scores, 0.5, 5)
    np.testing.assert_array_equal(kept[:, :3], [[1, 2, 3], [0, 3, 2]])
    np.testing.assert_array_equal(left[:, :3], np.float32([[0.9, 0.3, 0.1], [0.9, 0.4, 0.3]]))
    np.testing.assert_array_equal(left[:, 3:], -np.inf)
    kept, _ = nms(images, scores, 0.7, 5)
    np.testing.assert_array_equal(kept[:, :2], [[1, 0], [0, 1]])


def test_align_reads_a_plane_exactly():
    """Between the middles of cells, linear interpolation of x and y gives x and y."""
    middles = 4 * np.arange(8, dtype=np.float32) + 2
    features = np.stack(np.meshgrid(middles, middles), -1)[None]  # (x, y) of every cell
    box = jnp.array([[[5.0, 8, 11, 20], [0, 0, 64, 64]]])
    found = jax.jit(partial(boxes.align, bins=3, stride=4))(features, box)
    assert found.shape == (1, 2, 3, 3, 2)
    inside = np.stack(np.meshgrid([6.0, 8, 10], [10.0, 14, 18]), -1)
    assert_close(found[0, 0], inside, "float32 mean")
    outside = found[0, 1, -1, -1]  # the middle of the last part is past the last cell
    assert_close(outside, [30.0, 30.0], "float32 mean")


# --- Metric ---------------------------------------------------------------------------------------

TRUTH = np.array([[[0, 0, 4, 4], [10, 10, 14, 14]], [[0, 0, 4, 4], [0, 0, 0, 0]]], np.float32)
LABELS = np.array([[0, 0], [1, -1]], np.int32)


def score(*rows):
    """The metric of detections (image, box, label, score)."""
    found = boxes.Detections(
        np.zeros((2, 6, 4), np.float32), np.full((2, 6), -1), np.full((2, 6), -np.inf)
    )
    for place, (image, *row) in enumerate(rows):
        for array, value in zip(found, row, strict=True):
            array[image, place] = value
    return boxes.mean_average_precision(found, TRUTH, LABELS)


FIRST, SECOND, OTHER = (0, TRUTH[0, 0], 0), (0, TRUTH[0, 1], 0), (1, TRUTH[1, 0], 1)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(*FIRST, 0.9), (*SECOND, 0.1), (*OTHER, 0.5)], 1.0),
        ([], 0.0),
        ([(*FIRST, 0.9), (*OTHER, 0.5)], (1 / 2 + 1) / 2),  # recall ends at a half
        # Right, wrong, right: precision 1 to recall 1/2, then 2/3; the other class has none.
        ([(*FIRST, 0.9), (1, TRUTH[1, 0], 0, 0.8), (*SECOND, 0.7)], (1 / 2 + 2 / 3 / 2) / 2),
        # Wrong, right, right: 1/2 at recall 1/2, but 2/3 at recall 1, which counts for both.
        ([(1, TRUTH[1, 0], 0, 0.9), (*FIRST, 0.8), (*SECOND, 0.7)], (2 / 3) / 2),
        ([(*FIRST, 0.9), (*FIRST, 0.8), (*SECOND, 0.7)], (1 / 2 + 2 / 3 / 2) / 2),  # found twice
        ([(0, (0, 0, 4, 2), 0, 0.9)], (1 / 2) / 2),  # overlaps by 0.5
        ([(0, (0, 0, 4, 1.9), 0, 0.9)], 0.0),  # by less
        ([(0, TRUTH[0, 0], 1, 0.9)], 0.0),  # of another class
        ([(*FIRST, -np.inf)], 0.0),  # a row to spare
    ],
)
def test_mean_average_precision(rows, expected):
    assert_close(score(*rows), expected, "reference")
    assert_close(score(*rows[::-1]), expected, "reference")


# --- Data and baseline ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20, 28, 36])
def test_resampling_averages(size):
    matrix = digits_on_canvas.resampling(28, size)
    assert_close(matrix.sum(axis=1), np.ones(size), "float32 mean")
    assert_close(matrix.sum(axis=0), np.full(28, size / 28), "float32 mean")
    if size == 28:
        np.testing.assert_array_equal(matrix, np.eye(28))


def test_canvases(digits):
    painted = digits_on_canvas.paint(*digits[:2], count=200, seed=1)
    there = painted.labels >= 0
    assert set(there.sum(axis=1)) == {1, 2, 3, 4}
    assert set(painted.labels[there]) == set(range(10))
    assert painted.boxes.min() >= 0
    assert painted.boxes.max() <= 64
    sides = painted.boxes[there][:, 2:] - painted.boxes[there][:, :2]
    assert sides.min() == 14 < 26 <= sides.max() <= 27
    alone = there.sum(axis=1) == 1
    for image, box in zip(painted.images[alone], painted.boxes[alone, 0], strict=True):
        rows, columns = digits_on_canvas.tight(image)
        np.testing.assert_array_equal(box, [columns.start, rows.start, columns.stop, rows.stop])
    overlaps = np.asarray(boxes.iou(painted.boxes[:, :, None], painted.boxes[:, None]))
    assert 0 < (overlaps * (1 - np.eye(4))).max() < 0.3
    again, other = (digits_on_canvas.paint(*digits[:2], count=20, seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(again.images, painted.images[:20])
    assert np.any(other.images != again.images)


def test_the_baseline_reads_digits_that_do_not_touch(digits):
    painted = digits_on_canvas.paint(*digits[:2], count=60, seed=1)
    found = digits_on_canvas.components(*digits[:2], painted.images)
    alone = (painted.labels >= 0).sum(axis=1) == 1
    found = boxes.Detections(*(part[alone] for part in found))
    assert boxes.mean_average_precision(found, *(part[alone] for part in painted[1:])) > 0.9
    empty = digits_on_canvas.components(*digits[:2], np.zeros((1, 64, 64), np.float32))
    assert np.all(empty.scores == -np.inf)


# --- Targets, partition, detectors ----------------------------------------------------------------


def test_the_cell_of_a_centre():
    centres = np.array([[0.5, 0.5], [8, 7], [63, 1], [1, 63]], np.float32)
    np.testing.assert_array_equal(detection.cells_of(boxes.around(centres, 2.0)), [0, 1, 7, 56])
    cells = detection.cells_of(boxes.around(detection.CENTRES, 10.0))
    np.testing.assert_array_equal(cells, np.arange(64))


def test_anchors_propose_what_they_overlap():
    anchors = np.asarray(detection.ANCHORS)
    exact, thin = anchors[50], np.array([30, 30, 33, 60], np.float32)
    truth = np.stack([exact, thin, np.zeros(4, np.float32)])[None]
    there = np.array([[True, True, False]])
    targets = jax.jit(detection.anchor_targets)
    digit, positive, negative = (np.asarray(x[0]) for x in targets(truth, there))
    overlaps = np.asarray(jax.jit(boxes.iou)(anchors[:, None], truth))
    assert digit[50] == 0 and positive[50] and not negative[50]  # noqa: PT018
    assert overlaps[:, 1].max() < 0.5  # no anchor is so thin: the nearest proposes it all the same
    assert positive[overlaps[:, 1].argmax()]
    assert positive.sum() == 1 + (overlaps[:, 0] >= 0.5).sum()
    np.testing.assert_array_equal(negative, ~positive & (overlaps.max(axis=1) < 0.3))
    assert not np.all(positive | negative)
    none = targets(truth, np.zeros((1, 3), bool))[1]
    np.testing.assert_array_equal(none[0], overlaps.max(axis=1) >= 0.5)


def test_each_part_has_its_own_rate():
    params = {"backbone": {"kernel": jnp.ones(3)}, "proposal": jnp.ones(2), "answer": jnp.ones(1)}
    tx = detection.partitioned(detection.adam, steps=20)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for rise in (0, 1 / 2, 1):
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic is not strict
            updates, state = update(params, state, params)
        for part, updated in updates.items():
            rate = detection.RATES["backbone" if part == "backbone" else "heads"]
            for leaf in jax.tree.leaves(updated):
                assert_close(leaf, np.full(leaf.shape, -rise * rate), "contracted")


class Answering(detection.Yolo):
    """A YOLO whose last layer gives this answer (cells, 5 + classes) to one image."""

    def __init__(self, answer):
        self.backbone, self.hidden = lambda images: images, []
        self.output = lambda x: jnp.asarray(answer)[None]


def test_a_yolo_that_is_right_has_no_loss():
    truth = np.array([[[8, 8, 24, 28], [0, 0, 0, 0]]], np.float32)  # around (16, 18)
    answer = np.full((64, 15), -20, np.float32)
    x, y, width, height, digit, seven = 0, 1, 2, 3, 4, 5 + 7
    answer[2 * 8 + 2, [x, width, height]] = -20, 0, np.log(20 / 16)  # the cell from (16, 16) on
    answer[2 * 8 + 2, [y, digit, seven]] = np.log(1 / 3), 20, 20  # a quarter of the cell
    model, image = Answering(answer), np.zeros((1, 64, 64), np.float32)
    loss = jax.jit(lambda labels: model.loss(image, truth, labels))
    assert float(loss(np.array([[7, -1]]))) < 1e-4
    assert float(loss(np.array([[6, -1]]))) > 10
    found = jax.jit(model.detect)(image)
    assert_close(found.boxes[0, 0], truth[0, 0], "contracted")
    assert found.labels[0, 0] == 7
    assert float(found.scores[0, 0]) > 0.99 > 0.01 > float(found.scores[0, 1])


def test_the_partition_is_that_of_optax():
    """Bitwise, with gradients that are clipped and that are not."""
    rng = np.random.default_rng(0)
    params = {"backbone": {"kernel": jnp.ones((5, 3))}, "heads": jnp.ones(7)}
    steps = [random_grads(params, rng, low=-3, high=1) for _ in range(20)]

    @partial(user_jit, static_argnums=0)
    def trained(adam):
        tx = detection.partitioned(adam, len(steps))

        def step(carry, grads):
            updates, state = tx.update(grads, *carry[::-1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), stack(steps))[0][0]

    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = trained(detection.adam), trained(optax.adam)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert np.all(ours["heads"] != 1)


@pytest.mark.parametrize(("model", "options"), [("yolo", []), ("faster_rcnn", ["--alone"])])
def test_detection(model, options, digits, tmp_path, monkeypatch, capsys):
    train, losses = detection.train, {}

    def kept(*arguments):
        trained = train(*arguments)
        losses.update({name: np.stack(of_steps) for name, of_steps in trained.items()})
        return trained

    monkeypatch.setattr(detection, "train", kept)
    monkeypatch.setattr(detection, "shipped_digits", lambda: digits)
    monkeypatch.setattr(detection, "BATCH", 4)
    monkeypatch.setattr(detection, "TRAINING", 16)
    monkeypatch.setattr(detection, "HELD_OUT", 8)
    arguments = ["--model", model, "--steps", "12", *options]
    monkeypatch.setattr(sys, "argv", ["detection.py", *arguments])
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        detection.main()
    printed = capsys.readouterr().out
    assert re.search(r"^held-out mAP@0.5 [\d.e-]+, (NOT )?better", printed, re.MULTILINE)
    assert losses["adam_jax"][-4:].mean() < losses["adam_jax"][:4].mean()
    if not options:  # not compiled as a user has it, the two runs differ by roundings
        largest = re.search(r"^largest difference of a weight (\S+)$", printed, re.MULTILINE)
        assert float(largest[1]) < 1e-4
        assert_close(losses["adam_jax"], losses["optax"], "contracted")
    assert (tmp_path / f"detection-{model}.png").stat().st_size > 10_000
