"""The protocol of a storage, and the slot: a moment that a stage keeps between two steps."""

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adam_jax._checks import NOTHING, check_dtype, kind
from adam_jax._numerics import SMALL, accumulator, is_complex, real
from adam_jax._ownership import at, is_placeholder, leaves_by_path, path_name, placeholder
from adam_jax._random import random_bits
from adam_jax.sharding import as_param


@dataclass(frozen=True)
class Leaf:
    """A description of the leaf that a moment belongs to, which `save` and `load` get.

    Attributes:
      moment: "mu" or "nu".
      path: the path in the tree of parameters, like "layers/0/kernel".
      shape: the shape of the parameter, and of the moment.
      dtype: the dtype the moment is computed in: at least float32, real for "nu".
      index: the number of the leaf in the tree, from 0.
      count: the number of steps taken so far, an int32 scalar.
      stored: in a step, what the state keeps of this moment; None in `init`. Inside `jax.shard_map`
        its shapes tell what the shape of a shard does not.
    """

    moment: str
    path: str
    shape: tuple[int, ...]
    dtype: Any
    index: int
    count: Any = 0
    stored: Any = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def random_bits(self, seed: int, like: jax.Array) -> jax.Array:
        """32 random bits for every element of `like`, an array of the leaf's shape.

        A function of the seed, the moment, the leaf's index and the step, so that a run can be
        repeated, on one device or on many.
        """
        return random_bits(seed, self.moment, self.index, self.count, like)


def is_large(leaf: Leaf) -> bool:
    """Tell whether a leaf is real and has at least 4,096 elements, as most storages ask.

    Args:
      leaf: a `Leaf`.

    Returns:
      True or False. This function is the default of `Storage.fits`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(is_large(Leaf("mu", "kernel", (64, 64), jnp.float32, index=0)))
      True

    Source: none.
    """
    return leaf.size >= SMALL and jnp.issubdtype(leaf.dtype, jnp.floating)


class Storage(NamedTuple):
    r"""A pair of functions that save and load the moments of a tree, leaf by leaf.

    Before the first step a state keeps what `save` makes of the initial value. A storage that keeps
    several arrays of a moment names them: `parts` is a NamedTuple class with a field for each array
    and a last field `whole` for the leaves that do not fit. The state then holds one such tuple,
    whose fields are trees shaped like the parameters. Where a leaf has no such array there is a
    placeholder: a few booleans, all False, with as many axes as the leaf.

    Attributes:
      save: `(moment, leaf) -> stored`: from an array of the leaf's shape and at least float32 to an
        array, or to a tuple of class `parts`. Shapes and dtypes may depend on the leaf only, which
        is a `Leaf`.
      load: `(stored, leaf) -> moment`: back to an array of the leaf's shape.
      fits: `(leaf) -> bool`: which leaves are kept this way; the others stay as they are computed.
        Default: the real ones of at least 4,096 elements.
      only: "mu" or "nu" for a storage that makes no sense for the other moment. Default None.
      parts: a NamedTuple class whose last field is `whole`, with default None, where `save` makes
        several arrays of one moment. Default None: one array.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> from adam_jax.storage import Storage
      >>> half = Storage(
      ...     save=lambda moment, leaf: moment.astype(jnp.float16),
      ...     load=lambda stored, leaf: stored.astype(leaf.dtype),
      ... )
      >>> tx = adam_jax.adam(1e-3, mu_storage=half)
      >>> state = tx.init({"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)})
      >>> print(jax.tree.map(lambda moment: str(moment.dtype), state[0].mu))
      {'bias': 'float32', 'kernel': 'float16'}
    """

    save: Callable[[jax.Array, Leaf], Any]
    load: Callable[[Any, Leaf], jax.Array]
    fits: Callable[[Leaf], bool] = is_large
    only: str | None = None
    parts: Any = None


StorageLike: TypeAlias = Storage | DTypeLike | None  # a storage, a dtype, or as it is computed

AS_COMPUTED = Storage(
    save=lambda moment, leaf: moment,
    load=lambda stored, leaf: stored,
    fits=lambda leaf: False,
)


