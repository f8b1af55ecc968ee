"""SOAP and GaLore beside AdamW: one chain, run in the leaf's own basis, in the eigenvectors of its
gradients' second moments, and in the leading singular vectors of its gradient.

Each trains the character transformer of `transformer.py` from the same weights on the same batches.
Printed are the held-out loss, the steps that it takes to AdamW's last loss, and what the optimizer
keeps of a GPT-2 of 124 million parameters, counted without making it.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import transformer
from commandline import hardware, parser
from drawing import COLORS, plt, save, spread
from flax import nnx
from memory import gpt2
from tqdm import tqdm

import adam_jax
from adam_jax.basis import eigenvectors, singular_vectors

BATCH, EVERY = 16, 10  # the held-out loss is measured every so many steps
PEAK = {"AdamW": 2e-3, "SOAP": 2e-3, "GaLore": 8e-3}  # GaLore's update is scaled by 1/4


def chains(rate: Callable[[float], optax.Schedule]) -> dict[str, optax.GradientTransformation]:
    """The same AdamW in three bases; GaLore's decay stays outside, where it reaches all weights."""

    def adam(name, **decay):
        return adam_jax.adamw(rate(PEAK[name]), b1=0.95, b2=0.95, **{"weight_decay": 1e-2, **decay})

    return {
        "AdamW": adam("AdamW"),
        "SOAP": adam_jax.in_basis(eigenvectors(every=10, largest=1024), adam("SOAP")),
        "GaLore": optax.chain(
            adam_jax.in_basis(
                singular_vectors(rank=32, every=50),
                optax.chain(adam_jax.scale_by_moments(0.95, 0.95), adam_jax.bias_correct()),
            ),
            optax.scale(0.25),
            optax.add_decayed_weights(1e-2),
            adam_jax.scale_by_lr(rate(PEAK["GaLore"])),
        ),
    }


def warm_up_and_down(steps: int) -> Callable[[float], optax.Schedule]:
    warm_up = max(1, steps // 10)
    return lambda peak: optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, steps)


def train(tx: optax.GradientTransformation, seed: int, steps: int, bar: tqdm) -> list[float]:
    """The held-out loss every so many steps."""
    vocabulary, text = transformer.language_reference()
    split = len(text) * 9 // 10
    model = transformer.Transformer(vocabulary, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model, nnx.Param)
    held_out = np.random.default_rng(0).integers(split, len(text) - transformer.CONTEXT - 1, 64)
    held_out = transformer.next_characters(text, held_out)

    def loss(params, inputs, targets):
        outputs = nnx.merge(graph, params)(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    state, measure, losses = jax.jit(tx.init)(params), jax.jit(loss), []
    shuffle = np.random.default_rng(seed)
    for number in range(1, steps + 1):
        starts = shuffle.integers(0, split - transformer.CONTEXT - 1, BATCH)
        params, state = step(params, state, transformer.next_characters(text, starts))
        if number % EVERY == 0 or number == steps:
            losses.append(float(measure(params, *held_out)))
        bar.update()
    return losses


def bytes_kept(tx: optax.GradientTransformation) -> float:
    """Of the state, for each of GPT-2's parameters."""
    params = gpt2()
    state = jax.eval_shape(tx.init, params)
    count = sum(p.size for p in jax.tree.leaves(params))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / count


def steps_to(loss: float, losses: list[float]) -> str:
    reached = next((i for i, value in enumerate(losses) if value <= loss), None)
    return "not reached" if reached is None else str((reached + 1) * EVERY)


def draw(losses: dict[str, list[list[float]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    styles = {
        "AdamW": {"color": COLORS["Adam"]},
        "SOAP": {"color": "#0072b2", "linestyle": "--"},
        "GaLore": {"color": "black", "linestyle": ":"},
    }
    steps = EVERY * np.arange(1, len(losses["AdamW"][0]) + 1)
    for name, runs in losses.items():
        for run in runs:
            axes.plot(steps, run, linewidth=1.4, **styles[name])
    ends = [float(np.log(np.mean([run[-1] for run in runs]))) for runs in losses.values()]
    for name, end in zip(losses, spread(ends, gap=0.03), strict=True):
        axes.annotate(
            name, (steps[-1], np.exp(end)), (5, 0), textcoords="offset points", va="center",
            color=styles[name]["color"], annotation_clip=False,
        )  # fmt: skip
    axes.set(title="One chain in three bases", xlabel="step", ylabel="held-out loss", yscale="log")
    axes.set_yticks([2, 2.5, 3, 4], ["2", "2.5", "3", "4"])
    axes.minorticks_off()
    axes.set_xlim(0, steps[-1])
    axes.grid(alpha=0.3)
    save(figure, path)


def main() -> None:
    options = parser(__doc__, steps=200, seeds=3, plot="basis.png").parse_args()
    print(f"{options.steps} steps, {options.seeds} seeds, on {hardware()}")
    methods = chains(warm_up_and_down(options.steps))
    with tqdm(total=len(methods) * options.seeds * options.steps, unit="step") as bar:
        losses = {
            name: [train(tx, seed, options.steps, bar) for seed in range(options.seeds)]
            for name, tx in methods.items()
        }
    print("| basis | held-out loss | steps to AdamW's last loss, by seed | bytes of state |")
    print("|---|---|---|---|")
    for name, runs in losses.items():
        last = [run[-1] for run in runs]
        steps = ", ".join(
            steps_to(due[-1], run) for due, run in zip(losses["AdamW"], runs, strict=True)
        )
        print(
            f"| {name} | {np.mean(last):.3f} ({min(last):.3f}–{max(last):.3f}) | {steps} | "
            f"{bytes_kept(methods[name]):.2f} |"
        )
    draw(losses, options.plot)
    print(f"held-out loss by step: {options.plot}")


if __name__ == "__main__":
    main()
