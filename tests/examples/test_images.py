"""The images application: what decays, what is averaged, how images move, and short runs."""

import re
import sys

import images
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from digits import Data
from flax import nnx
from support import assert_close, user_jit

MODELS = sorted(images.MODELS)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Few channels, and the promotion that Flax needs."""
    monkeypatch.setattr(images, "WIDTHS", (4, 8))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def stripes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images whose label is where a bright stripe lies."""
    labels = np.arange(count, dtype=np.int32) % 10
    rows = np.arange(28)[:, None]
    bright = np.abs(rows - 2 * labels[:, None, None] - 4) < 2
    return np.broadcast_to(bright, (count, 28, 28)).astype(np.float32), labels


@pytest.fixture
def short_run(monkeypatch, tmp_path, capsys):
    """A function that runs the program on stripes, and returns the losses and what it printed."""
    original, losses = images.train, {}

    def train(*arguments):
        trained = original(*arguments)
        losses.update({name: np.stack(of_steps) for name, of_steps in trained.items()})
        return trained

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["images.py", "--steps", "20", *arguments])
        images.main()
        return losses, capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "train", train)
    monkeypatch.setattr(images, "shipped_digits", lambda: Data(*stripes(80), *stripes(20)))
    monkeypatch.setattr(images, "BATCH", 20)
    monkeypatch.setattr(images, "LEARNING_RATE", 0.03)
    return run


def test_vgg_beside_optax(short_run, monkeypatch):
    """Weights and losses are the same bits, in the step that a user compiles."""
    monkeypatch.setattr(images, "WIDTHS", (4,))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", user_jit)  # nnx.jit takes no options of the compiler
        step = nnx.jit(images.step.__wrapped__)
    monkeypatch.setattr(images, "step", step)
    losses, printed = short_run("--model", "vgg")
    np.testing.assert_array_equal(*losses.values())
    assert losses["adam_jax"][-5:].mean() < losses["adam_jax"][:5].mean() - 0.1
    assert "largest difference of a weight: 0\n" in printed


def test_resnet_alone(short_run, tmp_path):
    """The loss falls, and there are the metric, what it has to beat, and the picture."""
    losses, printed = short_run("--model", "resnet", "--alone")
    assert list(losses) == ["adam_jax"]
    assert losses["adam_jax"][-5:].mean() < losses["adam_jax"][:5].mean() - 0.1
    assert re.search(r"held-out accuracy [\d.]+, .*better than 1 of a support vector", printed)
    assert "largest difference" not in printed
    assert (tmp_path / "images-resnet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("model", MODELS)
def test_only_kernels_decay(model):
    params = nnx.state(images.MODELS[model](nnx.Rngs(0)), nnx.Param)
    decays = jax.tree.leaves_with_path(nnx.to_pure_dict(images.kernels(params)))
    assert {path[-1].key for path, _ in decays} >= {"kernel", "bias"}
    for path, decay in decays:
        assert decay == (path[-1].key == "kernel"), path


def test_the_average_is_bias_corrected(monkeypatch):
    """As optax.ema keeps it, from the first step on."""
    monkeypatch.setattr(images, "AVERAGE_DECAY", 0.5)  # 1 - 0.98**t cancels, in either order
    model = nnx.Linear(3, 10, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    average = nnx.clone(model)
    ema = optax.ema(images.AVERAGE_DECAY)
    state = ema.init(nnx.state(model))
    for number in range(4):
        images.step(model, optimizer, average, jnp.eye(3) * number, jnp.arange(3))
        expected, state = ema.update(nnx.state(model), state)
        assert_close(jax.tree.leaves(nnx.state(average)), jax.tree.leaves(expected), "float32 mean")


def test_images_are_moved_by_up_to_two_pixels():
    dot = np.zeros((400, 28, 28), np.float32)
    dot[:, 14, 14] = 1
    (moved, labels), *rest = images.shifted([(dot, np.arange(400))], seed=0)
    assert not rest
    assert moved.shape == dot.shape
    np.testing.assert_array_equal(labels, np.arange(400))
    number, row, column = np.nonzero(moved)
    np.testing.assert_array_equal(number, np.arange(400))  # one dot each
    places = set(zip(row - 14, column - 14, strict=True))
    assert places == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_a_model_is_evaluated_with_the_statistics_of_training():
    model = images.ResNet(nnx.Rngs(0))

    def gathered(model):
        norms = [norm for block in model.blocks for norm in (block.first_norm, block.second_norm)]
        return [norm.use_running_average for norm in (model.norm, *norms)]

    assert gathered(images.evaluated(model)) == [True] * 5
    assert gathered(model) == [False] * 5
