"""The step in the backward pass in every framework is the plain step, and learns."""

import re
import sys

import backward
import jax
import numpy as np
import pytest
import transformer
from support import assert_close

pytestmark = pytest.mark.usefixtures("promoting")


@pytest.fixture
def short_run(monkeypatch, capsys):
    """A function that runs a small model of a framework.

    It returns the first and the last layers and what was printed.
    """

    def run(framework):
        def train(model, *arguments):
            trained.append(jax.tree.map(np.array, model[1]))  # they are donated
            params, layers, state = original(model, *arguments)
            trained.append(layers)
            return params, layers, state

        trained, original = [], backward.train
        monkeypatch.setattr(backward, "train", train)
        monkeypatch.setattr(sys, "argv", ["backward.py", f"--framework={framework}", "--steps=7"])
        with jax.numpy_rank_promotion("allow"):
            backward.main()
        return *trained, capsys.readouterr().out

    for name, value in {"WIDTH": 32, "LAYERS": 2, "CONTEXT": 16}.items():
        monkeypatch.setattr(transformer, name, value)
        monkeypatch.setattr(backward, name, value)
    return run


@pytest.mark.parametrize("framework", backward.FRAMEWORKS)
def test_a_framework(framework, short_run):
    before, after, printed = short_run(framework)
    losses = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \|$", printed, re.MULTILINE)
    assert [int(number) for number, *_ in losses] == [1, 2, 3, 4, 5]
    values = np.array(losses, float)
    assert_close(values[:, 1], values[:, 2], "contracted")
    assert len(set(values[:, 1])) == 5
    first, last = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert last < first - 0.3
    moved = jax.tree.map(lambda a, b: np.ptp(a - b, axis=tuple(range(1, a.ndim))), before, after)
    for of_leaf in jax.tree.leaves(moved):
        assert of_leaf.shape == (2,)
    assert sum(np.all(of_leaf > 0) for of_leaf in jax.tree.leaves(moved)) >= 4
    kept = re.search(r"([\d,]+) bytes of weights, ([\d,]+) of state", printed).groups()
    weights, state = (int(number.replace(",", "")) for number in kept)
    assert state < 1.5 * weights  # in float32 it is twice
    assert f"0 bytes of gradients kept of the layers, not {backward.nbytes(after):,}" in printed
