"""One kept moment of a tree: what the state of a stage holds of it, and how a step gets at it."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adam_jax._numbers import accumulator, check_dtype, real
from adam_jax._tree import NOTHING, at, check_match, kind, leaves_by_path, place
from adam_jax.sharding import beside
from adam_jax.storage import Leaf, Storage, cast

# What moments start from while `takeover.from_optax` makes a state, by stage and moment, and by the
# place of the parameter. An `init` takes the parameters and nothing else.
STARTS: ContextVar[dict[tuple[str, str], dict[str, Any]]] = ContextVar("starts")

FULL = Storage(lambda moment, leaf: moment, lambda stored, leaf: stored, fits=lambda leaf: False)


class Slot(NamedTuple):
    """A moment that a stage keeps between two steps, for every leaf of a tree.

    Attributes:
      stage: the name of the stage, for messages.
      moment: "mu" or "nu".
      storage: how it is kept.
    """

    stage: str
    moment: str
    storage: Storage

    @classmethod
    def of(cls, stage: str, moment: str, storage: Any) -> "Slot":
        """For the argument `mu_storage` or `nu_storage`: a `Storage`, a dtype or None."""
        name = f"{moment}_storage"
        if storage is None:
            return cls(stage, moment, FULL)
        if not isinstance(storage, Storage):
            try:
                kinds = jnp.inexact if moment == "mu" else jnp.floating
                storage = cast(check_dtype(name, storage, kinds))
            except ValueError:
                raise TypeError(
                    f"{name} must be a Storage, such as adam_jax.storage.int8(), or a "
                    f"floating-point dtype, got {storage!r}."
                ) from None
        if storage.only == "nu" and moment == "mu":
            raise ValueError(
                f"{name} got a storage that is for nu only: one mean for many elements says "
                f"nothing about the signs of a first moment."
            )
        if storage.only == "mu" and moment == "nu":
            raise ValueError(
                f"{name} got a dtype with less range than bfloat16: squares of small gradients "
                f"become 0 in it, and the steps very large. Use adam_jax.storage.int8(), or "
                f"adam_jax.storage.stochastic() for bfloat16."
            )
        if storage.parts is not None and getattr(storage.parts, "_fields", ())[-1:] != ("whole",):
            raise ValueError(f"The last of a storage's parts must be whole, got {storage.parts}.")
        return cls(stage, moment, storage)

    @property
    def rounds(self) -> bool:
        """Whether the moment may lose digits between two steps."""
        return self.storage is not FULL

    def initial(self, params: Any, value: float = 0.0) -> Any:
        """What a state keeps before the first step."""
        leaves, structure = self._leaves(params, 0)
        stored = []
        for leaf, param in zip(leaves, jax.tree.leaves(params), strict=True):
            start = self._start(leaf, jnp.shape(param), value)
            if self.storage.fits(leaf):
                # Unless it is kept from knowing the value, XLA works out the codes in compilation.
                start = jax.lax.optimization_barrier(jnp.asarray(start, leaf.dtype))
                new = self.storage.save(jnp.full_like(param, start, dtype=leaf.dtype), leaf)
                self._check_saved(new, leaf)
                stored.append(jax.tree.map(lambda part, p=param: _beside(part, p), new))
            else:
                stored.append(self._whole(jnp.full_like(param, start, dtype=leaf.dtype)))
        return self._tree(stored, structure)

    def _start(self, leaf: Leaf, shape: tuple[int, ...], value: float) -> Any:
        starts = STARTS.get({}).get((self.stage, self.moment))
        if starts is None:
            return value
        start = starts.pop(leaf.path, None)
        if start is None or jnp.shape(start) != shape:
            was = "none" if start is None else f"one of shape {jnp.shape(start)}"
            raise ValueError(
                f"{self.stage} needs a {self.moment} of shape {shape} for the parameter at "
                f"{leaf.path!r}, and the state has {was}."
            )
        return jnp.array(start)  # a copy, that may be donated

    def open(self, kept: Any, grads: Any, count: Any) -> tuple[Any, Callable[[Any], Any]]:
        """The moments that a state keeps, and the function from new ones to what to keep of them.

        What is whole in the state stays whole: inside `jax.shard_map` a leaf may be smaller than
        the one that `init` saw.
        """
        leaves, structure = self._leaves(grads, count)
        self._check(kept, grads)
        parts = [structure.flatten_up_to(part) for part in self._parts_of(kept)]
        stored = [self._of_parts(leaf) for leaf in zip(*parts, strict=True)]
        wholes = [self._is_whole(s, leaf) for s, leaf in zip(stored, leaves, strict=True)]

        def load(old, leaf, whole):
            return self._parts_of(old)[-1] if whole else self.storage.load(old, leaf)

        def save(old, leaf, whole, new):
            new = self._whole(new) if whole else self.storage.save(new, leaf)
            return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)  # dtypes never drift

        def keep(moments):
            new = structure.flatten_up_to(moments)
            return self._tree(list(map(save, stored, leaves, wholes, new)), structure)

        return structure.unflatten(map(load, stored, leaves, wholes)), keep

    def _leaves(self, tree: Any, count: Any = 0) -> tuple[list[Leaf], Any]:
        """The `Leaf` of every parameter or gradient of a tree, and the tree's structure."""
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)

        def leaf(index, path, x):
            dtype = accumulator(jnp.result_type(x))
            dtype = real(dtype) if self.moment == "nu" else dtype
            return Leaf(self.moment, place(path), jnp.shape(x), dtype, index, count)

        return [leaf(index, *item) for index, item in enumerate(paths)], structure

    # --- What is stored of a leaf: one array, or the parts that the storage names, of which `whole`
    # alone is not None where the leaf does not fit.

    @property
    def _names(self) -> tuple[str, ...]:
        return ("",) if self.storage.parts is None else self.storage.parts._fields

    def _of_parts(self, parts: Any) -> Any:
        return parts[0] if self.storage.parts is None else self.storage.parts(*parts)

    def _parts_of(self, stored: Any) -> tuple:
        return (stored,) if self.storage.parts is None else tuple(stored)

    def _whole(self, moment: Any) -> Any:
        return self._of_parts([None] * (len(self._names) - 1) + [moment])

    def _is_whole(self, stored: Any, leaf: Leaf) -> bool:
        if self.storage.parts is not None:
            return stored.whole is not None
        wide = jnp.issubdtype(stored.dtype, jnp.inexact) and jnp.finfo(stored.dtype).bits >= 32
        return stored.shape == leaf.shape and wide and not self.storage.fits(leaf)

    def _tree(self, stored: list[Any], structure: Any) -> Any:
        """From what is stored of each leaf to what a state keeps."""
        parts = [[self._parts_of(leaf)[i] for leaf in stored] for i in range(len(self._names))]
        return self._of_parts([structure.unflatten(part) for part in parts])

    def _check_saved(self, new: Any, leaf: Leaf) -> None:
        parts, saved = self.storage.parts, jax.tree.structure(new)
        if not (isinstance(new, parts) if parts else jax.tree_util.treedef_is_leaf(saved)):
            due = parts.__name__ if parts else "one array"
            raise TypeError(
                f"{self.moment}_storage must save {due} of {leaf.path!r}, but saved "
                f"{type(new).__name__}: several arrays are named by the parts of a Storage."
            )

    # --- Whether a state was made with this storage, for parameters like the gradients.

    def _check(self, kept: Any, grads: Any) -> None:
        kind_of: Any = type(kept)
        parts = kind_of if getattr(kind_of, "_fields", ())[-1:] == ("whole",) else None
        if self.storage.parts is None and kind_of is type(grads):
            parts = None  # the parameters themselves have a last field of this name
        if parts is not self.storage.parts:
            was, now = (
                "one tree" if p is None else f"{p.__name__} of {', '.join(p._fields)}"
                for p in (parts, self.storage.parts)
            )
            raise ValueError(
                f"{self.stage} got a state of another storage: it keeps {self.moment} as {was}, "
                f"and this {self.moment}_storage as {now}. Give the storage that the state was "
                f"made with, or make the state anew with init()."
            )
        leaves, structure = self._leaves(grads)
        if self.storage is FULL:
            due = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
            return check_match(self.stage, kept, structure.unflatten(due))
        trees = [leaves_by_path(tree) for tree in self._parts_of(kept)]
        grad_at, ordered = leaves_by_path(grads), iter(leaves)
        leaf_at = {path: None if g is None else next(ordered) for path, g in grad_at.items()}
        for path in {path: None for tree in (*trees, grad_at) for path in tree}:
            stored = [tree.get(path, NOTHING) for tree in trees]
            was, now = map(self._kind, (stored, self._due(leaf_at.get(path, NOTHING), stored)))
            if was == now:
                continue
            grad = kind(grad_at.get(path, NOTHING))
            if grad in ("None", NOTHING) or set(map(kind, stored)) <= {"None", NOTHING}:
                raise ValueError(
                    f"{self.stage} got gradients that do not match the parameters of init(): the "
                    f"leaf{at(path)} is kept as {was}, and its gradient is {grad}."
                )
            raise ValueError(
                f"{self.stage} got a state that does not fit: the leaf{at(path)} is kept as {was}, "
                f"and this {self.moment}_storage keeps its gradient, {grad}, as {now}. Give the "
                f"storage that the state was made with, and gradients shaped like the parameters "
                f"of init()."
            )

    def _due(self, leaf: Any, stored: list[Any]) -> tuple:
        """What should be stored for a gradient, whole if it is whole."""
        if leaf is None or leaf is NOTHING:
            return (leaf,) * len(self._names)
        moment = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        fits = self.storage.parts is None and self.storage.fits(leaf)
        if kind(stored[-1]) == kind(moment) and not fits:
            return self._parts_of(self._whole(moment))
        return self._parts_of(jax.eval_shape(lambda m: self.storage.save(m, leaf), moment))

    def _kind(self, stored: Any) -> str:
        kinds = dict(zip(self._names, map(kind, stored), strict=True))
        if len(set(kinds.values())) > 1:
            kinds = {name: kind for name, kind in kinds.items() if kind != "None"}
        named = [f"{name} {kind}".strip() for name, kind in kinds.items()]
        return ", ".join(named) if len(set(kinds.values())) > 1 else kinds.popitem()[1]


def _beside(part: Any, param: Any) -> Any:
    """On a mesh with automatic axes: what is stored of a parameter, laid out as the parameter is.

    There XLA decides by itself where the results of `init` lie, if it is not jitted.
    """
    sharding = getattr(param, "sharding", None)
    if isinstance(part, Tracer) or not isinstance(sharding, jax.sharding.NamedSharding):
        return part
    if part.is_fully_addressable:
        return jax.device_put(part, beside(part.shape, jnp.shape(param), sharding))
    return part  # of a mesh that processes share no single one moves an array
