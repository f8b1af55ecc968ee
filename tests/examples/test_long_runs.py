"""A thousand steps of examples/long_runs.py: what rounding may do to the weights, and how much."""

import long_runs

# How far a run may be from float64 in loss and v, and by distance of its weights.
BOUNDS = {"float32": (1e-4, 1e-4), "8-bit": (0.1, 0.2)}


def test_close_to_float64():
    for row in long_runs.measured(1000, 0, list(BOUNDS)):
        of_means, distance = BOUNDS[row.name]
        assert abs(row.loss - 1) < of_means
        assert abs(row.v - 1) < of_means
        assert 0 < row.distance < distance
