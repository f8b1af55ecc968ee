"""Draw one step of Adam, stage by stage, with its numbers: for light pages and for dark ones.

Two weights get the same ten gradients, but for a factor of 1,000. Their updates are equal.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
from commandline import parser
from drawing import plt

import adam_jax

STAGES = {
    "scale_by_moments": adam_jax.scale_by_moments(b1=0.9, b2=0.999),
    "bias_correct": adam_jax.bias_correct(eps=1e-8),
    "scale_by_lr": adam_jax.scale_by_lr(1e-3),
}
FORMULAS = {
    "scale_by_moments": "$m = b_1 m + (1 - b_1)\\, g$\n$v = b_2 v + (1 - b_2)\\, g^2$",
    "bias_correct": "$\\hat m \\, / \\, (\\sqrt{\\hat v} + \\epsilon)$",
    "scale_by_lr": "$-\\alpha \\, u$",
}
STEPS = 10


def signals():
    """What stands between the stages at the last step: the gradient and what each stage emits."""
    noise = jax.random.normal(jax.random.key(1), (STEPS,))
    states = {name: stage.init(jnp.zeros(2)) for name, stage in STAGES.items()}
    for gradient in (1 + noise)[:, None] * jnp.array([1.0, 1e-3]):
        passed = [gradient]
        for name, stage in STAGES.items():
            signal, states[name] = stage.update(passed[-1], states[name])
            passed.append(signal)
    return passed


def digits(array) -> str:
    return "\n".join(f"{x:.3g}" for x in array.tolist()).replace("-0", "−0")


def draw(passed, path: Path, ink: str, box: str) -> None:
    """A box for each signal, an arrow for each stage. `ink` and `box` are colours."""
    gradient, moments, direction, update = passed
    boxes = {
        "gradient": {"g": gradient},
        "moments": {"m": moments.mu.value, "v": moments.nu.value},
        "direction": {"u": direction},
        "update": {"$\\Delta\\theta$": update},
    }
    places = {"gradient": (0.0, 1.1), "moments": (3.05, 2.25), "direction": (7.15, 1.1)}
    places["update"] = (10.2, 1.4)
    figure, axes = plt.subplots(figsize=(9.6, 2.1))
    axes.set(xlim=(-0.1, 11.7), ylim=(-0.1, 2.5))
    axes.axis("off")
    text = {"color": ink, "ha": "center", "va": "center"}
    for name, (x, width) in places.items():
        shape = matplotlib.patches.FancyBboxPatch(
            (x, 0.35), width, 1.35, boxstyle="round,pad=0,rounding_size=0.1", fc=box, ec=ink, lw=0.8
        )
        axes.add_patch(shape)
        axes.text(x + width / 2, 1.9, name, fontsize=11, weight="bold", **text)
        step = width / len(boxes[name])
        for place, (symbol, values) in enumerate(boxes[name].items()):
            middle = x + step * (place + 0.5)
            axes.text(middle, 1.47, symbol, fontsize=11, style="italic", **text)
            axes.text(middle, 0.83, digits(values), fontsize=11, linespacing=1.7, **text)
    for (name, formula), (x, width), (to, _) in zip(
        FORMULAS.items(), places.values(), list(places.values())[1:], strict=False
    ):
        start, middle = x + width, (x + width + to) / 2
        axes.annotate(
            "", (to - 0.05, 1.05), (start + 0.05, 1.05),
            arrowprops={"arrowstyle": "-|>", "color": ink, "lw": 1.2},
        )  # fmt: skip
        axes.text(middle, 1.4 if "\n" not in formula else 1.45, formula, fontsize=10, **text)
        axes.text(middle, 0.72, name, fontsize=8.5, family="monospace", **text)
    axes.text(0.0, 0.05, f"step {STEPS}; first weight above, second below", fontsize=8.5,
              color=ink, ha="left", va="center")  # fmt: skip
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    where = parser(__doc__, directory=".").parse_args().directory
    passed = signals()
    for signal in passed:
        print(signal if isinstance(signal, jax.Array) else (signal.mu.value, signal.nu.value))
    plt.rcParams["svg.hashsalt"] = "adam_jax"  # the same file for the same picture
    draw(passed, where / "pipeline.svg", ink="#1f2328", box="#eef4fb")
    draw(passed, where / "pipeline-dark.svg", ink="#e6edf3", box="#1c2836")


if __name__ == "__main__":
    main()
