"""bfloat16 weights, moments of 8 bits, and a last stage that keeps what rounding takes.

A GPT or a BERT, both small and of characters, reads the language reference inside Python. Weights,
moments and what rounding took from the weights (`adam_jax.compensate`) fill 5.2 bytes a parameter.
Beside it optax.adamw trains the same network on the same batches in float32, with 12 bytes.

The last tenth of the text is held out. GPT predicts the next character, BERT fills in every third
one. Both have to beat a trigram model of the same text.
"""

from collections.abc import Iterable
from functools import partial

import application
import characters
import jax
import jax.numpy as jnp
import numpy as np
import optax
from application import batches, report
from drawing import OURS, STYLES, THEIRS, plt, save
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view as windows

import adam_jax
from adam_jax import storage

LEARNING_RATE = 6e-3


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    """AdamW in 8 bits for weights in bfloat16, and optax's for weights in float32."""
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)
    ours = optax.chain(
        adam_jax.scale_by_moments(b2=0.99, mu_storage=storage.int8(), nu_storage=storage.int8()),
        adam_jax.bias_correct(),
        optax.add_decayed_weights(0.01),
        adam_jax.scale_by_lr(rate),
        adam_jax.compensate("int8"),  # keeps what rounding takes from the weights
    )
    return {OURS: ours, THEIRS: optax.adamw(rate, b2=0.99, weight_decay=0.01)}


BATCH, CONTEXT, NEAR, WIDTH, HEADS, LAYERS = 16, 64, 5, 96, 4, 2

# --- Model ----------------------------------------------------------------------------------------

# Weights are kept in bfloat16 and widened where they are used: so only what is kept is rounded, and
# a CPU that has no instructions for bfloat16 is not slowed down.
KEPT = {"dtype": jnp.float32, "param_dtype": jnp.bfloat16}


class Block(nnx.Module):
    def __init__(self, causal: bool, rngs: nnx.Rngs):
        norm = partial(nnx.LayerNorm, WIDTH, rngs=rngs, **KEPT)
        dense = partial(nnx.Linear, rngs=rngs, **KEPT)
        self.causal = causal
        self.before_attention, self.before_mlp = norm(), norm()
        self.query_key_value, self.mixed = dense(WIDTH, 3 * WIDTH), dense(WIDTH, WIDTH)
        self.up, self.down = dense(WIDTH, 4 * WIDTH), dense(4 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = *x.shape[:2], HEADS, WIDTH // HEADS
        parts = jnp.split(self.query_key_value(self.before_attention(x)), 3, axis=-1)
        query, key, value = (part.reshape(heads) for part in parts)
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.mixed(seen.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.before_mlp(x))))


class Transformer(nnx.Module):
    """GPT if causal: each character sees those before it; else BERT: it sees all.

    Both were made for pieces of words. Here a linear map makes a piece of five characters: the last
    ones, or those on either side.
    """

    def __init__(self, symbols: int, causal: bool, rngs: nnx.Rngs):
        embed = partial(nnx.Embed, features=WIDTH, rngs=rngs, **KEPT)
        normal = nnx.initializers.normal
        before = NEAR - 1 if causal else NEAR // 2
        self.edges = (0, 0), (before, NEAR - 1 - before), (0, 0)
        self.characters = embed(symbols, embedding_init=normal(1.0))
        self.piece = nnx.Linear(NEAR * WIDTH, WIDTH, rngs=rngs, **KEPT)
        self.positions = embed(CONTEXT, embedding_init=normal(0.1))
        self.blocks = nnx.Sequential(*(Block(causal, rngs) for _ in range(LAYERS)))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs, **KEPT)
        self.output = nnx.Linear(WIDTH, symbols, rngs=rngs, **KEPT)

    def __call__(self, text: jax.Array) -> jax.Array:
        length = text.shape[1]
        padded = jnp.pad(self.characters(text), self.edges)
        near = jnp.concatenate([padded[:, i : i + length] for i in range(NEAR)], axis=-1)
        x = self.piece(near) + self.positions(jnp.arange(length))[None]
        return self.output(self.norm(self.blocks(x)))


def bits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """What each right answer costs; 0 where nothing is asked."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, nats, 0.0) / np.float32(np.log(2))


# --- The step and the loop ------------------------------------------------------------------------


def make_runs(model: Transformer, steps: int) -> dict[str, tuple[Transformer, nnx.Optimizer]]:
    """The model with our chain, and in float32 with optax's optimizer."""
    graph, weights = nnx.split(model)
    wide = nnx.merge(graph, jax.tree.map(lambda weight: weight.astype(jnp.float32), weights))
    runs = {}
    for own, (name, tx) in zip((model, wide), optimizers(steps).items(), strict=True):
        made = nnx.jit(partial(nnx.Optimizer, tx=tx, wrt=nnx.Param))  # else compiled leaf by leaf
        runs[name] = own, made(own)
    return runs


@nnx.jit
def step(model: Transformer, optimizer: nnx.Optimizer, text, targets) -> jax.Array:
    def loss(model):
        return jnp.sum(bits(model(text), targets)) / jnp.sum(targets >= 0)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def train(runs: dict[str, tuple], data: Iterable[tuple], steps: int) -> dict[str, list]:
    """Model and optimizer of each run change in place; the losses are returned."""
    losses = {name: [] for name in runs}
    for batch in application.progress(data, steps, losses):
        for name, run in runs.items():
            losses[name].append(step(*run, *batch))
    return losses


# --- Held-out text --------------------------------------------------------------------------------


