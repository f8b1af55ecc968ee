"""Which parameter a part of a state belongs to, told by their paths."""

from collections.abc import Container
from typing import Any

import jax


def at(path: tuple) -> str:
    """Where in a tree, for a message."""
    return f" at {jax.tree_util.keystr(path)}" if path else ""


def path_name(path: tuple) -> str:
    """The path of a parameter as text, like "layers/0/kernel".

    Flax boxes a parameter in some calls (nnx.Param, nn.Partitioned) and not in others: the
    attribute `value` of a box at the end is not part of the path.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def owner(path: tuple, params: Container[tuple]) -> tuple | None:
    """The path of the parameter that a part of a state belongs to.

    A state holds trees shaped like the parameters, so the path of a part ends in that path.
    """
    ends = (path[start:] for start in range(len(path) + 1))
    return next((end for end in ends if end in params), None)


def leaves_by_path(tree: Any) -> dict[tuple, Any]:
    """A None is a leaf here: a missing gradient must be told from a parameter that is None."""
    return dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None))
