"""Ratings to learn from: made from known factors, or read from the files of MovieLens."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

USERS, ITEMS, RATINGS, KINDS, FACTORS = 1_000, 400, 40_000, 8, 6
FEWEST = 500  # ratings of MovieLens more than users, of each of whom one is left out


class Ratings(NamedTuple):
    users: np.ndarray  # (n,) int32, from 0 without gaps
    items: np.ndarray
    ratings: np.ndarray  # (n,) float32
    order: np.ndarray  # (n,) in time
    groups: np.ndarray  # of every user, a side feature
    genres: np.ndarray  # of every item


class DataError(Exception):
    """A data set that cannot be used; the message is one sentence for the user."""


def made(seed: int) -> Ratings:
    """Ratings of 1 to 5 from known factors; liked and popular items are rated more often."""
    rng = np.random.default_rng(seed)
    groups, genres = rng.integers(KINDS, size=USERS), rng.integers(KINDS, size=ITEMS)
    of_group, of_genre = rng.normal(size=(2, KINDS, FACTORS))
    user = 0.8 * of_group[groups] + 0.6 * rng.normal(size=(USERS, FACTORS))
    item = 0.8 * of_genre[genres] + 0.6 * rng.normal(size=(ITEMS, FACTORS))
    taste = user @ item.T / np.sqrt(FACTORS)
    exact = 2.7 + 0.4 * rng.normal(size=(USERS, 1)) + 0.4 * rng.normal(size=ITEMS) + 0.8 * taste
    popularity = -0.8 * np.log1p(rng.permutation(ITEMS))
    active = 0.8 * rng.normal(size=(USERS, 1))
    # The largest of perturbed logits are a sample without replacement (Gumbel).
    logits = popularity + 1.2 * taste + active + rng.gumbel(size=(USERS, ITEMS))
    users, items = np.divmod(np.argsort(-logits, axis=None)[:RATINGS], ITEMS)
    ratings = np.clip(np.round(exact[users, items] + 0.5 * rng.normal(size=RATINGS)), 1, 5)
    return numbered(users, items, ratings, rng.permutation(RATINGS), groups, genres)


FILES = {"u.data": "\t", "ratings.dat": "::", "ratings.csv": ","}


def movielens(directory: Path) -> Ratings:
    """The ratings of ml-100k (u.data), ml-1m (ratings.dat) or a later set (ratings.csv)."""
    if not directory.is_dir():
        raise DataError(f"There is no directory {directory}.")
    path = next((directory / name for name in FILES if (directory / name).is_file()), None)
    if path is None:
        raise DataError(f"{directory} has none of {', '.join(FILES)}.")
    rows = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a text file.") from None
    first = 1 if path.suffix == ".csv" else 0  # its header
    for number, line in enumerate(lines[first:], start=first + 1):
        try:
            user, item, rating, time = line.split(FILES[path.name])
            rows.append((int(user), int(item), float(rating), int(time)))
        except ValueError:
            raise DataError(
                f"{path} has {line!r} in line {number}, not a user, an item, a rating and a time "
                f"with {FILES[path.name]!r} between them."
            ) from None
    if len(rows) < FEWEST + len({user for user, *_ in rows}):
        raise DataError(f"{path} has {len(rows)} ratings, not {FEWEST} more than users.")
    users, items, ratings, times = map(np.array, zip(*rows, strict=True))
    if not np.all((ratings > 0) & (ratings <= 5)):
        raise DataError(f"{path} has a rating that is not above 0 and at most 5.")
    return numbered(users, items, ratings, times)


def numbered(users, items, ratings, order, groups=None, genres=None) -> Ratings:
    """With users and items numbered from 0, in place of the ids of a data set."""
    user_ids, users = np.unique(users, return_inverse=True)
    item_ids, items = np.unique(items, return_inverse=True)
    groups = np.zeros(len(user_ids), np.int32) if groups is None else groups[user_ids]
    genres = np.zeros(len(item_ids), np.int32) if genres is None else genres[item_ids]
    of_leaf = lambda x: x.astype(np.int32)  # noqa: E731
    return Ratings(
        of_leaf(users), of_leaf(items), ratings.astype(np.float32), order, groups, genres
    )


def means(data: Ratings) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean, and how far the ratings of every user and of every item are from it."""

    def of_each(index, values, length):
        return np.bincount(index, values, length) / np.bincount(index, minlength=length).clip(1)

    mean = float(data.ratings.mean())
    of_item = of_each(data.items, data.ratings - mean, len(data.genres))
    rest = data.ratings - mean - of_item[data.items]
    return mean, of_each(data.users, rest, len(data.groups)), of_item


def hits(scores: np.ndarray, best: int) -> np.ndarray:
    """Whether the first of each row is among the best; half of its equals count as better."""
    own, others = np.split(np.asarray(scores), [1], axis=1)
    return np.sum(others > own, axis=1) + np.sum(others == own, axis=1) / 2 < best


def rated(data: Ratings) -> np.ndarray:
    """All pairs of user and item, each as one number, sorted."""
    return np.sort(_pairs(data.users, data.items, len(data.genres)))


def not_rated(rng, users: np.ndarray, number: int, rated: np.ndarray, items: int) -> np.ndarray:
    """For every user so many random items that they did not rate."""
    chosen = rng.integers(items, size=(len(users), number), dtype=np.int32)
    for _ in range(50):  # not for ever: some may have rated everything
        pairs = _pairs(users[:, None], chosen, items)
        again = rated[np.searchsorted(rated, pairs).clip(max=len(rated) - 1)] == pairs
        if not again.any():
            break
        chosen[again] = rng.integers(items, size=again.sum())
    return chosen


def _pairs(users: np.ndarray, items: np.ndarray, number: int) -> np.ndarray:
    return users.astype(np.int64) * number + items
