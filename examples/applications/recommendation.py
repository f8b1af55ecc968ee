"""Recommend by matrix factorisation or a small NeuMF: a batch reaches few rows of the tables.

Shows `adam_jax.lazy`: rows of an embedding table without a gradient keep their weights and moments,
so weight decay, of another strength for each table, falls on a row when a rating reaches it. That
is the regulariser of matrix factorisation, a sum over the ratings. Beside it optax.adamw decays and
moves all rows at every step: another algorithm, so the metrics are compared and not the weights.

No ratings that may be shipped are at hand: these are made, with noise, from known factors of users
and items that depend on a group and a genre. --data-dir takes the MovieLens sets of
grouplens.org/datasets/movielens (of which it reads no groups and no genres).

factors: Koren, Bell and Volinsky (2009), rating = mean + biases + product of factors. Metric: RMSE
  on a tenth of the ratings. Baseline: the means of user and item.
neural: He et al. (2017), products of embeddings and a network. Metric: how often the one item that
  was left out for each user is among the best 10 of it and 99 others. Baseline: popularity.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import application
import jax
import jax.numpy as jnp
import numpy as np
import optax
import ratings
from drawing import COLORS, OURS, STYLES, THEIRS, plt, save
from flax import nnx

import adam_jax

PARTS = {
    "factors": ["user_factors", "item_factors"],
    "bias": ["user_bias", "item_bias"],
    "embedding": ["user_embedding", "item_embedding", "group_embedding", "genre_embedding"],
    "network": ["hidden", "last", "output"],
}
PART_OF = {name: part for part, names in PARTS.items() for name in names}


def optimizer(model: str, adamw: Callable, lazy: Callable) -> optax.GradientTransformation:
    """Lazy tables, each kind with its weight decay; of the network all rows have gradients."""
    if model == "factors":
        chains = {
            "factors": lazy(adamw(3e-3, weight_decay=0.8)),
            "bias": lazy(adamw(3e-3, weight_decay=0.1)),
        }
    else:
        chains = {
            "factors": lazy(adamw(1e-3, weight_decay=1.0)),
            "embedding": lazy(adamw(1e-3, weight_decay=1.0)),
            "network": adamw(1e-3, weight_decay=0.01),
        }
    part = lambda path, _: PART_OF[path[0].key]  # noqa: E731
    return optax.partition(chains, lambda params: jax.tree_util.tree_map_with_path(part, params))


WIDTH, BATCH, NEGATIVES, OTHERS, BEST = 16, 256, 4, 99, 10


# --- Models ---------------------------------------------------------------------------------------


def table(rows: int, width: int, rngs: nnx.Rngs, size: float = 0.1) -> nnx.Embed:
    return nnx.Embed(rows, width, embedding_init=nnx.initializers.normal(size), rngs=rngs)


class Factors(nnx.Module):
    """The mean, the biases of user and item, and the product of their factors."""

    def __init__(self, data: ratings.Ratings, mean: float, rngs: nnx.Rngs):
        users, items = len(data.groups), len(data.genres)
        self.mean = mean
        self.user_bias = table(users, 1, rngs, 0.0)
        self.item_bias = table(items, 1, rngs, 0.0)
        self.user_factors = table(users, WIDTH, rngs)
        self.item_factors = table(items, WIDTH, rngs)

    def __call__(self, users: jax.Array, items: jax.Array) -> jax.Array:
        product = jnp.sum(self.user_factors(users) * self.item_factors(items), axis=-1)
        biases = self.user_bias(users) + self.item_bias(items)
        return self.mean + biases[..., 0] + product


class Neural(nnx.Module):
    """NeuMF: a product of embeddings, and a network of others and the side features."""

    def __init__(self, data: ratings.Ratings, rngs: nnx.Rngs):
        users, items = len(data.groups), len(data.genres)
        self.groups, self.genres = (nnx.Variable(jnp.array(x)) for x in data[4:])
        self.user_factors = table(users, WIDTH, rngs)
        self.item_factors = table(items, WIDTH, rngs)
        self.user_embedding = table(users, WIDTH, rngs)
        self.item_embedding = table(items, WIDTH, rngs)
        self.group_embedding = table(ratings.KINDS, 8, rngs)
        self.genre_embedding = table(ratings.KINDS, 8, rngs)
        self.hidden = nnx.Linear(2 * WIDTH + 16, 32, rngs=rngs)
        self.last = nnx.Linear(32, WIDTH, rngs=rngs)
        self.output = nnx.Linear(2 * WIDTH, 1, rngs=rngs)

    def __call__(self, users: jax.Array, items: jax.Array) -> jax.Array:
        users, items = jnp.broadcast_arrays(users, items)
        product = self.user_factors(users) * self.item_factors(items)
        x = [
            self.user_embedding(users),
            self.item_embedding(items),
            self.group_embedding(self.groups[users]),
            self.genre_embedding(self.genres[items]),
        ]
        x = nnx.relu(self.last(nnx.relu(self.hidden(jnp.concatenate(x, axis=-1)))))
        return self.output(jnp.concatenate([product, x], axis=-1))[..., 0]


# --- Two tasks ------------------------------------------------------------------------------------


class Task(NamedTuple):
    """What is learned, and for every case that was held out how good a prediction is."""

    model: nnx.Module
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    batches: Iterable[tuple[np.ndarray, ...]]  # users, items, and their ratings or labels
    values: Callable[[nnx.Module], np.ndarray]  # of every case
    metric: Callable[[np.ndarray], float]  # of the values of some cases
    better: Callable[..., float]  # max or min
    names: tuple[str, str, str]  # of loss, metric and baseline
    baseline: np.ndarray  # its value of every case
    counts: np.ndarray  # how many ratings the item of every case has


def factors(data: ratings.Ratings, seed: int) -> Task:
    """Predict the ratings that were held out."""
    order = np.random.default_rng(seed).permutation(len(data.ratings))
    held_out, train = np.split(order, [len(order) // 10])
    users, items, due = (array[held_out] for array in data[:3])
    known = ratings.Ratings(*(array[train] for array in data[:4]), *data[4:])
    mean, of_user, of_item = ratings.means(known)
    return Task(
        model=Factors(data, mean, nnx.Rngs(seed)),
        loss=lambda outputs, due: jnp.mean((outputs - due) ** 2),
        batches=application.batches(seed, BATCH, *known[:3]),
        values=lambda model: np.asarray((predicted(model, users, items) - due) ** 2),
        metric=lambda values: float(np.sqrt(np.mean(values))),
        better=min,
        names=("squared error", "RMSE of held-out ratings", "user and item means"),
        baseline=(mean + of_user[users] + of_item[items] - due) ** 2,
        counts=np.bincount(known.items, minlength=len(data.genres))[items],
    )


def neural(data: ratings.Ratings, seed: int) -> Task:
    """Find the item that was left out for each user, their last, among others."""
    rng = np.random.default_rng(seed)
    ordered = np.lexsort((data.order, data.users))
    held_out = ordered[np.append(np.diff(data.users[ordered]) > 0, True)]
    asked, answers = data.users[held_out], data.items[held_out]
    items = len(data.genres)
    candidates = np.c_[answers, ratings.not_rated(rng, asked, OTHERS, ratings.rated(data), items)]
    known = ratings.Ratings(*(np.delete(array, held_out) for array in data[:4]), *data[4:])
    counts = np.bincount(known.items, minlength=items)

    def batches():
        labels = np.eye(1, 1 + NEGATIVES, dtype=np.float32).repeat(BATCH, axis=0)
        pairs = ratings.rated(known)  # so that answers are not missing among the negatives
        for users, liked in application.batches(seed, BATCH, known.users, known.items):
            negatives = ratings.not_rated(rng, users, NEGATIVES, pairs, items)
            yield users[:, None], np.c_[liked, negatives], labels

    return Task(
        model=Neural(data, nnx.Rngs(seed)),
        loss=lambda outputs, labels: optax.sigmoid_binary_cross_entropy(outputs, labels).mean(),
        batches=batches(),
        values=lambda model: ratings.hits(predicted(model, asked[:, None], candidates), BEST),
        metric=lambda values: float(np.mean(values)),
        better=max,
        names=("cross-entropy", f"hit rate@{BEST} among {1 + OTHERS}", "popularity"),
        baseline=ratings.hits(counts[candidates], BEST),
        counts=counts[answers],
    )


# --- Training, picture and command line -----------------------------------------------------------


@nnx.jit
def predicted(model, users, items):
    return model(users, items)


def train(task: Task, model: str, steps: int, alone: bool) -> tuple[dict, dict, dict]:
    """Of each run the losses, the metric by step, and its value of every case held out."""

    @nnx.jit
    def step(model, optimizer, users, items, due):
        loss = lambda model: task.loss(model(users, items), due)  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    chains = {OURS: optimizer(model, adam_jax.adamw, adam_jax.lazy)}
    if not alone:
        chains[THEIRS] = optimizer(model, optax.adamw, lambda tx: tx)
    runs = {}
    for name, tx in chains.items():
        copy = nnx.clone(task.model)
        runs[name] = copy, nnx.Optimizer(copy, tx, wrt=nnx.Param)
    losses, metrics = {name: [] for name in runs}, {name: {} for name in runs}
    for number, batch in enumerate(application.progress(task.batches, steps, losses), 1):
        for name, (trained, its_optimizer) in runs.items():
            losses[name].append(step(trained, its_optimizer, *batch))
            if number % max(1, steps // 20) == 0:
                metrics[name][number] = task.metric(task.values(trained))
    return losses, metrics, {name: task.values(trained) for name, (trained, _) in runs.items()}


def draw(task: Task, losses: dict, metrics: dict, values: dict, path: Path) -> None:
    """The losses; the metric by step; at the end, where items have few ratings and many."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    loss, metric, baseline = task.names
    application.draw_losses(left, losses, loss)
    for name, by_step in metrics.items():
        middle.plot(by_step.keys(), by_step.values(), **STYLES[name])
    middle.axhline(task.metric(task.baseline), color="0.6", linestyle=":", label=baseline)
    middle.set(title=f"{metric} in training", xlabel="step")
    middle.grid(alpha=0.3)
    middle.legend()
    parts, highest = np.array_split(np.argsort(task.counts, kind="stable"), 4), 0.0
    colors = {OURS: COLORS["Adam"], THEIRS: "black", baseline: "#b8b8b8"}
    for number, (name, of_cases) in enumerate({**values, baseline: task.baseline}.items()):
        heights = [task.metric(of_cases[part]) for part in parts]
        places = np.arange(4) + 0.27 * number
        bars = right.bar(places, heights, 0.25, label=name, color=colors[name])
        right.bar_label(bars, fmt="%.2f", fontsize=7)
        highest = max(highest, *heights)
    ranges = [f"{task.counts[part].min()} to {task.counts[part].max()}" for part in parts]
    right.set_xticks(np.arange(4) + 0.135 * len(values), ranges)
    right.set_yticks(np.arange(0, highest + 0.01, 0.2))
    right.set(title="At the end", ylabel=metric)
    right.set(xlabel="ratings of the item, a quarter of the cases each", ylim=(0, 1.25 * highest))
    right.grid(alpha=0.3, axis="y")
    right.set_axisbelow(True)
    right.legend(ncols=3, loc="upper center", fontsize="small")
    save(figure, path)


def main() -> None:
    made = application.parser(__doc__, steps=3_000, plot="recommendation-MODEL.png")
    made.add_argument("--model", choices=TASKS, default="factors", help="(default: %(default)s)")
    made.add_argument("--data-dir", type=Path, help="a directory with a MovieLens set")
    options = made.parse_args()
    try:
        directory = options.data_dir
        data = ratings.movielens(directory) if directory else ratings.made(options.seed)
    except ratings.DataError as error:
        made.exit(2, f"{made.prog}: {error}\n")
    source = directory or "made from known factors"
    print(f"{len(data.ratings)} ratings of {len(data.groups)} users: {source}")
    task = TASKS[options.model](data, options.seed)
    losses, metrics, values = train(task, options.model, options.steps, options.alone)
    _, metric, baseline = task.names
    for name, of_cases in values.items():
        found, due = task.metric(of_cases), task.metric(task.baseline)
        application.report(f"{name}: {metric}", found, baseline, due, task.better)
    plot = options.plot.with_name(options.plot.name.replace("MODEL", options.model))
    draw(task, losses, metrics, values, plot)
    print(f"losses, and {metric} for rare and frequent items: {plot}")


TASKS = {"factors": factors, "neural": neural}

if __name__ == "__main__":
    main()
