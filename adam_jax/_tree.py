"""Trees: the places of their leaves, checks of one tree against another, tracing a leaf once."""

import functools
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adam_jax._numbers import is_complex

# --- Places ---------------------------------------------------------------------------------------


def at(path: tuple) -> str:
    """Where in a tree, for a message."""
    return f" at {jax.tree_util.keystr(path)}" if path else ""


def place(path: tuple) -> str:
    """Where in a tree of parameters, like "layers/0/kernel".

    Flax boxes a parameter in some calls (nnx.Param, nn.Partitioned) and not in others: the
    attribute `value` of a box at the end is no part of the place.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def owner(path: tuple, places: Container[tuple]) -> tuple | None:
    """The place of the parameter that a part of a state belongs to: how the part's own ends."""
    ends = (path[start:] for start in range(len(path) + 1))
    return next((end for end in ends if end in places), None)


# --- Checks ---------------------------------------------------------------------------------------


def check_params(stage: str, params: Any) -> None:
    """Only floating-point and complex parameters have gradients."""
    for path, param in jax.tree_util.tree_leaves_with_path(params):
        try:
            dtype = jnp.result_type(param)
        except TypeError:
            raise TypeError(
                f"{stage} optimizes arrays, but the parameter{at(path)} is {param!r}: leave it "
                f"out, in Equinox with equinox.filter(model, equinox.is_inexact_array)."
            ) from None
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{stage} optimizes floating-point and complex parameters, but the parameter"
                f"{at(path)} is {dtype}: leave it out with optax.masked or optax.partition."
            )


def check_inexact(stage: str, path: tuple, update: Any) -> None:
    """An update is floating point or complex."""
    dtype = getattr(update, "dtype", None) or jnp.result_type(update)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{stage} takes floating-point and complex updates, but the one{at(path)} is "
            f"{dtype}: leave the leaf out with optax.masked or optax.partition."
        )


def check_match(stage: str, kept: Any, due: Any) -> None:
    """What is kept must have the places, shapes and realness that are due for the gradients."""
    kept, due = leaves_by_path(kept), leaves_by_path(due)
    for path in {**kept, **due}:
        was, now = (kind(tree.get(path, NOTHING)) for tree in (kept, due))
        if was != now:
            raise ValueError(
                f"{stage} got gradients that do not match the parameters of init(): the leaf"
                f"{at(path)} was {was} there, and its gradient is {now}."
            )


NOTHING = "nothing"


def leaves_by_path(tree: Any) -> dict[tuple, Any]:
    """A None is a leaf here: a missing gradient must be told from a parameter that is None."""
    return dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None))


def kind(leaf: Any) -> str:
    """What of a leaf must not change."""
    if leaf is None or leaf is NOTHING:
        return str(leaf)
    return (
        f"{'complex' if is_complex(jnp.result_type(leaf)) else 'real'} of shape {jnp.shape(leaf)}"
    )


# --- Tracing --------------------------------------------------------------------------------------


def traced_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of one leaf, traced once for all leaves of a kind, wherever a step is traced.

    A model has many more leaves than shapes, and tracing and lowering each by itself would take
    most of the time before XLA takes over. A Python number stays one, on the way in and out,
    because arithmetic on numbers and on float32 scalars differs in the last digit.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def on_arrays(static, arrays):
        arrays, static = _split(fn(*_joined(static, arrays)))
        return arrays, static  # the numbers that `fn` returned are part of what jit remembers

    def leaf(*args):
        arrays, static = _split(args)
        if not any(isinstance(array, Tracer) for array in arrays):
            return fn(*args)
        arrays, static = on_arrays(static, arrays)
        return _joined(static, arrays)

    return leaf


@jax.tree_util.register_static
class _Static(NamedTuple):
    """A tree without its arrays: its structure and its numbers."""

    structure: Any
    numbers: tuple  # each with its type: 1 and 1.0 are equal


def _split(tree: Any) -> tuple[list[Any], _Static]:
    """The arrays of a tree, and what remains of it without them."""
    leaves, structure = jax.tree.flatten(tree)
    numbers = tuple((type(x), x) if isinstance(x, int | float) else None for x in leaves)
    arrays = [leaf for leaf, number in zip(leaves, numbers, strict=True) if number is None]
    return arrays, _Static(structure, numbers)


def _joined(static: _Static, arrays: Sequence[Any]) -> Any:
    """What `_split` has split."""
    left = iter(arrays)
    leaves = [next(left) if number is None else number[1] for number in static.numbers]
    return jax.tree.unflatten(static.structure, leaves)


OWN = "adam_jax."


def own_equation(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of one array and some integers as one equation, which tells them in its name.

    A kernel sees a tile of the leaf and does in a way of its own what needs to know the place of an
    element (`_kernel.py`).
    """

    @functools.cache
    def with_integers(integers):
        def on_array(x):
            return fn(x, *integers)

        on_array.__name__ = " ".join([OWN + fn.__name__, *map(str, integers)])
        return jax.jit(on_array, keep_unused=True)  # its sharding is that of the result

    @functools.wraps(fn)
    def equation(x, *integers):
        return with_integers(integers)(x)

    return equation
