"""A million steps in one scan: where rounding takes the weights, against a run in float64.

Least squares on one leaf, with noise in the gradients that is the same for all runs, and a constant
learning rate, so that the weights wander about their targets for ever. A run stands beside float64
in the loss and in v (both: mean over the last tenth of the steps), and in the distance of its last
weights from float64's. Two unrelated runs would be 1.41 apart.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from commandline import hardware, parser
from tqdm import tqdm

import adam_jax
from adam_jax import storage


class Choice(NamedTuple):
    kept: storage.Storage | None = None  # both moments
    rounding: optax.GradientTransformation | None = None  # with one, the weights are bfloat16

    def stages(self) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        """Adam, cut where v is looked at."""
        return (
            adam_jax.scale_by_moments(mu_storage=self.kept, nu_storage=self.kept),
            optax.chain(
                adam_jax.bias_correct(),
                adam_jax.scale_by_lr(1e-3),
                *([self.rounding] if self.rounding else []),
            ),
        )


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


SHAPE = 64, 64  # 4,096 elements: large enough to be kept in codes


class Row(NamedTuple):
    name: str
    loss: float  # over float64's
    v: float  # over float64's
    distance: float  # between the last weights, over that of float64's from their targets


@partial(jax.jit, static_argnames=("choice", "dtype", "steps"))
def trained(choice: Choice, dtype: Any, steps: int, seed: int, curvature: Any, target: Any):
    """The last weights, and loss and mean v of every step."""
    curvature, target = (x.astype(dtype) for x in (curvature, target))
    gather, descend = choice.stages()
    weights = jnp.zeros(SHAPE, dtype if choice.rounding is None else jnp.bfloat16)

    def step(now, count):
        weights, state = now
        key = jax.random.fold_in(jax.random.key(seed), count)
        noise = jax.random.normal(key, SHAPE, jnp.float32).astype(dtype)
        error = weights.astype(dtype) - target
        moments, kept = gather.update(curvature * error + noise, state[0])
        updates, state = descend.update(moments, state[1], weights)
        weights = optax.apply_updates(weights, updates)
        found = jnp.mean(curvature * error**2) / 2, jnp.mean(moments.nu.value)
        return (weights, (kept, state)), found

    start = weights, (gather.init(weights), descend.init(weights))
    (weights, _), found = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    return weights.astype(dtype), found


def measured(steps: int, seed: int, names: list[str]) -> Iterator[Row]:
    rng = np.random.default_rng(seed)
    # Curvatures over two powers of ten, as float32 has them, in both runs.
    curvature, target = (
        np.float32(x) for x in (10 ** rng.uniform(-1, 1, SHAPE), rng.normal(size=SHAPE))
    )

    def run(choice, dtype):
        weights, found = trained(choice, dtype, steps, seed, curvature, target)
        last = [np.asarray(x)[-max(steps // 10, 1) :] for x in found]
        return np.asarray(weights, np.float64), [np.mean(x, dtype=np.float64) for x in last]

    jax.config.update("jax_enable_x64", True)
    try:
        exact, due = run(Choice(), jnp.float64)
    finally:
        jax.config.update("jax_enable_x64", False)
    for name in names:
        weights, means = run(CHOICES[name], jnp.float32)
        distance = np.linalg.norm(weights - exact) / np.linalg.norm(exact - target)
        yield Row(name, *(float(a / b) for a, b in zip(means, due, strict=True)), float(distance))


def main() -> None:
    options = parser(__doc__, steps=1_000_000, seed=0).parse_args()
    print(f"{options.steps} steps, seed {options.seed}; {hardware()}\n")
    print("| moments, weights | loss | v | distance |\n|---|---|---|---|")
    for row in tqdm(measured(options.steps, options.seed, list(CHOICES)), total=len(CHOICES)):
        tqdm.write(f"| {row.name} | {row.loss:.2f} × | {row.v:.2f} × | {row.distance:.1e} |")


if __name__ == "__main__":
    main()