@nnx.jit
def answers(model: Transformer, text, targets) -> tuple[jax.Array, jax.Array]:
    """The most probable characters, and what the right ones cost."""
    logits = model(text)
    return jnp.argmax(logits, axis=-1), bits(logits, targets)


@nnx.jit
def continued(model: Transformer, text: jax.Array, keys: jax.Array) -> jax.Array:
    """What GPT writes after the text; the probable characters more often than it expects them."""

    def follow(text, key):
        drawn = jax.random.categorical(key, model(text[None])[0, -1] / 0.6).astype(text.dtype)
        return jnp.append(text[1:], drawn), drawn

    return jax.lax.scan(follow, text, keys)[1]


def nbytes(module: nnx.Module) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(module)))


# --- Picture and command line ---------------------------------------------------------------------


def draw_context(axes: plt.Axes, costs: dict[str, np.ndarray], of_trigram: float) -> None:
    """Bits of a character against how many before it were seen."""
    lows = [2**power for power in range(CONTEXT.bit_length() - 1)]
    names = ["1", *(f"{low}–{2 * low - 1}" for low in lows[1:])]
    for name, values in costs.items():
        means = [values[:, low - 1 : 2 * low - 1].mean() for low in lows]
        axes.plot(names, means, label=name, **STYLES[name])
    axes.axhline(of_trigram, color="#0072b2", linestyle=":", label="a trigram model")
    axes.set_title("Held-out text: what it is worth to have seen more of it")
    axes.set(xlabel="characters seen before", ylabel="bits per character")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_filled(axes: plt.Axes, filled: np.ndarray, right: np.ndarray, hidden: np.ndarray) -> None:
    """Lines of text; what was hidden stands in grey if filled in rightly, else in black."""
    wrong = filled != right
    shade = np.stack([0.2 * hidden + 0.8 * wrong, np.zeros(wrong.shape)], axis=1)
    axes.imshow(shade.reshape(-1, right.shape[1]), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.set_title("Held-out text: filled in rightly (grey), wrongly (black; below: the right one)")
    axes.axis("off")
    font = {"family": "monospace", "ha": "center", "va": "center"}
    for row, column in np.ndindex(right.shape):
        color = "white" if wrong[row, column] else "black"
        axes.text(column, 2 * row, filled[row, column], color=color, **font)
        if wrong[row, column]:
            axes.text(column, 2 * row + 1, right[row, column], **font)


def main() -> None:
    made = application.parser(__doc__, steps=800, plot="language-MODEL.png")
    made.add_argument(
        "--model", choices=("gpt", "bert"), default="gpt", help="default: %(default)s"
    )
    options = made.parse_args()
    plot = options.plot.with_name(options.plot.name.replace("MODEL", options.model))

    text = characters.paragraphs()
    alphabet = np.array([*sorted(set(text)), characters.MASK])
    codes = {character: code for code, character in enumerate(alphabet.tolist())}
    coded = np.array([codes[character] for character in text], np.int32)
    learned, held_out = np.split(coded, [len(coded) * 9 // 10])

    causal, rng = options.model == "gpt", np.random.default_rng(options.seed)
    hide = partial(characters.masked, mask=codes[characters.MASK], rng=rng)
    ask = characters.next_characters if causal else hide
    length = CONTEXT + causal
    asked, right = ask(windows(held_out, length)[::CONTEXT])
    data = (ask(pieces) for (pieces,) in batches(options.seed, BATCH, windows(learned, length)))

    model = nnx.jit(partial(Transformer, len(alphabet), causal))(nnx.Rngs(options.seed))
    runs = make_runs(model, options.steps)
    for name, (model, optimizer) in runs.items():
        print(f"{name}: {nbytes(model):,} bytes of weights, {nbytes(optimizer):,} of state")
    runs = {OURS: runs[OURS]} if options.alone else runs
    losses = train(runs, data, options.steps)

    ratios = (1, 1) if causal else (1, 2)
    figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained", width_ratios=ratios)
    application.draw_losses(axes[0], losses, "bits per character")
    found = {name: answers(model, asked, right) for name, (model, _) in runs.items()}
    baseline = characters.trigram(learned, len(alphabet))
    if causal:
        of_trigram = characters.trigram_bits(baseline, held_out)
        costs = {name: np.asarray(cost) for name, (_, cost) in found.items()}
        for name, cost in costs.items():
            report(f"{name}: bits per character", cost.mean(), "a trigram model", of_trigram, min)
        draw_context(axes[1], costs, of_trigram)
        keys = jax.random.split(jax.random.key(options.seed), 300)
        written = np.asarray(continued(runs[OURS][0], held_out[:CONTEXT], keys))
        print(f"\nAfter\n\n{''.join(alphabet[held_out[:CONTEXT]])}\n\nit writes\n")
        print("".join(alphabet[written]))
    else:
        of_trigram, hidden = characters.trigram_accuracy(baseline, held_out), right >= 0
        for name, (guess, _) in found.items():
            accuracy = np.mean(np.asarray(guess)[hidden] == right[hidden])
            report(f"{name}: filled in rightly", accuracy, "a trigram model", of_trigram)
        lines = slice(0, None, len(right) // 4)
        truth = np.where(hidden, right, asked)
        filled = np.where(hidden, found[OURS][0], asked)
        shown = np.where(alphabet == "\n", "↵", alphabet)
        draw_filled(axes[1], shown[filled[lines]], shown[truth[lines]], hidden[lines])
    save(figure, plot)
    print(f"losses and held-out text: {plot}")


if __name__ == "__main__":
    main()
