"""What the pictures of the examples have in common: colours, means, and how they are saved."""

from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# One colour for one optimizer in every picture (Okabe and Ito's, told apart by the colour-blind).
COLORS = {
    "SGD": "black",
    "Momentum": "#e69f00",
    "Nesterov": "#009e73",
    "AdaGrad": "#cc79a7",
    "RMSProp": "#56b4e9",
    "Adam": "#d55e00",
    "AMSGrad": "#0072b2",
}
OURS, THEIRS = "adam_jax", "optax"
# Where the two agree, the dashed line lies in the middle of the wide one.
STYLES = {
    OURS: {"color": COLORS["Adam"], "linewidth": 5, "alpha": 0.45},
    THEIRS: {"color": "black", "linewidth": 1, "linestyle": "--"},
}


def last_means(values, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps from the window's length on, and the mean of the window that ends at each."""
    means = np.convolve(np.asarray(values), np.full(window, 1 / window), "valid")
    return np.arange(window, len(values) + 1), means


def spread(heights: list[float], gap: float) -> list[float]:
    """The heights, moved up where needed so that each is at least `gap` above the one below."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    return moved


def save(figure: plt.Figure, path: Path) -> None:
    """As a PNG of 120 dpi and 256 colours, a third of the bytes."""
    figure.set_dpi(120)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, kmeans=1).save(path, optimize=True)
    plt.close(figure)
