"""The recommendation program run small, and its parts: data, baselines, hits, negatives."""

import sys

import jax
import numpy as np
import pytest
import ratings
import recommendation
from flax import nnx

import adam_jax


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["recommendation.py", *map(str, arguments)])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        recommendation.main()


@pytest.fixture
def small(monkeypatch):
    """A tenth of the data."""
    for name, value in {"USERS": 100, "ITEMS": 150, "RATINGS": 4_000}.items():
        monkeypatch.setattr(ratings, name, value)


@pytest.mark.parametrize(
    ("model", "baseline"), [("factors", "user and item means"), ("neural", "popularity")]
)
def test_runs(model, baseline, small, tmp_path, monkeypatch, capsys):
    """Both runs are reported beside the baseline, the loss falls, and there is a picture."""
    losses, draw = {}, recommendation.draw
    monkeypatch.setattr(
        recommendation,
        "draw",
        lambda task, of_runs, *rest: losses.update(of_runs) or draw(task, of_runs, *rest),
    )
    monkeypatch.chdir(tmp_path)
    main(monkeypatch, "--model", model, "--steps", 40)
    printed = capsys.readouterr().out
    assert "4000 ratings of 100 users: made from known factors" in printed
    for name in ("adam_jax", "optax"):
        assert np.mean(losses[name][-5:]) < losses[name][0]
        assert any(
            line.startswith(f"{name}: ") and line.endswith(f"of {baseline}")
            for line in printed.splitlines()
        )
    assert (tmp_path / f"recommendation-{model}.png").read_bytes().startswith(b"\x89PNG")


def test_a_batch_changes_its_rows_alone(small):
    """Of the tables; of the network all rows."""
    data = ratings.made(0)
    task = recommendation.neural(data, 0)
    tx = recommendation.optimizer("neural", adam_jax.adamw, adam_jax.lazy)
    graph, params, rest = nnx.split(task.model, nnx.Param, ...)
    users, items, labels = next(iter(task.batches))
    users, items, labels = users[:3], items[:3], labels[:3]

    @jax.jit
    def update(params):
        def loss(params):
            return task.loss(nnx.merge(graph, params, rest)(users, items), labels)

        return tx.update(jax.grad(loss)(params), tx.init(params), params)[0]

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates = jax.tree.map(np.asarray, update(params))
    changed = lambda name: set(np.flatnonzero(np.any(updates[name]["embedding"][...], axis=1)))  # noqa: E731
    for table in ("user_factors", "user_embedding"):
        assert changed(table) == set(users.ravel())
    for table in ("item_factors", "item_embedding"):
        assert changed(table) == set(items.ravel())
    assert np.all(np.any(updates["output"]["kernel"][...], axis=1))


def test_weight_decay_of_each_table(small, monkeypatch):
    """Of a step without gradients: 0.8 of the rate for factors, 0.1 of it for biases, none lazy."""
    task = recommendation.factors(ratings.made(0), 0)
    params = jax.tree.map(np.ones_like, nnx.state(task.model, nnx.Param))
    none = jax.tree.map(np.zeros_like, params)
    for lazy, rate in ((adam_jax.lazy, 0.0), (lambda tx: tx, 3e-3)):
        tx = recommendation.optimizer("factors", adam_jax.adamw, lazy)
        updates, _ = jax.jit(tx.update)(none, tx.init(params), params)
        for name, decay in {"user_factors": 0.8, "item_factors": 0.8, "user_bias": 0.1}.items():
            np.testing.assert_allclose(updates[name]["embedding"][...], -rate * decay, rtol=1e-6)


# --- Parts ----------------------------------------------------------------------------------------


def test_made(small):
    data = ratings.made(0)
    assert set(data.ratings) == {1, 2, 3, 4, 5}
    assert len(np.unique(ratings.rated(data))) == 4_000
    assert data.users.max() + 1 == len(data.groups)
    assert data.items.max() + 1 == len(data.genres)
    again, other = ratings.made(0), ratings.made(1)
    assert np.array_equal(again.ratings, data.ratings)
    assert not np.array_equal(other.ratings, data.ratings)


def test_means():
    """Exact where ratings are a mean and an offset of each; 0 for an item without ratings."""
    users, items = np.divmod(np.arange(6), 3)
    values = np.array([[1.0, 2, 3], [3, 4, 5]], np.float32).ravel()
    data = ratings.Ratings(users, items, values, users, np.zeros(2), np.zeros(4))
    mean, of_user, of_item = ratings.means(data)
    assert mean == 3
    assert of_user.tolist() == [-1, 1]
    assert of_item.tolist() == [-1, 0, 1, 0]


