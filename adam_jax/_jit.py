"""JAX traces the arithmetic of one leaf once for all leaves of the same shapes and dtypes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.core import Tracer


def once(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)` of one leaf, traced once for all leaves of a kind, wherever a step is traced.

    A model has many more leaves than shapes, and tracing and lowering each by itself would take
    most of the time before XLA takes over. What is no array stays what it is, on the way in and
    out: arithmetic on Python numbers and on float32 scalars differs in the last digit.

    Args:
      fn: a function of a module, so that all stages share what is traced; or a pytree that can be
        called, such as `jax.tree_util.Partial`.
      args: trees of arrays, numbers and functions.
    """
    leaves, structure = jax.tree.flatten((fn, args))
    for leaf in leaves:
        if isinstance(leaf, Tracer):
            return _joined(*_on_arrays(*_split(leaves, structure)))
    return fn(*args)


@functools.partial(jax.jit, static_argnums=1)
def _on_arrays(arrays: list[Any], static: "_Static") -> tuple[list[Any], "_Static"]:
    fn, args = _joined(arrays, static)
    return _split(*jax.tree.flatten(fn(*args)))


@jax.tree_util.register_static
class _Static(NamedTuple):
    """A tree without its arrays."""

    structure: Any
    others: tuple  # what is no array, each with its type: 1 and 1.0 are equal


def _split(leaves: list[Any], structure: Any) -> tuple[list[Any], _Static]:
    """The arrays of a tree, and what remains without them."""
    is_array = [isinstance(leaf, jax.Array) or hasattr(leaf, "dtype") for leaf in leaves]
    others = tuple(
        None if array else (type(leaf), leaf) for leaf, array in zip(leaves, is_array, strict=True)
    )
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    return arrays, _Static(structure, others)


def _joined(arrays: list[Any], static: _Static) -> Any:
    """The tree again."""
    remaining = iter(arrays)
    leaves = [next(remaining) if other is None else other[1] for other in static.others]
    return jax.tree.unflatten(static.structure, leaves)
