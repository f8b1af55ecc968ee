"""What the rounding of a kept moment adds up to: its noise gathers over 1 / (1 - b) steps.

One leaf gets the same true gradient at every step, under noise ten times as large. So the right
update is known: along the true gradient, each element in the size of its noise. Every way to keep
the moments takes the same noisy gradients and stands beside float32 in the norm of its update, the
cosine of its update to the right one (both: mean over the last tenth of the steps), and the largest
step that any element ever took. What each costs in bytes, seconds and loss: `memory.py`.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import commandline
import jax
import jax.numpy as jnp
import numpy as np
import optax
from memory import CHOICES
from tqdm import tqdm

import adam_jax
from adam_jax import storage

OPTIMIZERS = {"adam": adam_jax.adam, "ademamix": adam_jax.ademamix, "lion": adam_jax.lion}
AT_RANDOM = storage.stochastic(jnp.bfloat16)
MOMENTS = {choice.name: choice.moments for choice in CHOICES if choice.weights == "float32"} | {
    "8-bit m alone": {"mu_storage": storage.int8()},
    "8-bit v alone": {"nu_storage": storage.int8()},
    "4-bit m alone": {"mu_storage": storage.int4()},
    "4-bit v alone": {"nu_storage": storage.int4()},
    "bfloat16 m at random, 8-bit v": {"mu_storage": AT_RANDOM, "nu_storage": storage.int8()},
}


def optimizer(name: str, kept: dict) -> optax.GradientTransformationExtraArgs:
    if name == "lion":
        kept = {key: how for key, how in kept.items() if key == "mu_storage"}
    return OPTIMIZERS[name](1.0, **kept)


SHAPE = 64, 256  # 16,384 elements: large enough to be kept in codes
NOISE = 10.0  # its root mean square, where the true gradient's is 1


def normal(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, SHAPE)


def heavy(key: jax.Array) -> jax.Array:
    """Student's t with 3 degrees of freedom, over its standard deviation."""
    above, *below = jax.random.normal(key, (4, *SHAPE))
    return above / jnp.sqrt(sum(jnp.square(z) for z in below))


NOISES: dict[str, Callable] = {"normal": normal, "heavy": heavy}


class Row(NamedTuple):
    optimizer: str
    moments: str  # how they are kept
    noise: str
    norm: float  # of the update, for a learning rate of 1
    cosine: float  # of the update, sign aside, to the right one
    largest: float  # step of an element, for a learning rate of 1


def cases() -> list[tuple[str, str]]:
    """Optimizer and moments. Lion has no v: only what keeps both moments alike is a case of it."""
    return [
        (name, moments)
        for name in OPTIMIZERS
        for moments, kept in MOMENTS.items()
        if name != "lion" or kept.get("mu_storage") is kept.get("nu_storage")
    ]


@partial(jax.jit, static_argnames=("tx", "draw", "steps"))
def figures(tx, draw: Callable, steps: int, key: jax.Array, right: jax.Array, sizes: jax.Array):
    """Norm, cosine to the right update, and largest element of every update."""
    params = jnp.zeros(SHAPE)

    def step(state, count):
        noise = NOISE * draw(jax.random.fold_in(key, count))
        update, state = tx.update(sizes * (right + noise), state, params)
        norm = jnp.linalg.norm(update)
        cosine = -jnp.vdot(update, right) / (norm * jnp.linalg.norm(right))
        return state, (norm, cosine, jnp.max(jnp.abs(update)))

    return jax.lax.scan(step, tx.init(params), jnp.arange(steps))[1]


def measured(steps: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    # The true gradient is right * sizes: as in memory.py, sizes differ by row, column and element.
    sizes = np.exp(rng.normal(size=(SHAPE[0], 1)) + rng.normal(size=SHAPE[1]))
    right, sizes = (jnp.asarray(x, jnp.float32) for x in (rng.normal(size=SHAPE), sizes))
    rows = []
    todo = [(*case, noise) for case in cases() for noise in NOISES]
    for name, kept, noise in (bar := tqdm(todo, leave=False)):
        bar.set_description(f"{name}, {kept}, {noise}")
        tx = optimizer(name, MOMENTS[kept])
        of_steps = figures(tx, NOISES[noise], steps, jax.random.key(seed), right, sizes)
        norm, cosine, largest = (np.asarray(of_step) for of_step in of_steps)
        last = -(-steps // 10)
        means = float(norm[-last:].mean()), float(cosine[-last:].mean())
        rows.append(Row(name, kept, noise, *means, float(largest.max())))
    return rows


def table(rows: list[Row]) -> str:
    at = {row[:3]: row for row in rows}
    columns = "".join(f" {noise}: norm | cosine | largest step |" for noise in NOISES)
    lines = [f"| optimizer | moments |{columns}", "|---|---|" + "---|---|---|" * len(NOISES)]
    for name, kept in dict.fromkeys(row[:2] for row in rows):
        cells = []
        for noise in NOISES:
            row, base = at[name, kept, noise], at[name, "float32", noise]
            cells += [
                f"{row.norm / base.norm:.2f} ×",
                f"{row.cosine:.2f} of {base.cosine:.2f}",
                f"{row.largest:.1f} of {base.largest:.1f}",
            ]
        lines.append(f"| {name} | {kept} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = commandline.parser(__doc__, steps=6000, seed=0)
    parser.add_argument(
        "--json", type=commandline.new_file, help="where to write every figure (default: nowhere)"
    )
    options = parser.parse_args()

    print(f"{options.steps} steps, seed {options.seed}; {commandline.hardware()}")
    print("decay rates: adam m .9, v .999; ademamix m .9 and .9999, v .999; lion m .99")
    print("norm: against float32's; cosine and largest step (in learning rates): 'of' float32's\n")
    rows = measured(options.steps, options.seed)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))


if __name__ == "__main__":
    main()
