"""The multimodal example run small, and its parts: texts, loss, labels, frozen steps, retrieval."""

import re
import sys

import jax
import jax.numpy as jnp
import multimodal
import numpy as np
import pytest
from digits import Data
from flax import nnx

STEPS, FROZEN = 40, 5


def random_digits(train, test):
    """Images that a label can be read from: noise, and one row of pixels for each digit."""
    rng = np.random.default_rng(0)

    def images(labels):
        noise = 0.2 * rng.random((len(labels), 10, 10))
        return (noise + np.eye(10)[labels][:, :, None]).astype(np.float32)

    labels = [np.arange(n, dtype=np.int32) % 10 for n in (train, test)]
    return Data(images(labels[0]), labels[0], images(labels[1]), labels[1])


@pytest.fixture(autouse=True)
def promotion():
    """As a user has it: optax's schedules multiply integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def digits():
    return random_digits(200, 100)


@pytest.fixture(scope="module")
def chains():
    """Two of the three settings, made once, so that each is compiled once."""
    made = multimodal.settings(STEPS)
    assert list(made) == [multimodal.ONE, multimodal.FROZEN, multimodal.OWN]
    return {name: made[name] for name in (multimodal.ONE, multimodal.FROZEN)}


@pytest.fixture
def own(chains):
    return chains[multimodal.FROZEN]


def weights(model):
    """A copy of each, by its place."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def test_the_program(digits, chains, tmp_path, monkeypatch, capsys):
    """Both losses fall, held-out digits are found, and there are a table and a picture."""
    losses, draw = {}, multimodal.draw
    monkeypatch.setattr(
        multimodal, "draw", lambda of_runs, *rest: losses.update(of_runs) or draw(of_runs, *rest)
    )
    monkeypatch.setattr(multimodal, "shipped_digits", lambda: digits)
    monkeypatch.setattr(multimodal, "settings", lambda steps: chains)
    plot = tmp_path / "small.png"
    arguments = ["multimodal.py", "--steps", str(STEPS), "--seeds", "1", "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", arguments)
    multimodal.main()
    assert list(losses) == list(chains)
    for (of_steps,) in losses.values():
        assert of_steps[-10:].mean() < of_steps[:5].mean() / 2
    lines = capsys.readouterr().out.splitlines()
    for name in losses:
        (row,) = (line for line in lines if line.startswith(f"| {name} |"))
        means = [float(number) for number in re.findall(r"\| ([\d.]+) \(", row)]
        assert len(means) == 4
        assert min(means) > 60  # by chance 10
    assert plot.stat().st_size > 10_000


def test_a_missing_directory_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["multimodal.py", "--plot", "nowhere/small.png"])
    with pytest.raises(SystemExit) as caught:
        multimodal.main()
    assert caught.value.code == 2
    assert "there is no directory" in capsys.readouterr().err


def test_frozen_then_thawed(digits, own):
    """The text encoder keeps its bits while frozen and then moves; the rest moves at once."""
    model = multimodal.Pair(digits.train_images[0].size, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, own, wrt=nnx.Param)
    kept = [weights(model)]
    batches = multimodal.batches(digits, 0)
    for _ in range(FROZEN + 1):
        multimodal.step(model, optimizer, *next(batches))
        kept.append(weights(model))
    start, *frozen, thawed = kept
    assert multimodal.frozen_steps(STEPS) == len(frozen) == FROZEN
    for place, weight in start.items():
        for later in frozen:
            assert (later[place].tobytes() == weight.tobytes()) == place.startswith("['text']")
        assert thawed[place].tobytes() != frozen[-1][place].tobytes()


def test_rows_of_characters_that_no_batch_reached_stay(digits, own):
    """The row of padding has no gradient, and with Adam all others would move for ever."""
    model = multimodal.Pair(digits.train_images[0].size, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, own, wrt=nnx.Param)
    batches = multimodal.batches(digits, 0)
    for _ in range(FROZEN + 1):
        multimodal.step(model, optimizer, *next(batches))
    before = np.array(model.text.characters.embedding[...])
    images, texts, labels = next(batches)
    texts = np.broadcast_to(multimodal.TEXTS[0, 7, 0], texts.shape)  # "seven"
    multimodal.step(model, optimizer, images, texts, labels)
    moved = np.any(np.array(model.text.characters.embedding[...]) != before, axis=1)
    assert set(np.flatnonzero(moved)) == set(texts[0]) - {0}


def test_labels_cover_every_parameter(own):
    params = nnx.state(multimodal.Pair(100, nnx.Rngs(0)), nnx.Param)
    labels = multimodal.labels(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert sorted(jax.tree.leaves(labels)) == (
        ["characters"] + 4 * ["image"] + ["temperature"] + 4 * ["text"]
    )
    assert set(own.init(params).inner_states) == set(jax.tree.leaves(labels))


def test_texts():
    """Every text is another one, also where a template has a name of a digit in it."""
    assert multimodal.TEXTS.shape[:3] == (3, 10, 4)
    texts = multimodal.TEXTS.reshape(-1, multimodal.TEXTS.shape[-1])
    assert len(np.unique(texts, axis=0)) == 120
    assert texts.max() == multimodal.CHARACTERS - 1
    one, two = multimodal.TEXTS[1, 1, 0, 0], multimodal.TEXTS[1, 2, 2]
    assert one in two  # 一 in 一个二


def test_contrastive_is_zero_where_the_mass_is_shared():
    labels = jnp.array([3, 1, 3, 7])
    same = (labels[:, None] == labels[None]).astype(jnp.float32)
    assert abs(float(multimodal.contrastive(100 * same, labels))) < 1e-6
    uniform = float(multimodal.contrastive(jnp.zeros((4, 4)), labels))
    assert uniform == pytest.approx(np.mean(np.log([2, 4, 2, 4])))


def test_retrieval():
    labels = np.repeat(np.arange(10), 12)
    right = np.tile(np.eye(10)[labels], 3)
    assert multimodal.retrieval(right, labels) == [1, 1, 1, 1]
    right[:, 10:20] = np.roll(right[:, 10:20], 1, axis=1)  # all Chinese names are wrong
    assert multimodal.retrieval(right, labels) == pytest.approx([1, 0, 1, 2 / 3])
