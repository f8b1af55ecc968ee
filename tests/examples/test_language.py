"""The language application: its text, what it asks, its baseline, what it keeps, and short runs."""

import re
import sys
from functools import partial

import characters
import jax
import jax.numpy as jnp
import language
import numpy as np
import pytest
from flax import nnx


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A narrow model of one block, and the promotion that Flax needs."""
    sizes = {"CONTEXT": 16, "WIDTH": 32, "HEADS": 2, "LAYERS": 1, "BATCH": 8}
    for name, value in {**sizes, "LEARNING_RATE": 0.03}.items():
        monkeypatch.setattr(language, name, value)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_no_paragraph_is_learned_and_held_out():
    found = characters.paragraphs().split("\n\n")
    assert len(found) > 1000
    assert len(set(found)) == len(found)


def test_gpt_is_asked_for_the_next_character():
    text, targets = characters.next_characters(language.windows(np.arange(9), 4))
    np.testing.assert_array_equal(text[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(targets[:, -1], np.arange(3, 9))


def test_a_hidden_character_has_two_neighbours_on_either_side():
    pieces = np.arange(1, 65).reshape(4, 16)
    text, targets = characters.masked(pieces, 0, np.random.default_rng(0))
    np.testing.assert_array_equal(text == 0, targets >= 0)
    np.testing.assert_array_equal(np.where(text == 0, targets, text), pieces)
    for row in text == 0:
        assert set(np.diff(np.flatnonzero(row))) == {characters.EVERY}
    assert len({tuple(row) for row in text == 0}) > 1  # not the same places in all pieces


def test_the_trigram_model_by_hand():
    """Of all that has two before it: after 1, with 0 before it or not, came 0 twice and 2 once."""
    text = np.array([0, 1, 0, 1, 0, 1, 2])
    probability = characters.trigram(text, 4)
    np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-12)
    one = (np.array([2, 2, 1, 0]) + 3 / 4) / (5 + 3)
    two = (np.array([2, 0, 1, 0]) + 2 * one) / (3 + 2)
    three = (np.array([2, 0, 1, 0]) + 2 * two) / (3 + 2)
    np.testing.assert_allclose(probability[0, 1], three, rtol=1e-12)
    np.testing.assert_allclose(probability[3, 3], one, rtol=1e-12)  # never seen
    bits = -np.log2([probability[0, 1, 2], probability[1, 2, 3]]).mean()
    assert characters.trigram_bits(probability, np.arange(4)) == pytest.approx(bits)


def test_the_trigram_model_fills_in_from_both_sides():
    """After 0 1 comes 2 or 3; which of them, only what follows tells."""
    rng = np.random.default_rng(0)
    middle = rng.integers(2, 4, 500)
    text = np.stack([np.zeros_like(middle), np.ones_like(middle), middle, middle + 2], 1).ravel()
    probability = characters.trigram(text, 6)
    assert characters.trigram_accuracy(probability, text) == 1.0
    assert 0.24 < characters.trigram_bits(probability, text) < 0.3  # one bit for every fourth


@pytest.mark.parametrize("causal", [True, False])
def test_what_a_character_sees(causal):
    """GPT's answer changes with the character itself and those before it, BERT's with all."""
    answer = nnx.jit(language.Transformer(11, causal, nnx.Rngs(0)))
    text = np.arange(language.CONTEXT)[None] % 10
    for changed in (0, 7, 15):
        other = text.copy()
        other[0, changed] = 10
        differs = np.any(np.asarray(answer(text) != answer(other)), axis=-1)[0]
        np.testing.assert_array_equal(differs, (np.arange(16) >= changed) | (not causal))


def test_nothing_is_lost_where_nothing_is_asked():
    logits = jnp.zeros((1, 3, 8))
    np.testing.assert_allclose(language.bits(logits, np.array([[5, -1, 0]])), [[3, 0, 3]], 1e-6)


@pytest.fixture
def short_run(monkeypatch, tmp_path, capsys):
    """A function that runs the program, looks at what is trained, and returns what it printed."""

    def train(runs, data, steps):
        start = [nnx.state(model, nnx.Param) for model, _ in runs.values()]
        assert {leaf.dtype for leaf in jax.tree.leaves(start[0])} == {jnp.dtype("bfloat16")}
        for weights in start[1:]:
            assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
            jax.tree.map(np.testing.assert_array_equal, weights, wide(start[0]))
        losses = original(runs, data, steps)
        for values in map(
            np.stack, losses.values()
        ):  # the first is the untrained model's; a batch is small
            assert values[-3:].mean() < values[0] - 1
        return losses

    def run(model, *arguments):
        monkeypatch.setattr(
            sys, "argv", ["language.py", "--model", model, "--steps=15", *arguments]
        )
        language.main()
        assert (tmp_path / f"language-{model}.png").stat().st_size > 10_000
        return capsys.readouterr().out

    original, wide = language.train, partial(jax.tree.map, jnp.float32)
    monkeypatch.setattr(language, "train", train)
    monkeypatch.chdir(tmp_path)
    return run


def test_gpt(short_run):
    printed = short_run("gpt", "--alone")
    assert printed.count(": bits per character ") == 1
    assert len(printed.split("it writes\n\n")[1]) > 300


def test_bert_beside_optax(short_run):
    """In 8 bits and bfloat16 it learns as much as in float32, from less than half of the bytes."""
    printed = short_run("bert")
    assert printed.count(": filled in rightly ") == 2
    kept = re.findall(r"([\d,]+) bytes of weights, ([\d,]+) of state", printed)
    (weights, state), (wide_weights, wide_state) = (
        [int(number.replace(",", "")) for number in numbers] for numbers in kept
    )
    assert wide_weights == 2 * weights
    assert state < wide_state
