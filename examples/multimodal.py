"""An image and a text encoder trained together, with settings of their own by `optax.partition`.

Handwritten digits and their names in English, Chinese and German, spelled by characters, are
mapped to one space, where an image lies close to the names of its digit (CLIP, Radford et al.,
arXiv 2103.00020). Each part has a chain of its own: the image encoder its clipping and moments in
8 bits; the text encoder a higher rate and another b2; of its table of characters only the rows
that a batch reaches move; the temperature is not decayed. The same once more with a text encoder
that is frozen at first, and beside both, from the same weights and on the same batches, one
setting for all. Measured is retrieval on digits that were held out.
"""

import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from commandline import hardware, parser
from digits import Data, shipped_digits
from drawing import COLORS, last_means, plt, save
from flax import nnx
from tqdm import tqdm

import adam_jax
from adam_jax import storage

ONE, OWN, FROZEN = "one for all", "per modality", "per modality, text frozen first"


def labels(params):
    """Which chain a weight belongs to: the table of characters is apart from its encoder."""

    def label(path, _):
        table = jax.tree_util.keystr(path[:2]) == "['text']['characters']"
        return "characters" if table else path[0].key

    return jax.tree.map_with_path(label, params)


def frozen_steps(steps: int) -> int:
    return steps // 8


def one_for_all(steps: int) -> optax.GradientTransformation:
    # Of 1e-3, 3e-3 and 1e-2 the first is worse and the others are the same.
    rate = optax.cosine_decay_schedule(3e-3, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), adam_jax.adamw(rate, weight_decay=1e-2))


def per_modality(steps: int, frozen: int) -> optax.GradientTransformation:
    """A chain for each part; the text encoder keeps its weights for the first, frozen steps."""
    eight = {"mu_storage": storage.int8(), "nu_storage": storage.int8()}

    def rate(peak, start=0):
        falling = optax.cosine_decay_schedule(peak, steps - start)
        return optax.join_schedules([optax.constant_schedule(0.0), falling], [start])

    chains = {
        "image": optax.chain(
            optax.clip_by_global_norm(1.0),
            adam_jax.adamw(rate(3e-3), b2=0.99, weight_decay=1e-2, **eight),
        ),
        "text": adam_jax.adamw(rate(5e-3, frozen), b2=0.98, weight_decay=1e-2),
        "characters": adam_jax.lazy(adam_jax.adam(rate(2e-2, frozen))),
        "temperature": adam_jax.adam(rate(1e-2)),
    }
    return optax.partition(chains, labels)


def settings(steps: int) -> dict[str, optax.GradientTransformation]:
    return {
        ONE: one_for_all(steps),
        FROZEN: per_modality(steps, frozen_steps(steps)),
        OWN: per_modality(steps, 0),
    }


BATCH, WIDTH = 64, 64
STYLES = {
    ONE: {"color": "black", "linestyle": "--"},
    OWN: {"color": COLORS["Adam"]},
    FROZEN: {"color": "#56b4e9"},
}

# --- Data -----------------------------------------------------------------------------------------

# The names of the digits from 0 to 9, and what they are put in. (一个七, a seven, has a 1 in it.)
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
LANGUAGES = {
    "English": (ENGLISH, ("{}", "the {}", "number {}", "a written {}")),
    "Chinese": ("零一二三四五六七八九", ("{}", "数字{}", "一个{}", "这是{}")),
    "German": (GERMAN, ("{}", "eine {}", "die Ziffer {}", "das ist eine {}")),
}
PINYIN = ["líng", "yī", "èr", "sān", "sì", "wǔ", "liù", "qī", "bā", "jiǔ"]  # for the picture


