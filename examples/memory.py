"""What each choice of storage and rounding costs: bytes, seconds and loss, in one table.

Every choice trains the same two networks from the same weights on the same batches: a character
transformer of a million parameters on the language reference that ships inside Python, and the
MNIST network of `mnist.py`. The bytes are those of a GPT-2 of 124 million parameters, counted
without making it; step time and temporary memory are measured on the transformer's optimizer
alone, widened to ten million parameters, all choices in turn.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import commandline
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformer
from digits import BATCH, shipped_digits
from drawing import plt, save
from flax import nnx
from mnist import Network, cross_entropy
from tqdm import tqdm

import adam_jax
from adam_jax import storage

# --- The choices ----------------------------------------------------------------------------------


class Choice(NamedTuple):
    name: str
    weights: str  # dtype of the weights
    moments: dict  # how adamw keeps its moments
    rounding: Callable[[], optax.GradientTransformation] | None = None

    def optimizer(self, learning_rate) -> optax.GradientTransformation:
        adamw = adam_jax.adamw(learning_rate, weight_decay=1e-2, **self.moments)
        return optax.chain(adamw, self.rounding()) if self.rounding else adamw


def both(how: storage.Storage) -> dict:
    return {"mu_storage": how, "nu_storage": how}


EIGHT_FACTORED = {"mu_storage": storage.int8(), "nu_storage": storage.factored()}
EIGHT_MINI = {"mu_storage": storage.int8(), "nu_storage": storage.block_mean()}

CHOICES = [
    Choice("float32", "float32", {}),
    Choice("bfloat16, to nearest", "float32", both(storage.cast(jnp.bfloat16))),
    Choice("bfloat16, at random", "float32", both(storage.stochastic(jnp.bfloat16))),
    Choice("8-bit", "float32", both(storage.int8())),
    Choice("4-bit", "float32", both(storage.int4())),
    Choice("8-bit m, factored v", "float32", EIGHT_FACTORED),
    Choice("8-bit m, block-mean v", "float32", EIGHT_MINI),
    Choice("float32, no rounding stage", "bfloat16", {}),
    Choice("float32, round_stochastically", "bfloat16", {}, adam_jax.round_stochastically),
    Choice("float32, compensate bfloat16", "bfloat16", {}, adam_jax.compensate),
    Choice("8-bit, compensate int8", "bfloat16", both(storage.int8()),
           partial(adam_jax.compensate, "int8")),
    Choice("8-bit m, factored v, compensate int8", "bfloat16", EIGHT_FACTORED,
           partial(adam_jax.compensate, "int8")),
]  # fmt: skip


# --- Bytes ----------------------------------------------------------------------------------------


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> dict:
    """The shapes of GPT-2 small: 124,439,808 parameters in 148 leaves."""
    shape = lambda *lengths: jax.ShapeDtypeStruct(lengths, jnp.float32)  # noqa: E731
    norm = lambda: {"scale": shape(width), "bias": shape(width)}  # noqa: E731
    dense = lambda n, m: {"kernel": shape(n, m), "bias": shape(m)}  # noqa: E731
    block = lambda: {  # noqa: E731
        "ln_1": norm(),
        "attn": {"c_attn": dense(width, 3 * width), "c_proj": dense(width, width)},
        "ln_2": norm(),
        "mlp": {"c_fc": dense(width, 4 * width), "c_proj": dense(4 * width, width)},
    }
    return {
        "wte": shape(vocabulary, width),
        "wpe": shape(context, width),
        "h": {str(layer): block() for layer in range(layers)},
        "ln_f": norm(),
    }


def in_dtype(dtype: str, shapes):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_per_parameter(choice: Choice) -> tuple[float, float]:
    """Of the state, and of weights, gradients and state."""
    weights = in_dtype(choice.weights, gpt2())
    state = jax.eval_shape(choice.optimizer(1e-3).init, weights)
    return nbytes(state) / size(weights), (2 * nbytes(weights) + nbytes(state)) / size(weights)


# --- Round trips ----------------------------------------------------------------------------------

STORAGES = {
    "cast(bfloat16)": storage.cast(jnp.bfloat16),
    "stochastic(bfloat16)": storage.stochastic(jnp.bfloat16),
    "int8()": storage.int8(),
    "int4()": storage.int4(),
    "factored()": storage.factored(),
    "block_mean()": storage.block_mean(),
}


def round_trip(how: storage.Storage, moment: str) -> tuple[float, float]:
    """What one save and load change: on the whole (root mean square), and at most.

    On gradients whose sizes differ by row, by column and by element, as those of a network do;
    the largest change is against the largest magnitude among 32 neighbours in a column.
    """
    rng = np.random.default_rng(0)
    shape = 512, 1024
    sizes = np.exp(rng.normal(size=(shape[0], 1)) + rng.normal(size=shape[1]))
    x = sizes * rng.normal(size=shape)
    x = (np.square(x) if moment == "nu" else x).astype(np.float32)
    leaf = storage.Leaf(moment, "kernel", shape, jnp.dtype("float32"), index=0)
    change = np.asarray(how.load(how.save(jnp.asarray(x), leaf), leaf), np.float64) - x
    blocks = -1, 32, shape[1]
    largest = np.abs(x.reshape(blocks)).max(axis=1, keepdims=True)
    typical = np.sqrt(np.mean(change**2) / np.mean(x.astype(np.float64) ** 2))
    return typical, np.max(np.abs(change.reshape(blocks)) / largest)


def round_trip_table() -> str:
    lines = ["| storage | m, typical | m, worst | v, typical | v, worst |", "|---|---|---|---|---|"]
    for name, how in STORAGES.items():
        mu = round_trip(how, "mu") if how.only is None else None
        cells = [f"{x:.2%}" for x in mu] if mu else ["", ""]
        cells += [f"{x:.2%}" for x in round_trip(how, "nu")]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- Seconds and temporaries ----------------------------------------------------------------------


TIMED = {"layers": 3, "width": 512, "vocabulary": 512, "context": 512}  # of GPT-2


def compiled_step(choice: Choice, weights):
    tx = choice.optimizer(1e-3)

    def step(weights, state, grads):
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    state = jax.eval_shape(tx.init, weights)
    return jax.jit(step, donate_argnums=(0, 1)).lower(weights, state, weights).compile()


def measure_steps(choices: list[Choice], repeats: int) -> dict[str, tuple[list[float], float]]:
    """Seconds of every repeat, and bytes of temporaries per parameter."""
    shapes, sides = gpt2(**TIMED), []
    for choice in tqdm(choices, "compiling", leave=False):
        weights = jax.tree.map(lambda s, c=choice: jnp.ones(s.shape, c.weights), shapes)
        grads = jax.tree.map(lambda w: 1e-3 * w, weights)
        step = compiled_step(choice, jax.eval_shape(lambda w=weights: w))
        state = choice.optimizer(1e-3).init(weights)
        temporaries = step.memory_analysis().temp_size_in_bytes / size(weights)
        sides.append((choice.name, step, [weights, state], grads, temporaries))
    seconds = {name: [] for name, *_ in sides}
    for repeat in tqdm(range(repeats + 1), "timing", leave=False):
        for name, step, carry, grads, _ in sides:
            start = time.perf_counter()
            carry[:] = jax.block_until_ready(step(*carry, grads))
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: (seconds[name], temporaries) for name, *_, temporaries in sides}


# --- Loss -----------------------------------------------------------------------------------------

CHARACTER_BATCH = 16


def characters(seed: int, steps: int):
    """The model, its batches, and a fixed sample of the last tenth of the text to test on."""
    alphabet, codes = transformer.language_reference()
    split, last = len(codes) * 9 // 10, transformer.CONTEXT + 1
    rng = np.random.default_rng(seed)
    batches = (
        transformer.next_characters(codes, rng.integers(0, split - last, CHARACTER_BATCH))
        for _ in range(steps)
    )
    fixed = np.random.default_rng(0).integers(split, len(codes) - last, 256)
    test = transformer.next_characters(codes, fixed)
    return transformer.Transformer(alphabet, nnx.Rngs(seed)), batches, test


read_digits = cache(shipped_digits)


def digits(seed: int, steps: int):
    """The network of `mnist.py`, its batches, and the digits to test on."""
    data = read_digits()
    rng = np.random.default_rng(seed)
    batches = (
        (data.train_images[batch], data.train_labels[batch])
        for batch in (rng.integers(0, len(data.train_labels), BATCH) for _ in range(steps))
    )
    test = data.test_images, data.test_labels
    return Network(data.train_images[0].size, nnx.Rngs(seed)), batches, test


TASKS = {"transformer": (characters, 1e-3), "mnist": (digits, 1e-3)}


def final_loss(task: str, choice: Choice, seed: int, steps: int) -> float:
    """The loss on the test set after training."""
    make, peak = TASKS[task]
    model, batches, test = make(seed, steps)
    graph, weights = nnx.split(model)
    weights = jax.tree.map(lambda w: w.astype(choice.weights), weights)
    tx = choice.optimizer(optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps))
    state = jax.jit(tx.init)(weights)

    def loss(weights, inputs, targets):
        wide = jax.tree.map(lambda w: w.astype(jnp.float32), weights)  # only what is kept is narrow
        return cross_entropy(nnx.merge(graph, wide)(inputs), targets)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, state, inputs, targets):
        grads = jax.grad(loss)(weights, inputs, targets)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    for inputs, targets in tqdm(batches, f"{task}, {choice.name}, seed {seed}", steps, leave=False):
        weights, state = step(weights, state, inputs, targets)
    return float(jax.jit(loss)(weights, *test))


# --- Table, picture and command line --------------------------------------------------------------


class Row(NamedTuple):
    name: str
    weights: str
    state: float  # bytes per parameter
    total: float  # likewise, of weights, gradients and state
    temporaries: float  # likewise, of one step with donation
    seconds: list[float]  # of one step
    losses: dict[str, list[float]]  # by task, one per seed


def measured(seeds: int, steps: int, repeats: int) -> list[Row]:
    timed = measure_steps(CHOICES, repeats)
    rows = []
    for choice in tqdm(CHOICES, "training", leave=False):
        seconds, temporaries = timed[choice.name]
        losses = {
            task: [final_loss(task, choice, seed, steps) for seed in range(seeds)] for task in TASKS
        }
        state, total = bytes_per_parameter(choice)
        rows.append(Row(choice.name, choice.weights, state, total, temporaries, seconds, losses))
    return rows


def excess(row: Row, base: Row, task: str) -> float:
    """How much larger the loss is than the base's, seed by seed, as a fraction."""
    pairs = zip(row.losses[task], base.losses[task], strict=True)
    return statistics.mean(ours / theirs - 1 for ours, theirs in pairs)