def in_dtype(dtype: Any) -> Storage:
    """A moment in another dtype, rounded to nearest: `cast`, or a dtype in its place."""

    def fits(leaf):
        if is_complex(leaf.dtype) != is_complex(dtype):
            raise TypeError(
                f"{leaf.moment} of the parameter at {leaf.path!r} is {leaf.dtype} and cannot be "
                f"kept in {dtype}: treat this parameter apart with optax.partition."
            )
        return True

    return Storage(
        save=lambda moment, leaf: moment.astype(dtype),
        load=lambda stored, leaf: stored.astype(leaf.dtype),
        fits=fits,
        only=only_first(dtype),
    )


def only_first(dtype: Any) -> str | None:
    """A second moment needs the range of float32, since it is a square: in less it underflows."""
    return "mu" if jnp.finfo(dtype).nexp < 8 else None


def _nothing(leaf: Leaf) -> jax.Array:
    """A placeholder of at most 64 elements, or a 64th of the leaf's.

    More axes of 64 would make it as large as the leaf, so specs fit it on fewer devices then.
    """
    for devices in (64, 32, 16, 8, 4, 2, 1):
        lengths = tuple(math.gcd(length, devices) for length in leaf.shape)
        if math.prod(lengths) <= max(leaf.size // 64, 64):
            break
    return placeholder(lengths)


def _after_host(saved: list[Any], count: Any) -> Any:
    """The step count, but known only when what was saved on the host has left the device.

    Codes are drawn with it. So they are made leaf by leaf, and of one leaf only lie on the device.
    """
    on_host = [x for x in saved if jax.typeof(x).memory_space == jax.memory.Space.Host]
    return jax.lax.optimization_barrier((jnp.asarray(count), on_host))[0] if on_host else count


# What moments start from while `from_optax` makes a state, by stage and moment, and by the path of
# the parameter; others start as ever. An `init` takes the parameters and nothing else.
STARTS: ContextVar[dict[tuple[str, str], dict[str, Any]]] = ContextVar("starts")

# Each slot, leaf and what is kept of it, in the order of an `init`, for who asks which is where.
KEPT: ContextVar[list[tuple["Slot", Leaf, list[Any]]]] = ContextVar("kept")


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
    def of(cls, stage: str, moment: str, storage: StorageLike) -> "Slot":
        """For the argument `mu_storage` or `nu_storage`: a `Storage`, a dtype or None."""
        name = f"{moment}_storage"
        if storage is None:
            return cls(stage, moment, AS_COMPUTED)
        if not isinstance(storage, Storage):
            try:
                kinds = jnp.inexact if moment == "mu" else jnp.floating
                storage = in_dtype(check_dtype(name, storage, kinds))
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
        return self.storage is not AS_COMPUTED

    def init(self, params: Any, value: float = 0.0) -> Any:
        """What a state keeps before the first step."""
        leaves, structure = self._leaves(params, 0)
        kept = [
            self._started(leaf, param, self._start(leaf, value))
            for leaf, param in zip(leaves, jax.tree.leaves(params), strict=True)
        ]
        KEPT.get([]).extend((self, *x) for x in zip(leaves, kept, strict=True))
        return self._tree(kept, structure)

    def load(self, state: Any, grads: Any, count: Any) -> tuple[Any, Callable[[Any], Any]]:
        """The moments that a state keeps, and a function that saves new ones.

        A leaf that is whole in the state stays whole: inside `jax.shard_map` it may be smaller than
        the one that `init` saw.
        """
        leaves, structure = self._leaves(grads, count)
        stored = self._stored(state, grads, structure)
        for parts, leaf in zip(stored, leaves, strict=True):
            # A Python number, as optax.tree.set(state, mu=0) leaves it, traced or not.
            if getattr(parts[-1], "weak_type", isinstance(parts[-1], int | float)):
                parts[-1] = jnp.full(leaf.shape, jnp.asarray(parts[-1]).astype(leaf.dtype))

        def load(parts, leaf):
            try:
                whole = self._is_whole(parts, leaf)
                kept = self._of_parts(parts)
                leaf = replace(leaf, stored=kept)
                moment = parts[-1] if whole else self.storage.load(kept, leaf)
                fits = moment.shape == leaf.shape
                fits = fits and (moment.dtype.kind == "c") == (leaf.dtype.kind == "c")
            except (AttributeError, TypeError, ValueError) as error:
                raise self._mismatch(parts, leaf) from error
            if not fits:
                raise self._mismatch(parts, leaf)
            return moment.astype(accumulator(moment.dtype))  # whatever a state was cast to

        def save(parts, leaf, moment):
            if self._is_whole(parts, leaf):
                return [*parts[:-1], moment.astype(accumulator(parts[-1].dtype))]
            saved = self._saved(moment, replace(leaf, stored=self._of_parts(parts)))
            saved = [old if new is None else new for new, old in zip(saved, parts, strict=True)]
            for new, old in zip(saved, parts, strict=True):
                converted = new.dtype == old.dtype or jnp.issubdtype(old.dtype, jnp.inexact)
                if new.shape != old.shape or not converted:
                    raise self._mismatch(parts, leaf)
            return saved

        def keep(moments):
            saved: list[list[Any]] = []
            new = structure.flatten_up_to(moments)
            for parts, leaf, moment in zip(stored, leaves, new, strict=True):
                if saved:
                    leaf = replace(leaf, count=_after_host(saved[-1], leaf.count))
                saved.append(save(parts, leaf, moment))
            return self._tree(saved, structure)

        return structure.unflatten(map(load, stored, leaves)), keep

    def of_layers(self, layer: Leaf, params: Any, stack: "Slot", leaf: Leaf, kept: list) -> list:
        """What is kept of every layer, from what another slot keeps of the stack of them.

        That is left as it is where it is the same, and where it is not the moment is saved again.
        """
        parts = stack._of_parts(kept)
        load = lambda: stack.storage.load(parts, replace(leaf, stored=parts))  # noqa: E731
        moment = kept[-1] if stack._is_whole(kept, leaf) else load()
        save = jax.vmap(lambda param, moment: self._started(layer, param, moment))
        as_saved = jax.eval_shape(save, params, moment)
        same = stack.storage.parts is self.storage.parts and all(
            old.shape == new.shape and old.dtype == new.dtype
            for old, new in zip(kept, as_saved, strict=False)
            if not is_placeholder(new)
        )
        if not same:
            return save(params, moment)
        return [
            jnp.zeros(new.shape, bool) if is_placeholder(new) else old
            for old, new in zip(kept, as_saved, strict=True)
        ]

    def _started(self, leaf: Leaf, param: Any, start: Any) -> list[Any]:
        """What is kept of a leaf whose moment is `start`, a number or an array."""
        parts: list[Any] = [None] * len(self._names)
        if self.storage.fits(leaf):
            # Unless it is kept from knowing the value, XLA works out the codes in compilation.
            start = jax.lax.optimization_barrier(jnp.asarray(start, leaf.dtype))
            parts = self._saved(jnp.full_like(param, start, dtype=leaf.dtype), leaf)
        else:
            parts[-1] = jnp.full_like(param, start, dtype=leaf.dtype)
        return [as_param(_nothing(leaf) if x is None else x, param) for x in parts]

    def _leaves(self, tree: Any, count: Any) -> tuple[list[Leaf], Any]:
        """The `Leaf` of every parameter or gradient of a tree, and the tree's structure."""
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        leaves = []
        for index, (path, x) in enumerate(paths):
            dtype = accumulator(jnp.result_type(x))
            dtype = real(dtype) if self.moment == "nu" else dtype
            leaves.append(Leaf(self.moment, path_name(path), jnp.shape(x), dtype, index, count))
        return leaves, structure

    def _start(self, leaf: Leaf, value: float) -> Any:
        start = STARTS.get({}).get((self.stage, self.moment), {}).get(leaf.path)
        if start is None:
            return value
        if jnp.shape(start) != leaf.shape:
            raise ValueError(
                f"{self.stage} needs a {self.moment} of shape {leaf.shape} for the parameter at "
                f"{leaf.path!r}, and the state has one of shape {jnp.shape(start)}."
            )
        return jnp.array(start)  # a copy, that may be donated

    # --- What is stored of a leaf is a list: one array, or the parts that the storage names, of
    # which only `whole` is no placeholder where the leaf does not fit.

    @property
    def _names(self) -> tuple[str, ...]:
        return ("",) if self.storage.parts is None else self.storage.parts._fields

    def _of_parts(self, parts: Any) -> Any:
        return parts[0] if self.storage.parts is None else self.storage.parts(*parts)

    def _saved(self, moment: Any, leaf: Leaf) -> list[Any]:
        """What the storage makes of a moment; None for a part that it leaves out."""
        saved, parts = self.storage.save(moment, leaf), self.storage.parts
        if parts is not None and isinstance(saved, parts):
            return list(saved)
        if parts is None and hasattr(saved, "dtype"):
            return [saved]
        raise TypeError(
            f"{self.moment}_storage must save {parts.__name__ if parts else 'one array'} of "
            f"{leaf.path!r}, but saved {type(saved).__name__}: several arrays are named by the "
            f"parts of a Storage."
        )

    def _is_whole(self, parts: list[Any], leaf: Leaf) -> bool:
        kept = parts[-1]
        if self.storage is AS_COMPUTED:
            return True
        if self.storage.parts is not None:
            return kept.dtype != bool
        if self.storage.fits(leaf):
            return False
        if not jax.sharding.get_abstract_mesh().manual_axes:
            return True
        # A part of a larger leaf, inside jax.shard_map: what is stored tells.
        wide = jnp.issubdtype(kept.dtype, jnp.inexact) and jnp.finfo(kept.dtype).bits >= 32
        return wide and kept.shape == leaf.shape

    def _tree(self, stored: list[list[Any]], structure: Any) -> Any:
        """From what is stored of each leaf to what a state keeps."""
        if self.storage.parts is None:
            return structure.unflatten([parts[0] for parts in stored])
        columns = [structure.unflatten(column) for column in zip(*stored, strict=True)]
        return self.storage.parts(*columns or [structure.unflatten([])] * len(self._names))

    def _stored(self, state: Any, grads: Any, structure: Any) -> list[list[Any]]:
        """What a state keeps of each leaf, where its trees are like the gradients'."""
        parts: Any = self.storage.parts
        in_parts = getattr(state, "_fields", ())[-1:] == ("whole",) and type(state) is not type(
            grads
        )
        if isinstance(state, parts) if parts else not in_parts:
            trees = list(state) if parts else [state]
            try:
                columns = [structure.flatten_up_to(tree) for tree in trees]
                return [list(parts) for parts in zip(*columns, strict=True)]
            except ValueError:
                raise self._other_tree(trees[-1], grads) from None
        was = f"{type(state).__name__} of {', '.join(state._fields)}" if in_parts else "one tree"
        now = f"{parts.__name__} of {', '.join(parts._fields)}" if parts else "one tree"
        raise ValueError(
            f"{self.stage} got a state of another storage: it keeps {self.moment} as {was}, and "
            f"this {self.moment}_storage as {now}. {_REMEDY}"
        )

    def _other_tree(self, kept: Any, grads: Any) -> ValueError:
        """The first path where what is kept and the gradients are not the same tree."""
        kept, grads = leaves_by_path(kept), leaves_by_path(grads)
        for path in {**kept, **grads}:
            was, now = (kind(tree.get(path, NOTHING)) for tree in (kept, grads))
            if was != now and {was, now} & {NOTHING, "None"}:
                return ValueError(
                    f"{self.stage} got gradients that do not match the parameters of init(): for "
                    f"the leaf{at(path)} the state keeps {self.moment} as {was}, and the gradient "
                    f"is {now}. {_REMEDY}"
                )
        return ValueError(f"{self.stage} got gradients in another tree than init(). {_REMEDY}")

    def _mismatch(self, parts: list[Any], leaf: Leaf) -> ValueError:
        """What is kept of a leaf is not what this storage keeps of it."""
        described = lambda parts: " and ".join(  # noqa: E731
            f"{name} {getattr(part, 'dtype', part)}{list(jnp.shape(part))}".strip()
            for name, part in zip(self._names, parts, strict=True)
            if kind(part) != kind(None) and part.dtype.kind != "b"
        )
        moment = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        due: list[Any] = [*[_nothing(leaf)] * (len(self._names) - 1), moment]
        if self.storage.fits(leaf):
            saved = jax.eval_shape(lambda m: self._saved(m, leaf), moment)
            due = [_nothing(leaf) if part is None else part for part in saved]
        where = f" at {leaf.path!r}" if leaf.path else ""
        return ValueError(
            f"{self.stage} got gradients that do not match its state: of the leaf{where} the state "
            f"keeps {self.moment} as {described(parts)}, and for a gradient of shape "
            f"{leaf.shape} this {self.moment}_storage keeps {described(due)}. {_REMEDY}"
        )


_REMEDY = (
    "Give the storage that the state was made with, and gradients shaped like the parameters of "
    "init(); or make the state anew with init()."
)
