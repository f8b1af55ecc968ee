"""A million steps in one scan: where rounding takes the weights, against a run in float64.

Least squares on one leaf, with noise in the gradients that is the same for all runs, and a constant
learning rate, so that the weights wander about their targets for ever. A run stands beside float64
in the loss and in v (both: mean over the last tenth of the steps), and in the distance of its last
weights from float64's. Two unrelated runs would be 1.41 apart.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from memory import hardware, positive
from tqdm import tqdm

import adam_jax
from adam_jax import storage

SHAPE = 64, 64  # 4,096 elements: large enough to be kept in codes
RATE = 1e-3


class Choice(NamedTuple):
    kept: storage.Storage | None = None  # both moments
    rounding: optax.GradientTransformation | None = None  # with one, the weights are bfloat16


CHOICES = {
    "float32": Choice(),
    "8-bit": Choice(storage.int8()),
    "4-bit": Choice(storage.int4()),
    "bfloat16 weights, compensate": Choice(None, adam_jax.compensate()),
    "8-bit, bfloat16 weights, compensate int8": Choice(storage.int8(), adam_jax.compensate("int8")),
    "8-bit, bfloat16 weights, round_stochastically": Choice(
        storage.int8(), adam_jax.round_stochastically()
    ),
}


class Row(NamedTuple):
    name: str
    loss: float  # over float64's
    v: float  # over float64's
    distance: float  # between the last weights, over that of float64's from their targets


@partial(jax.jit, static_argnames=("choice", "dtype", "steps"))
def trained(choice: Choice, dtype: Any, steps: int, seed: int, curvature: Any, target: Any):
    """The last weights, and the means of loss and v over the last tenth of the steps."""
    curvature, target = (x.astype(dtype) for x in (curvature, target))
    how = choice.kept
    gather = adam_jax.scale_by_moments(mu_storage=how, nu_storage=how)
    stages = [adam_jax.bias_correct(), adam_jax.scale_by_lr(RATE), choice.rounding]
    descend = optax.chain(*(stage for stage in stages if stage is not None))
    weights = jnp.zeros(SHAPE, dtype if choice.rounding is None else jnp.bfloat16)
    last = -(-steps // 10)

    def step(now, count):
        weights, state, means = now
        key = jax.random.fold_in(jax.random.key(seed), count)
        noise = jax.random.normal(key, SHAPE, jnp.float32).astype(dtype)
        error = weights.astype(dtype) - target
        moments, kept = gather.update(curvature * error + noise, state[0])
        updates, state = descend.update(moments, state[1], weights)
        weights = optax.apply_updates(weights, updates)
        found = jnp.stack([jnp.mean(curvature * error**2) / 2, jnp.mean(moments.nu.value)])
        means = means + jnp.where(count >= steps - last, found / last, 0)
        return (weights, (kept, state), means), None

    start = weights, (gather.init(weights), descend.init(weights)), jnp.zeros(2, dtype)
    (weights, _, means), _ = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    return weights.astype(dtype), means


def measured(steps: int, seed: int, names: list[str]) -> Iterator[Row]:
    rng = np.random.default_rng(seed)
    # Curvatures over two powers of ten, as float32 has them, in both runs.
    curvature, target = (
        np.float32(x) for x in (10 ** rng.uniform(-1, 1, SHAPE), rng.normal(size=SHAPE))
    )
    jax.config.update("jax_enable_x64", True)
    try:
        exact = trained(Choice(), jnp.float64, steps, seed, curvature, target)
        exact_weights, exact_means = map(np.asarray, exact)
    finally:
        jax.config.update("jax_enable_x64", False)
    around = np.linalg.norm(exact_weights - target)
    for name in names:
        run = trained(CHOICES[name], jnp.float32, steps, seed, curvature, target)
        weights, means = (np.asarray(x, np.float64) for x in run)
        distance = np.linalg.norm(weights - exact_weights) / around
        yield Row(name, *map(float, means / exact_means), float(distance))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=positive, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    print(f"{options.steps} steps, seed {options.seed}; {hardware()}\n")
    print("| moments, weights | loss | v | distance |\n|---|---|---|---|")
    for row in tqdm(measured(options.steps, options.seed, list(CHOICES)), total=len(CHOICES)):
        tqdm.write(f"| {row.name} | {row.loss:.4f} × | {row.v:.4f} × | {row.distance:.1e} |")


if __name__ == "__main__":
    main()