def spelled() -> tuple[np.ndarray, int]:
    """Every text by its characters, and how many characters there are, padding included.

    The texts are int32 of shape (language, digit, template, length), padded with 0.
    """
    texts = [
        [[template.format(name) for template in templates] for name in names]
        for names, templates in LANGUAGES.values()
    ]
    every = [text for language in texts for digit in language for text in digit]
    numbers = {character: i for i, character in enumerate(sorted(set("".join(every))), 1)}
    codes = np.zeros((len(every), max(map(len, every))), np.int32)
    for row, text in zip(codes, every, strict=True):
        row[: len(text)] = [numbers[character] for character in text]
    return codes.reshape(*np.shape(texts), -1), 1 + len(numbers)


TEXTS, CHARACTERS = spelled()


def batches(data: Data, seed: int):
    """Images, and for each a text with the name of its digit, in any language and template."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data.train_labels))
        for chosen in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            labels = data.train_labels[chosen]
            language, template = (rng.integers(TEXTS.shape[axis], size=BATCH) for axis in (0, 2))
            yield data.train_images[chosen], TEXTS[language, labels, template], labels


# --- Model ----------------------------------------------------------------------------------------


class Image(nnx.Module):
    """Pixels, dense 128 with relu, dense."""

    def __init__(self, pixels: int, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(pixels, 128, rngs=rngs)
        self.output = nnx.Linear(128, WIDTH, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.output(nnx.relu(self.hidden(images.reshape(images.shape[0], -1))))


class Text(nnx.Module):
    """A table of characters, a convolution over three neighbours with relu, their mean, dense."""

    def __init__(self, rngs: nnx.Rngs):
        self.characters = nnx.Embed(CHARACTERS, 32, rngs=rngs)
        self.hidden = nnx.Conv(32, 64, kernel_size=3, rngs=rngs)
        self.output = nnx.Linear(64, WIDTH, rngs=rngs)

    def __call__(self, texts: jax.Array) -> jax.Array:
        given = (texts > 0)[..., None]  # the others are padding
        neighbours = self.hidden(jnp.where(given, self.characters(texts), 0))
        return self.output(jnp.mean(nnx.relu(neighbours), axis=1, where=given))


class Pair(nnx.Module):
    """Both encoders, and the logarithm of what a cosine is multiplied with (the temperature)."""

    def __init__(self, pixels: int, rngs: nnx.Rngs):
        self.image = Image(pixels, rngs)
        self.text = Text(rngs)
        self.temperature = nnx.Param(jnp.float32(np.log(10)))


def cosines(a, b):
    """Of every row of a with every row of b, arrays of JAX or of NumPy."""
    unit = lambda x: x / (x**2).sum(axis=-1, keepdims=True) ** 0.5  # noqa: E731
    return unit(a) @ unit(b).T


def contrastive(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How far images and texts are from finding each other in a batch; 0 at best.

    The mean of the two Kullback-Leibler divergences, of images to texts and of texts to images. A
    batch holds a digit several times, so the mass of a row is shared among the pairs of its digit.
    """
    same = (labels[:, None] == labels[None, :]).astype(logits.dtype)
    targets = same / same.sum(axis=1, keepdims=True)
    rows = [optax.losses.kl_divergence(jax.nn.log_softmax(x), targets) for x in (logits, logits.T)]
    return jnp.mean(jnp.stack(rows))


# --- Training and retrieval -----------------------------------------------------------------------


@nnx.jit
def step(model: Pair, optimizer: nnx.Optimizer, images, texts, labels) -> jax.Array:
    def loss(model):
        similarities = cosines(model.image(images), model.text(texts))
        return contrastive(jnp.exp(model.temperature[...]) * similarities, labels)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


@nnx.jit
def encoded(model: Pair, images) -> tuple[jax.Array, jax.Array]:
    """Images, and the plain names of all languages one after the other."""
    return model.image(images), model.text(TEXTS[:, :, 0].reshape(-1, TEXTS.shape[-1]))


