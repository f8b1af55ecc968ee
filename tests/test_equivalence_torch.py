"""The same numbers as PyTorch on the CPU, recorded, and as Keras's formula, in float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, trajectory
from torch_references import Given, Run, recorded

import adam_jax

STEPS = 500
SHAPE = (5, 3)

RNG = np.random.default_rng(0)
RANDOM = Given("random", {"w": RNG.normal(size=SHAPE)}, {"w": RNG.normal(size=(STEPS, *SHAPE))})


def like_torch(ours, optimizer, **options):
    return ours, Run(RANDOM, optimizer, options)


PAIRS = {
    "adam": like_torch(
        adam_jax.adam(1e-2, 0.8, 0.99, eps=1e-6), "Adam", lr=1e-2, betas=(0.8, 0.99), eps=1e-6
    ),
    "adam, defaults": like_torch(adam_jax.adam(1e-3), "Adam", lr=1e-3),
    "adam, L2": like_torch(
        optax.chain(optax.add_decayed_weights(0.1), adam_jax.adam(1e-3)),
        "Adam",
        lr=1e-3,
        weight_decay=0.1,
    ),
    "adamw": like_torch(adam_jax.adamw(1e-2, weight_decay=0.1), "AdamW", lr=1e-2, weight_decay=0.1),
}
RUNS = [run for _, run in PAIRS.values()]


def train(tx, params, gradients):
    return np.stack(trajectory(tx, params, gradients)[0])


@pytest.fixture
def problem(x64):
    return jnp.asarray(RANDOM.params["w"]), RANDOM.gradients["w"]


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_torch(pair, problem):
    ours, run = pair
    assert_close(train(ours, *problem)[run.rows], recorded(run)["w"], "reference")


def keras_adam(weights, gradients, learning_rate, beta_1, beta_2, epsilon):
    """Keras's documented Adam: epsilon is the paper's epsilon hat, next to the raw root of v."""
    m, v, path = np.zeros(SHAPE), np.zeros(SHAPE), []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        m += (g - m) * (1 - beta_1)
        v += (g**2 - v) * (1 - beta_2)
        weights = weights - alpha * m / (np.sqrt(v) + epsilon)
        path.append(weights)
    return np.stack(path)


@pytest.mark.parametrize("eps", [1e-7, 1e-2])
def test_keras(eps, problem):
    params, gradients = problem
    tx = optax.chain(
        adam_jax.scale_by_moments(0.9, 0.999),
        adam_jax.bias_correct(eps=eps, eps_hat=True),
        adam_jax.scale_by_lr(1e-3),
    )
    expected = keras_adam(np.asarray(params), gradients, 1e-3, 0.9, 0.999, eps)
    assert_close(train(tx, params, gradients), expected, "reference")


def test_the_two_conventions_differ(problem):
    """An epsilon of 1e-2 tells Keras from PyTorch, so the tests above can fail."""
    params, gradients = problem
    ours = train(adam_jax.adam(1e-3, eps=1e-2), params, gradients)
    expected = keras_adam(np.asarray(params), gradients, 1e-3, 0.9, 0.999, 1e-2)
    assert np.max(np.abs(ours - expected)) > 1e-5
