"""What several test files need: the table of tolerances, trees, gradients, and runners."""

import contextlib
import os
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType


class Tolerance(NamedTuple):
    rtol: float
    atol: float
    reason: str


# Every comparison that is not bitwise takes its tolerance from here.
TOLERANCES = {
    "reference": Tolerance(
        1e-12, 1e-12, "float64: the same formula in another library, 500 steps of other roundings"
    ),
    "JavaScript": Tolerance(
        1e-12, 1e-13, "float64: V8's powers, and XLA contracts multiply and add; 200 steps of that"
    ),
    "torch": Tolerance(
        1e-9, 1e-9, "float64: PyTorch rounds its scalars elsewhere, and 500 steps feed that back"
    ),
    "sparse": Tolerance(
        1e-5, 1e-5, "float32: PyTorch rounds its scalars elsewhere, 300 steps of 0.1 at the most"
    ),
    "algebra": Tolerance(
        1e-11, 0.0, "float64: two sides of an identity, a few roundings through 1 - b**t"
    ),
    "centered": Tolerance(
        1e-9, 1e-9, "float64: v - m**2 cancels where the gradient is steady, then its root"
    ),
    "minimum": Tolerance(
        1e-6,
        1e-6,
        "float64: where a function is least it is flat, which hides half of the digits; gradients "
        "of norm 1 at most",
    ),
    "fused": Tolerance(
        1e-12,
        1e-15,
        "float64: XLA contracts multiply and add when it fuses, a few ulp in three steps",
    ),
    "moving": Tolerance(1e-6, 0.0, "the promised bound on the weight of a moving decay"),
    "float32 rate": Tolerance(
        2e-4, 1e-6, "a rate of 0.999 as a float32 array is off by 1e-8, and 1 - 0.999 by 1e-5"
    ),
    "float32 mean": Tolerance(
        1e-6, 1e-30, "float32: two sums of the same numbers in another order, in pieces of 32"
    ),
    "contracted": Tolerance(
        1e-5,
        1e-6,
        "float32: XLA contracts multiply and add when it fuses; one step in 1e5 then draws the "
        "neighbouring code",
    ),
    "reordered": Tolerance(
        1e-5,
        3e-5,
        "float32: gradients summed by more or fewer devices; seldom that draws the neighbouring "
        "code, which is a hundredth of a step of 1e-3",
    ),
    "layer": Tolerance(
        2e-6, 1e-6, "float32: in a loop over layers XLA contracts otherwise; 1e-4 of a step of 0.01"
    ),
    "kernel": Tolerance(
        1e-6, 0.0, "float32: an update is scaled in a kernel, or as XLA orders the factors; few ulp"
    ),
    "cast to bfloat16": Tolerance(2**-8, 1e-6, "8 bits, rounded once; float32 cancels to 1e-6"),
    "cast to float16": Tolerance(2**-11, 1e-6, "11 bits, rounded once; float32 cancels to 1e-6"),
    "bfloat16": Tolerance(2**-7, 1e-8, "direction and step are each rounded to 8 bits"),
    "float16": Tolerance(2**-10, 6e-8, "direction and step are each rounded to 11 bits"),
}


# jax.jit as a user has it, where conftest.py told XLA to compile quickly.
QUICK = "optimization_level=0" in os.environ.get("XLA_FLAGS", "")
DEFAULTS: dict = {"xla_backend_optimization_level": 3}
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    DEFAULTS["xla_cpu_use_fusion_emitters"] = True
user_jit = partial(jax.jit, compiler_options=DEFAULTS if QUICK else None)


def assert_close(actual, expected, tolerance: str):
    rtol, atol, reason = TOLERANCES[tolerance]
    wide = lambda x: np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)  # noqa: E731
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            wide(a), wide(e), rtol=rtol, atol=atol, err_msg=reason
        ),
        actual,
        expected,
    )


@contextlib.contextmanager
def refused(error, names):
    """An error that has these names (parted by spaces) of what is wrong and of the remedy."""
    with pytest.raises(error) as caught:
        yield
    text = str(caught.value)
    missing = [n for n in names.split() if not re.search(rf"(?<!\w){re.escape(n)}(?!\w)", text)]
    assert not missing, f"{missing} not in: {text}"


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def random_params(dtype="float32", seed=0):
    """A small tree with a matrix, a vector, a scalar and an empty leaf."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (13, 7), "bias": (7,), "scale": (), "empty": (0, 3)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def random_grads(params, rng, low=-3, high=3):
    """Gradients for `params`, all of one magnitude 10**u with u uniform in [low, high]."""
    magnitude = 10 ** rng.uniform(low, high)
    return jax.tree.map(lambda p: np.asarray(rng.normal(size=p.shape) * magnitude, p.dtype), params)


def matrices_only(params):
    """A mask for weight decay."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def mesh_of(kind="auto", **axes):
    """A mesh of the devices of tests/conftest.py, with automatic or explicit axes."""
    kinds = (AxisType[kind.capitalize()],) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def trajectory(tx, params, gradients):
    """The parameters after each step, and the last state."""
    state, update, path = tx.init(params), jax.jit(tx.update), []
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path, state


def plain_step(tx):
    """`step(params, state, grads) -> (params, state)`: update and apply."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    return step


def make_step(tx):
    """One jitted step: update and apply. optax's own arithmetic is not strict about dtypes."""

    @user_jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    def promoting(*args):
        with jax.numpy_dtype_promotion("standard"):
            return step(*args)

    return promoting
