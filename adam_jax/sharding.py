"""On many devices the state is sharded as the parameters that it belongs to."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from adam_jax._ownership import NONE, at, leaves_by_path, owners

Layout = tuple[tuple[int, ...], NamedSharding]  # of a parameter: its shape and its sharding


def state_shardings(
    tx: optax.GradientTransformation, params: Any, *, zero: str | None = None
) -> Any:
    """Derive the shardings of an optimizer's state from those of the parameters.

    Arrays of the state that belong to a parameter are sharded axis by axis as the parameter is:
    moments, their codes and scales, row and column means, residuals, gradients that are accumulated
    over several steps. An axis whose length the mesh does not divide is replicated, and so are
    counts, weights, and all that belongs to no parameter. If an array has an axis more or fewer
    than its parameter, the axes are matched by their lengths; an axis with two possible matches, as
    that of the rows of a square matrix in `optax.adafactor`, is replicated too. What
    `storage.on_host` keeps gets shardings of pinned host memory.

    With `zero` the state of a parameter that is not sharded over that axis of the mesh is sharded
    over it. All its arrays are split along the same axis of the parameter: the one that leaves the
    fewest bytes on a device (so blocks of 8 bits are not cut if another axis does as well), and of
    several such axes the longest. What no axis divides stays replicated. This is stage 1 of ZeRO: a
    step adds up the gradients, updates a part of the state on each device, and gathers the new
    parameters in their dtype, not the moments: with bfloat16 weights and `compensate("int8")`,
    compiled for sixteen chips of a v5e, 2 bytes a parameter (XLA for a CPU gathers bfloat16 as
    float32).

    Make the state with ``jax.jit(tx.init, out_shardings=shardings)``: each device makes its own
    part and never holds a whole moment. With several processes, and with several devices that XLA
    simulates on a CPU, always make it so: outside of `jax.jit`, devices may start collectives in
    different orders and wait for each other forever.
    Where a framework calls `init`, give it ``optax.GradientTransformationExtraArgs(init,
    tx.update)`` with this compiled `init`. (Flax NNX shards all that stands in an annotated
    `nnx.Variable` by the annotation, though that may not divide the scales of `int8`: annotate with
    ``eager_sharding=False``.)

    Compile the step with the shardings of the parameters and these as `out_shardings`, as below:
    without them XLA may leave the new parameters sharded as the state is.

    Args:
      tx: any optax transformation whose state holds trees shaped like the parameters.
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`, whose `sharding` is a
        `NamedSharding`, all of one mesh, with automatic or explicit axes.
      zero: the axis of the mesh over which the batch is sharded, to shard the state over it too.
        None shards the state as the parameters are. Default None.

    Returns:
      A tree like ``tx.init(params)``, with a `NamedSharding` for each array.

    Raises:
      ValueError: if a parameter has no `NamedSharding`, or one of another mesh, naming it; if there
        are no parameters; if the mesh has no axis `zero`.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> replicated = NamedSharding(mesh, PartitionSpec())
      >>> by_sample = NamedSharding(mesh, PartitionSpec("data"))
      >>> params = jax.device_put({"kernel": jnp.zeros((64, 128))}, replicated)
      >>> tx = adam_jax.adam(1e-3)
      >>> shardings = adam_jax.state_shardings(tx, params, zero="data")
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> print(state[0].mu["kernel"].addressable_shards[0].data.size * jax.device_count())
      8192
      >>> def step(params, state, x, y):
      ...     loss = lambda params: jnp.mean((x @ params["kernel"] - y) ** 2)
      ...     value, grads = jax.value_and_grad(loss)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state, value
      >>> out_shardings = {"kernel": replicated}, shardings, replicated
      >>> step = jax.jit(step, out_shardings=out_shardings, donate_argnums=(0, 1))
      >>> x, y = jax.device_put((jnp.ones((8, 64)), jnp.ones((8, 128))), by_sample)
      >>> for _ in range(3):
      ...     params, state, loss = step(params, state, x, y)
      >>> print(params["kernel"].sharding.is_fully_replicated, round(float(loss), 2))
      True 0.76

    Source: Rajbhandari et al., "ZeRO" (arXiv 1910.02054), section 5.1.
    """
    layouts = _layouts(params)
    mesh = next(layout for layout in layouts if layout)[1].mesh
    if zero is not None and zero not in mesh.axis_names:
        raise ValueError(f"zero must be an axis of the mesh, {mesh.axis_names}, got {zero!r}.")
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(shapes)
    owner_of = owners(state, shapes)
    if zero is not None:
        parts: list[list[Any]] = [[] for _ in layouts]
        for part, owner in zip(jax.tree.leaves(state), jax.tree.leaves(owner_of), strict=True):
            if owner != NONE:
                parts[owner].append(part)
        layouts = [
            layout and (layout[0], _over_zero(zero, *layout, parts[number]))
            for number, layout in enumerate(layouts)
        ]
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(part, owner, aval):
        found = replicated if owner == NONE else beside(part.shape, *layouts[owner])
        on_host = aval.memory_space == jax.memory.Space.Host  # of `storage.on_host`
        return found.with_memory_kind("pinned_host") if on_host else found

    avals = jax.tree.unflatten(jax.tree.structure(state), jaxpr.out_avals)
    return jax.tree.map(sharding, state, owner_of, avals)


def beside(
    shape: tuple[int, ...], param_shape: tuple[int, ...], sharding: NamedSharding
) -> NamedSharding:
    """The sharding of what is stored of a parameter: axis by axis that of the parameter.

    With fewer axes than the parameter, or more, it has those of the same lengths in the same order.
    An axis is sharded over as many axes of the mesh as divide it. If the matching axis is
    ambiguous, it is replicated.
    """
    names, spec = _names(sharding, param_shape), []
    ways = list(_ways(shape, param_shape))
    for axis, length in enumerate(shape):
        found = {() if way[axis] is None else names[way[axis]] for way in ways}
        of_axis = found.pop() if len(found) == 1 else ()
        while length % math.prod(sharding.mesh.shape[name] for name in of_axis):
            of_axis = of_axis[:-1]
        spec.append(of_axis)
    return sharding if spec == names else _with_names(sharding, spec)


def _ways(shape: tuple[int, ...], param_shape: tuple[int, ...]) -> Iterator[Sequence[Any]]:
    """For each axis of what is stored, the axis of the parameter or None: in all possible ways."""
    if len(shape) == len(param_shape):
        yield range(len(shape))  # codes and scales are shorter than the parameter
        return
    short, long = sorted((shape, param_shape), key=len)
    for axes in itertools.combinations(range(len(long)), len(short)):
        if all(length == long[axis] for length, axis in zip(short, axes, strict=True)):
            of_long = [axes.index(a) if a in axes else None for a in range(len(long))]
            yield of_long if long is shape else axes


def _over_zero(
    zero: str, shape: tuple[int, ...], sharding: NamedSharding, parts: list[Any]
) -> NamedSharding:
    """The sharding for the state of a parameter: its own, and over one more axis of the mesh.

    It is the one that leaves the fewest bytes on a device. Of several it is that of an axis that is
    not sharded yet, then of the longest, then of the first.
    """
    names = _names(sharding, shape)
    if any(zero in each for each in names):
        return sharding
    axes = sorted(range(len(shape)), key=lambda axis: (len(names[axis]), -shape[axis]))
    splits = [
        _with_names(sharding, [(*n, zero) if a == axis else n for a, n in enumerate(names)])
        for axis in axes
    ]

    def local_bytes(sharding):
        return sum(
            math.prod(beside(part.shape, shape, sharding).shard_shape(part.shape))
            * part.dtype.itemsize
            for part in parts
        )

    return min([sharding, *splits], key=local_bytes)


def _layouts(params: Any) -> list[Layout | None]:
    """The shape and the sharding of every parameter; None for a None."""
    layouts: list[Layout | None] = []
    first: Any = None  # the path of the first parameter, and its sharding
    for path, param in leaves_by_path(params).items():
        if param is None:
            layouts.append(None)
            continue
        sharding = None if isinstance(param, Tracer) else getattr(param, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"state_shardings needs to know where the parameters lie, but the one{at(path)} "
                f"has {'no sharding' if sharding is None else sharding}, where a NamedSharding is "
                f"due: put it on the mesh with jax.device_put, or give a jax.ShapeDtypeStruct with "
                f"one."
            )
        first = first or (path, sharding)
        if sharding.mesh != first[1].mesh:
            raise ValueError(
                f"state_shardings needs all parameters on one mesh, but the one{at(path)} lies on "
                f"{sharding.mesh}, and the one{at(first[0])} on {first[1].mesh}."
            )
        layouts.append((param.shape, sharding))
    if first is None:
        raise ValueError("state_shardings needs a parameter, to know the mesh from it.")
    return layouts


# --- The axes of the mesh that an axis of an array is sharded over, always as a tuple -------------


def _names(sharding: NamedSharding, shape: tuple[int, ...]) -> list[tuple[Any, ...]]:
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    return [() if n is None else n if isinstance(n, tuple) else (n,) for n in spec]


def _with_names(sharding: NamedSharding, names: list[tuple[Any, ...]]) -> NamedSharding:
    spec = PartitionSpec(*[each[0] if len(each) == 1 else each or None for each in names])
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


# --- Arrays on meshes -----------------------------------------------------------------------------


def as_param(part: Any, param: Any) -> Any:
    """On a mesh with automatic axes: what is stored of a parameter, sharded as the parameter is.

    There XLA decides by itself where the results of `init` lie, if it is not jitted.
    """
    sharding = getattr(param, "sharding", None)
    if isinstance(part, Tracer) or not isinstance(sharding, NamedSharding):
        return part
    if part.is_fully_addressable:
        return jax.device_put(part, beside(part.shape, jax.numpy.shape(param), sharding))
    return part  # on a mesh of several processes, one of them alone cannot move an array


def explicit(x: jax.Array) -> Any:
    """The sharding that is part of an array's type, on a mesh with explicit axes; else None."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else sharding


def parts_of_axis(x: jax.Array, axis: int) -> int:
    """Over how many devices an axis is sharded on a mesh with explicit axes."""
    sharding = explicit(x)
    if sharding is None:
        return 1
    return math.prod(sharding.mesh.shape[name] for name in _names(sharding, x.shape)[axis])


def in_one_part(x: jax.Array, *axes: int) -> jax.Array:
    """The same array with these axes replicated, on a mesh with explicit axes."""
    if all(parts_of_axis(x, axis) == 1 for axis in axes):
        return x
    sharding = explicit(x)
    replicated = [axis % x.ndim for axis in axes]
    names = [() if a in replicated else n for a, n in enumerate(_names(sharding, x.shape))]
    return jax.sharding.reshard(x, _with_names(sharding, names))


def reshaped(x: jax.Array, shape: Sequence[int], axes: Sequence[int | None]) -> jax.Array:
    """Another shape. On a mesh with explicit axes, `axes` names for each new axis the axis of `x`
    that it is sharded as; None for an axis that is not sharded."""
    sharding = explicit(x)
    if sharding is None:
        return x.reshape(shape)
    names = _names(sharding, x.shape)
    out_sharding = _with_names(sharding, [() if a is None else names[a] for a in axes])
    return jax.lax.reshape(x, shape, out_sharding=out_sharding)


def as_sharded(x: jax.Array, other: jax.Array) -> jax.Array:
    """The same array sharded as another one is, on a mesh with explicit axes."""
    sharding = explicit(other)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


# --- Inside jax.shard_map -------------------------------------------------------------------------


def over_shards(reduce: Callable[[jax.Array, Any], jax.Array], part: Any, leaf: jax.Array) -> Any:
    """`reduce`, such as `jax.lax.psum`, of what each device computed of its shard of a leaf."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual and not varying_axes(jax.lax.axis_index(manual[0])):
        raise ValueError(
            "A sum over a leaf needs to know whether the leaf is sharded: give jax.shard_map "
            "check_vma=True, its default, or call this stage outside of it. (jax.pmap is a "
            "shard_map with check_vma=False: use jax.jit or jax.shard_map instead.)"
        )
    axes = varying_axes(leaf)
    return reduce(part, axes) if axes else part


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """The axes of the mesh along which devices hold different values, by the type of `x`."""
    kind: Any = jax.typeof(x)
    return tuple(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)