def spread(row: Row, base: Row, task: str) -> float:
    pairs = zip(row.losses[task], base.losses[task], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    return max(ratios) - min(ratios)


def table(rows: list[Row]) -> str:
    base = rows[0]
    lines = [
        "| moments, rounding | weights | state | in all | temporaries | step "
        "| transformer loss | MNIST loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [ours / theirs for ours, theirs in zip(row.seconds, base.seconds, strict=True)]
        tasks = " | ".join(
            f"{statistics.mean(row.losses[task]):.4f} ({excess(row, base, task):+.1%}"
            f" ± {spread(row, base, task) / 2:.1%})"
            for task in TASKS
        )
        lines.append(
            f"| {row.name} | {row.weights} | {row.state:.2f} | {row.total:.2f} "
            f"| {row.temporaries:.2f} | {statistics.median(ratios):.2f} × | {tasks} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    labels = Counter()  # in each place, so that they stand above each other
    for row in rows:
        y = 100 * excess(row, rows[0], "transformer")
        half = 50 * spread(row, rows[0], "transformer")
        color = "tab:blue" if row.weights == "float32" else "tab:orange"
        axes.errorbar(row.total, y, yerr=half, fmt="o", color=color, capsize=3)
        place = round(row.total), round(y)
        labels[place] += 1
        offset = 6, 12 * labels[place] - 6
        axes.annotate(row.name, (row.total, y), offset, textcoords="offset points", fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhline(1, color="tab:red", linewidth=0.8, linestyle="--", label="1 % worse")
    axes.plot([], [], "o", color="tab:blue", label="float32 weights")
    axes.plot([], [], "o", color="tab:orange", label="bfloat16 weights")
    axes.set(
        title="AdamW: memory and what it costs",
        xlabel="bytes per parameter: weights, gradients and state (GPT-2, 124 M)",
        ylabel="loss of the character transformer against float32, %",
        xlim=(5, 18.5),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def main() -> None:
    parser = commandline.parser(__doc__, steps=400, seeds=3, plot="memory.png")
    parser.add_argument(
        "--repeats",
        type=commandline.positive,
        default=20,
        help="timed steps (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=commandline.new_file, help="where to write every figure (default: nowhere)"
    )
    options = parser.parse_args()
    print("One round trip through each storage: change on the whole, and at most\n")
    print(round_trip_table())
    choices = f"{len(CHOICES)} choices, {options.seeds} seeds, {options.steps} steps"
    print(f"\n{choices}; {commandline.hardware()}")
    rows = measured(options.seeds, options.steps, options.repeats)
    print(
        "state, in all (with weights and gradients), temporaries: bytes per parameter; step: time "
        "against float32;\nloss: mean, difference to float32, half its spread over the seeds\n"
    )
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    draw(rows, options.plot)
    print(f"\nmemory and loss: {options.plot}")


if __name__ == "__main__":
    main()