def test_hits():
    """Ten of a hundred are the best; of equals half are taken to be better."""
    scores = np.zeros((4, 100))
    scores[0, 0] = 1  # the best
    scores[1, 1:10] = 1  # nine better, the others equal
    scores[2, 0], scores[2, 1:10] = 1, 2  # nine better
    scores[3, 0], scores[3, 1:11] = 1, 2  # ten better
    assert ratings.hits(scores, 10).tolist() == [True, False, True, False]


def test_not_rated():
    rng = np.random.default_rng(0)
    users, items = np.divmod(np.arange(20), 4)
    data = ratings.Ratings(users, items, users, users, np.zeros(6), np.zeros(5))
    chosen = ratings.not_rated(rng, np.array([0, 4]), 50, ratings.rated(data), 5)
    assert np.all(chosen == 4)  # all others are rated
    everything = ratings.not_rated(rng, np.array([5]), 500, ratings.rated(data), 5)
    assert set(everything.ravel()) == {0, 1, 2, 3, 4}


def test_the_answers_are_the_last_ratings_and_not_trained_on(small):
    data = ratings.made(0)
    task = recommendation.neural(data, 0)
    last = {}
    for i in np.argsort(data.order):
        last[data.users[i]] = data.items[i]
    answers = {user * len(data.genres) + item for user, item in last.items()}
    assert len(task.baseline) == len(answers) == len(data.groups)
    batches = iter(task.batches)
    negatives = set()
    for users, items, labels in (next(batches) for _ in range(30)):
        assert labels[:, 0].all()
        assert not labels[:, 1:].any()
        pairs = users.astype(int) * len(data.genres) + items
        assert answers.isdisjoint(pairs[:, 0])
        negatives |= set(pairs[:, 1:].ravel())
    assert not answers.isdisjoint(negatives)


# --- MovieLens ------------------------------------------------------------------------------------

LINES = [(1 + i % 40, 10 * (1 + i // 40), 1 + i % 5, 1000 + i) for i in range(1_000)]
FORMATS = {
    "u.data": ("", "\t"),
    "ratings.dat": ("", "::"),
    "ratings.csv": ("userId,movieId,rating,timestamp\n", ","),
}


def write(directory, name):
    head, between = FORMATS[name]
    text = head + "\n".join(between.join(map(str, line)) for line in LINES) + "\n"
    (directory / name).write_text(text)
    return directory / name


@pytest.mark.parametrize("name", FORMATS)
def test_movielens(name, tmp_path):
    write(tmp_path, name)
    data = ratings.movielens(tmp_path)
    assert (len(data.groups), len(data.genres)) == (40, 25)
    users, items, values, times = zip(*LINES, strict=True)
    assert np.array_equal(data.users, np.array(users) - 1)
    assert np.array_equal(data.items, np.array(items) // 10 - 1)
    assert np.array_equal(data.ratings, values)
    assert np.array_equal(data.order, times)


PROBLEMS = {
    "no directory": "There is no directory",
    "nothing": "has none of u.data, ratings.dat, ratings.csv.",
    "not text": "u.data is not a text file.",
    "a line": "u.data has 'what is this' in line 3, not a user, an item, a rating and a time",
    "few": "u.data has 10 ratings, not 500 more than users.",
    "a rating": "u.data has a rating that is not above 0 and at most 5.",
    "nan": "u.data has a rating that is not above 0 and at most 5.",
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_says_what_is_wrong_with_the_data(problem, tmp_path, monkeypatch, capsys):
    """One clear sentence and exit code 2, before anything else is printed."""
    directory = tmp_path
    match problem:
        case "no directory":
            directory = tmp_path / "elsewhere"
        case "not text":
            (tmp_path / "u.data").write_bytes(b"\xff\xfe")
        case "nothing":
            pass
        case _:
            path = write(tmp_path, "u.data")
            lines = path.read_text().splitlines()
            if problem == "few":
                lines = lines[:10]
            else:
                wrong = {"a rating": "1\t1\t6\t1", "nan": "1\t1\tnan\t1"}
                lines[2] = wrong.get(problem, "what is this")
            path.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as caught:
        main(monkeypatch, "--data-dir", directory)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert PROBLEMS[problem] in printed.err
    assert printed.err.startswith("recommendation.py: ")
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        main(monkeypatch, "--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--model", "--data-dir", "--steps", "--seed", "--alone", "--plot", "Koren"):
        assert option in printed
