"""The example on second moments that are hard to keep: the maps of two papers, and a short run."""

import json
import sys

import chex
import hard_moments
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer
from hard_moments import CHOICES, PROBLEMS

from adam_jax.storage import Leaf


def test_the_dynamic_map_of_8_bits():
    """The values of bitsandbytes: 0, 1, and from 5.5e-7 to 0.993 with each of their signs."""
    values = hard_moments.dynamic_map(8, signed=True)
    assert values.size == len(set(values.tolist())) == 256
    np.testing.assert_allclose(values[0], -0.992969, rtol=1e-6)
    np.testing.assert_allclose(values[-2:], [0.992969, 1], rtol=1e-6)
    np.testing.assert_allclose(values[values > 0][0], 5.5e-7, rtol=1e-6)
    np.testing.assert_array_equal(values[values < 0][::-1], -values[values > 0][:-1])
    unsigned = hard_moments.dynamic_map(8, signed=False)
    assert unsigned.size == len(set(unsigned.tolist())) == 256
    assert (unsigned[0], unsigned[-1]) == (0, 1)


def test_the_maps_of_4_bits():
    """Li et al.: the linear map has no zero, so that no update is divided by it."""
    assert hard_moments.dynamic_map(4, signed=True).size == 16
    np.testing.assert_array_equal(hard_moments.linear_map(4), np.arange(1, 17) / 16)


def test_rank_1_scales_are_those_of_an_outer_product():
    row, column = jnp.array([1.0, 2.0, 8.0]), jnp.array([4.0, 0.5, 1.0, 2.0])
    scales, outer = hard_moments.of_axes(), row[:, None] * column[None]
    kept = scales.of(outer)
    assert kept.shape == (7,)
    np.testing.assert_array_equal(kept, [4, 8, 32, 32, 4, 8, 16])
    over = scales.over(kept, outer.shape)
    assert (over >= outer).all()
    assert over[0, 1] == 4  # the smaller of 4, its row's, and 4, its column's
    assert over[0, 0] == 4
    assert over[2, 1] == 4


@pytest.mark.parametrize("block", [256, 2048])
def test_what_the_map_has_is_kept_exactly(block):
    values = hard_moments.dynamic_map(8, signed=True)
    moment = 2.0 * jnp.resize(jnp.asarray(values), (64, 100))
    storage = hard_moments.dynamic_8_bit(block)["mu_storage"]
    leaf = Leaf("mu", "kernel", moment.shape, jnp.dtype("float32"), 0)
    stored = storage.save(moment, leaf)
    assert stored.codes.dtype == jnp.uint8
    assert stored.scales.shape == (-(-moment.size // block),)
    np.testing.assert_array_equal(storage.load(stored, leaf), moment)


def test_rounding_to_nearest_loses_the_rare_rows(tmp_path, monkeypatch, capsys):
    """In 40 steps: `int8()` stays with float32, and the published map goes away."""
    chosen = [CHOICES[n] for n in (0, 1, 5)]
    monkeypatch.setattr(hard_moments, "CHOICES", chosen)
    paths = {"plot": tmp_path / "curves.png", "json": tmp_path / "rows.json"}
    written = [f"--{name}={path}" for name, path in paths.items()]
    short = ["hard_moments.py", "--steps=40", "--seeds=2", "--problems=zipf", *written]
    monkeypatch.setattr(sys, "argv", short)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        hard_moments.main()
    printed = capsys.readouterr().out
    float32, ours, published = json.loads(paths["json"].read_text())
    assert float32["steps"] == ours["steps"] == [*range(1, 41)]
    assert float32["half"] == [0.0] * 40
    assert ours["mean"][-1] == pytest.approx(float32["mean"][-1], rel=0.01)
    assert published["mean"][-1] > 10 * float32["mean"][-1]
    assert f"| float32 | {float32['mean'][-1]:.3g} |\n" in printed
    assert "| dynamic 8-bit map, block 2048 |" in printed
    assert ": diverges |" in printed
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_error_at_the_start_is_known(name):
    """And the gradient has the shapes of the parameters."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run = PROBLEMS[name].run(jax.random.key(0))
        error = float(run.error(run.params))
        grads = jax.eval_shape(run.gradient, run.params, jax.random.key(1))
    # Normal targets, half of their square, and characters guessed with logits near 0.
    guessed = np.log(transformer.language_reference()[0])
    start = {"zipf": 1.0, "tails": 0.5, "transformer": guessed}[name]
    assert error == pytest.approx(start, rel=0.2)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, run.params)


def test_one_seed_has_no_interval(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hard_moments.py", "--seeds=1"])
    with pytest.raises(SystemExit):
        hard_moments.main()
    assert "--seeds must be at least 2" in capsys.readouterr().err
