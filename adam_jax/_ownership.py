"""Paths tell which parameter each part of a state belongs to."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NONE = -1


def owners(state: Any, params: Any) -> Any:
    """For every array of a state the number of the parameter that it belongs to, or NONE.

    A state holds trees like the parameters, which may lack some: the path of a part ends in the
    path of its parameter, and beside it are only parts of other parameters. (So a field `weights`
    is none, though there be a parameter of that name.) Placeholders and scalar integers belong to
    none.

    Parameters that are one array have no paths. Then a part is theirs unless it is a scalar and the
    parameter is none, an integer of more than 8 bits, or in one of the fields NOT_OF_ONE_ARRAY.

    Args:
      state: a tree of arrays, or of their shapes and dtypes.
      params: the parameters, or their gradients, likewise.

    Returns:
      A tree like `state` of integers, which count the leaves of `params`. A None is a leaf.
    """
    leaves = leaves_by_path(params)
    numbers = {_unboxed(path): number for number, path in enumerate(leaves)}
    parts, structure = jax.tree_util.tree_flatten_with_path(state)
    paths = [_unboxed(path) for path, _ in parts]
    # Where a path leads on to what is no parameter, there is no tree like the parameters.
    others = {path[:i] for path in paths for i in range(len(path) + 1) if path[i:] not in numbers}

    def owner(path, part):
        if is_placeholder(part) or _is_count(part):
            return NONE
        if () in leaves and not _is_of(leaves[()], path, part):
            return NONE
        ends = (path[i:] for i in range(len(path) + 1) if path[:i] not in others)
        return next((numbers[end] for end in ends if end in numbers), NONE)

    found = [owner(path, part) for path, (_, part) in zip(paths, parts, strict=True)]
    return jax.tree.unflatten(structure, found)


NOT_OF_ONE_ARRAY = {"count", "weights", "hyperparams", "hyperparams_states"}


def _is_of(array: Any, path: tuple, part: Any) -> bool:
    """Whether a part belongs to the one array that is all parameters."""
    if array is None:
        return False
    dtype = jnp.result_type(part)
    numeric = jnp.issubdtype(dtype, jnp.inexact) or dtype in (jnp.int8, jnp.uint8)
    names = {getattr(key, "name", None) for key in path}
    return (
        numeric and bool(jnp.ndim(part)) == bool(jnp.ndim(array)) and not names & NOT_OF_ONE_ARRAY
    )


def _is_count(part: Any) -> bool:
    return jnp.ndim(part) == 0 and jnp.issubdtype(jnp.result_type(part), jnp.integer)


def is_placeholder(part: Any) -> bool:
    """Whether it stands where a leaf has no such part: nothing else in a state is boolean."""
    return getattr(part, "dtype", None) == np.bool_


def placeholder(shape: tuple[int, ...]) -> jax.Array:
    """For a part that a leaf of this shape does not have: False.

    A spec of the leaf fits it on meshes whose axes have up to 64 devices, and checkpoints keep it,
    which neither None nor an array without elements allows.
    """
    return jnp.zeros([math.gcd(length, 64) if length else 1 for length in shape], bool)


# --- Paths ----------------------------------------------------------------------------------------


def at(path: tuple) -> str:
    """Where in a tree, for a message."""
    return f" at {jax.tree_util.keystr(path)}" if path else ""


def path_name(path: tuple) -> str:
    """The path of a parameter as text, like "layers/0/kernel"."""
    return jax.tree_util.keystr(_unboxed(path), simple=True, separator="/")


def _unboxed(path: tuple) -> tuple:
    """Flax boxes a parameter in some calls (nnx.Param, nn.Partitioned) and not in others.

    The attribute `value` of a box at the end is not part of the path.
    """
    return path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path


def leaves_by_path(tree: Any) -> dict[tuple, Any]:
    """A None is a leaf here: a missing gradient must be told from a parameter that is None."""
    return dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None))
