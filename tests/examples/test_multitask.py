"""The example of several losses: the paper's toy, the digits, the table and the pictures."""

import argparse
import re
import sys

import jax
import jax.numpy as jnp
import multitask
import numpy as np
import pytest
from digits import Data
from tqdm import tqdm


def test_the_two_losses_of_cagrad(monkeypatch):
    """As the paper says: MGDA stops where it meets the Pareto set, CAGrad goes on to the mean's
    minimum. (The start below; the others take ten times as many steps.)"""
    monkeypatch.setattr(multitask, "TOY_STEPS", 12_000)
    monkeypatch.setattr(multitask, "TOY_RECORDED", 1)
    monkeypatch.setattr(multitask, "STARTS", multitask.STARTS[1:2])
    ends = {
        name: multitask.toy_paths(multitask.TOY_METHODS[name])[-1, 0]
        for name in ("MGDA", "CAGrad, c = 0.5")
    }
    for x, y in ends.values():
        assert y == pytest.approx(multitask.DEEPEST, abs=0.1)
        assert -7.01 <= x <= 7.01
    assert ends["MGDA"][0] < -6.9
    assert abs(ends["CAGrad, c = 0.5"][0]) < 0.5


def test_the_example_trains(monkeypatch):
    """The method that needs the losses, on a few digits."""
    rng = np.random.default_rng(0)
    digits = [rng.random((40, 28, 28), np.float32), rng.integers(0, 10, 40, np.int32)]
    monkeypatch.setattr(multitask, "CHUNK", 2)
    options = argparse.Namespace(seeds=2, steps=4, scale=0.1)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tx = multitask.METHODS["gradnorm"]
        found = multitask.train(tx, Data(*digits, *digits), options, tqdm(disable=True))
    assert found.shape == (2, 2)
    assert np.all((found > 0) & (found < 1))
    assert not np.array_equal(found[0], found[1])


def test_the_example_reports(tmp_path, monkeypatch, capsys):
    """A row for every method, and both pictures."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(multitask, "train", lambda tx, data, options, bar: rng.random((3, 2)))
    monkeypatch.setattr(multitask, "shipped_digits", lambda: None)
    monkeypatch.setattr(multitask, "toy_paths", lambda combination: rng.random((9, 3, 2)))
    monkeypatch.setattr(sys, "argv", ["multitask.py", f"--directory={tmp_path}"])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        multitask.main()
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| ([\w' ]+) \| \d+\.\d% \(\d+\.\d–\d+\.\d\) \|", printed, re.MULTILINE)
    assert rows == ["each alone", *list(multitask.METHODS)[2:]]
    assert re.search(r"MGDA +ends at \(", printed)
    for picture in ("multitask.png", "multitask-toy.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_example_refuses_a_missing_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["multitask.py", f"--directory={tmp_path / 'nowhere'}"])
    with pytest.raises(SystemExit):
        multitask.main()
    assert "there is no directory" in capsys.readouterr().err


def test_overlaid_digits():
    """The left digit is where the right one is not, and the other way round."""
    ones, none = jnp.ones((1, 28, 28)), jnp.zeros((1, 28, 28))
    left, right = multitask.overlaid(ones, none)[0], multitask.overlaid(none, ones)[0]
    assert left.shape == (18, 18)
    np.testing.assert_array_equal(left, right[::-1, ::-1])
    assert (left[0, 0], left[-1, -1], left.sum()) == (1, 0, 14 * 14)
    np.testing.assert_array_equal(multitask.overlaid(ones, ones)[0], jnp.maximum(left, right))