def retrieval(similarities: np.ndarray, labels: np.ndarray) -> list[float]:
    """Of images (rows) and names: accuracy in each language, and precision@10 of all names."""
    of_languages = np.split(similarities, len(LANGUAGES), axis=1)
    found = [float(np.mean(part.argmax(axis=1) == labels)) for part in of_languages]
    best = np.argsort(-similarities, axis=0)[:10]
    digits = np.arange(similarities.shape[1]) % 10
    return [*found, float(np.mean(labels[best] == digits))]


def state_bytes(optimizer: nnx.Optimizer) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.OptState)))


def train(tx: optax.GradientTransformation, data: Data, seed: int, steps: int, name: str):
    """The trained model, its optimizer and its losses."""
    model = Pair(data.train_images[0].size, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    bar = tqdm(
        itertools.islice(batches(data, seed), steps),
        f"{name}, seed {seed}",
        total=steps,
        unit="step",
        leave=False,
    )
    losses = [step(model, optimizer, *batch) for batch in bar]
    return model, optimizer, np.array(jax.device_get(losses))


def table(scores: dict[str, list], kilobytes: dict[str, float]) -> str:
    """The mean over the seeds, and the least and the largest, in percent."""
    lines = [
        f"| | {' | '.join(LANGUAGES)} | text → image, precision@10 | state, kB |",
        "|" + "---|" * (len(LANGUAGES) + 3),
    ]
    for name, of_seeds in scores.items():
        columns = 100 * np.array(of_seeds).T
        cells = [f"{c.mean():.1f} ({c.min():.1f}–{c.max():.1f})" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {kilobytes[name]:.0f} |")
    return "\n".join(lines)


# --- Picture and command line ---------------------------------------------------------------------


def draw(losses: dict[str, list], similarities: np.ndarray, path: Path) -> None:
    """Left the losses, the mean of the seeds; right how similar digits are to names, at last."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4), layout="constrained", width_ratios=(1, 1.6)
    )
    for name, of_seeds in losses.items():
        mean = np.mean(of_seeds, axis=0)
        window = max(1, len(mean) // 20)
        left.plot(*last_means(mean, window), label=name, **STYLES[name])
    left.axvline(frozen_steps(len(mean)), color="gray", linestyle=":", label="the text thaws")
    left.set(
        title=f"Training loss, mean of seeds and {window} steps", xlabel="step", ylabel="divergence"
    )
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    left.grid(alpha=0.3)
    left.legend(fontsize="small")
    names = [*ENGLISH, *PINYIN, *GERMAN]  # the picture's font has no Chinese
    shown = right.imshow(similarities, cmap="viridis", aspect="auto")
    right.set_xticks(np.arange(len(names)), names, rotation=90)
    right.set_yticks(np.arange(10))
    right.set(title="Cosine of a digit's held-out images (mean) and a name", ylabel="digit")
    figure.colorbar(shown)
    save(figure, path)


def main() -> None:
    options = parser(__doc__, steps=400, seeds=3, plot="multimodal.png").parse_args()
    data = shipped_digits()
    print(
        f"{len(data.train_labels)} digits and {TEXTS[..., 0].size} texts to train, "
        f"{len(data.test_labels)} digits held out; seeds 0 to {options.seeds - 1}"
    )
    start = time.perf_counter()
    losses, scores, kilobytes = {}, {}, {}
    for name, tx in settings(options.steps).items():
        losses[name], scores[name] = [], []
        for seed in range(options.seeds):
            model, optimizer, of_steps = train(tx, data, seed, options.steps, name)
            images, names = jax.device_get(encoded(model, data.test_images))
            losses[name].append(of_steps)
            scores[name].append(retrieval(cosines(images, names), data.test_labels))
        kilobytes[name] = state_bytes(optimizer) / 1000
    print(f"{options.steps} steps of each run, {time.perf_counter() - start:.0f} s, {hardware()}")
    print(table(scores, kilobytes))
    means = np.stack([images[data.test_labels == digit].mean(axis=0) for digit in range(10)])
    draw(losses, cosines(means, names), options.plot)
    print(f"losses, and how similar digits and names are: {options.plot}")


if __name__ == "__main__":
    main()
