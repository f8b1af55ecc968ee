"""examples/large.py: the models, the bytes it counts, and a small run."""

import jax
import jax.numpy as jnp
import large
import numpy as np
import pytest
from support import assert_close

import adam_jax


@pytest.fixture(autouse=True)
def as_a_user():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.10), ("7b", 6.74), ("13b", 13.02)])
def test_the_shapes_are_those_of_the_papers(name, billions):
    count = sum(x.size for x in jax.tree.leaves(large.parameters(large.SHAPES[name], "float32")))
    assert count / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_character_sees_only_those_before_it():
    shape = large.SHAPES["small"]
    params, layers = large.start(shape, "float32", jax.random.key(0))
    tokens = jnp.arange(65)[None] % 60

    def of_first(tokens):  # the loss of what stands before the change
        return large.loss(shape, params, layers, tokens[:, :41])

    assert of_first(tokens) == of_first(tokens.at[0, 41:].set(3))
    assert of_first(tokens) != of_first(tokens.at[0, 39].set(3))


def test_attention_in_pieces_is_attention():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 512, 4, 8))
    k, v = k[:, :, :2], v[:, :, :2]
    due = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    assert_close(large.attention(q, k, v), due.reshape(2, 512, -1), "contracted")


def test_the_step_in_the_backward_pass_is_the_plain_one():
    shape, tx = large.SHAPES["small"], adam_jax.sgd(1e-2)  # Adam would make a last digit a step
    params, layers = large.start(shape, "float32", jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 17), 0, shape.vocabulary)
    found = []
    for make in (large.plain_step, large.our_step):
        step, init = make(shape, tx)
        found.append(jax.jit(step)(params, layers, init(params, layers), tokens)[:3])
    assert_close(*found, "layer")


def test_run(capsys):
    """Both learn, ours from less than half of the bytes."""
    losses = large.run(steps=12, batch=8, length=32)
    for values in losses.values():
        assert np.mean(values[-3:]) < values[0] - 0.5
    ours, theirs = losses[large.OURS], losses["optax.adamw, float32"]
    assert abs(np.mean(ours[-3:]) - np.mean(theirs[-3:])) < 0.1
    printed = capsys.readouterr().out
    assert "adam_jax, 8 bits, in the backward pass: 5.1" in printed
    assert "optax.adamw, float32: 12.00 bytes" in printed


def test_table():
    row = large.Row("1b", large.OURS, 2 * 10**9, 4 * 10**9, 5 * 10**9, 10**9)
    line = large.table([row]).splitlines()[-1]
    assert line.split(" | ")[2:] == ["4.0 GB", "5.0 GB", "1.0 GB", "10.0 GB", "5.00 bytes |"]
