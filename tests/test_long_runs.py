"""A thousand steps of examples/long_runs.py: what rounding may do to the weights, and how much."""

import long_runs
import pytest

# How far a run may be from float64 in loss and v, and by distance of its weights.
BOUNDS = {"float32": (1e-4, 1e-4), "8-bit": (0.1, 0.2)}


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in long_runs.measured(1000, 0, list(BOUNDS))}


@pytest.mark.parametrize("name", BOUNDS)
def test_close_to_float64(rows, name):
    of_means, distance = BOUNDS[name]
    assert abs(rows[name].loss - 1) < of_means
    assert abs(rows[name].v - 1) < of_means
    assert 0 < rows[name].distance < distance


def test_table(rows):
    lines = long_runs.table(list(rows.values())).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(BOUNDS)
