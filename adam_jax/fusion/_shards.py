"""Kernels of sharded leaves: every device runs the kernel of its part, and nothing is moved.

XLA does not partition a kernel by itself, it would gather the leaf. Inside `jax.shard_map` there is
nothing to do: a part is a leaf there.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from adam_jax.fusion._kernel import Leaf


def call(
    leaf: Leaf,
    tile: tuple[int, ...],
    platform: str,
    interpret: bool,
    scalars: Sequence[Any],
    arrays: Sequence[Any],
) -> Sequence[Any]:
    """`leaf.call`, of arrays that may be sharded."""
    number = len(scalars)

    def whole(*operands):
        return leaf.call(tile, platform, interpret, operands[:number], operands[number:])

    def part(mesh, spec) -> Callable[..., Any]:
        names, lengths = _parts(leaf, mesh, spec)
        size = leaf.tile(platform, lengths) or tile

        def local(*operands):
            corner = [
                jax.lax.axis_index(each) * n if each else 0
                for each, n in zip(names, lengths, strict=True)
            ]
            scalars, arrays = operands[:number], operands[number:]
            place = jnp.asarray(corner, jnp.int32)
            return leaf.call(size, platform, interpret, scalars, arrays, place)

        return local

    def partition(mesh, operands, results):
        spec = _common(leaf, [operand.sharding for operand in operands[number:]])
        every, one = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), spec))
        shardings = (every,) * number + (one,) * len(arrays)
        return mesh, part(mesh, spec), (one,) * len(leaf.writes), shardings

    shardings = [jax.typeof(x).sharding for x in arrays]
    mesh = shardings[0].mesh
    if jax.sharding.AxisType.Explicit in mesh.axis_types:  # the types tell how they are sharded
        spec = PartitionSpec(*_common(leaf, shardings))
        sharded = jax.shard_map(
            part(mesh, spec),
            mesh=mesh,
            in_specs=(*(PartitionSpec() for _ in scalars), *(spec for _ in arrays)),
            out_specs=tuple(spec for _ in leaf.writes),
            check_vma=False,
        )
        return sharded(*scalars, *(jax.sharding.reshard(x, spec) for x in arrays))
    kernel = custom_partitioning(whole)  # XLA tells it when it partitions
    kernel.def_partition(partition=partition, sharding_rule=_rule(leaf, number))
    return kernel(*scalars, *arrays)


def _common(leaf: Leaf, shardings: Sequence[Any]) -> tuple:
    """How a leaf is sharded: as its arrays are, of which some may be whole on every device."""
    found = {}
    for value, sharding in zip(leaf.reads, shardings, strict=True):
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"adam_jax.fuse: a leaf of shape {leaf.shape} is sharded as {sharding}, which "
                f"names no mesh. Call the step inside jax.shard_map."
            )
        spec = (*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec)))
        if spec.count(None) < len(spec) and value is not leaf.gradient:
            found[spec] = value
    if len(found) > 1:
        several = " and as ".join(map(str, found))
        raise ValueError(
            f"adam_jax.fuse: the parameter and the state of a leaf of shape {leaf.shape} are "
            f"sharded as {several}. Shard them alike, or call the step inside jax.shard_map."
        )
    return next(iter(found), (None,) * len(leaf.shape))


def _parts(leaf: Leaf, mesh: Any, spec: Sequence[Any]) -> tuple[list[tuple], list[int]]:
    """The mesh axes that each axis of a leaf lies on, and the shape of a part."""
    names = [name if isinstance(name, tuple) else (name,) * (name is not None) for name in spec]
    parts = [math.prod(mesh.shape[name] for name in each) for each in names]
    for axis, (length, count) in enumerate(zip(leaf.shape, parts, strict=True)):
        block = max(leaf.grains.values(), default=1) if axis == leaf.axis else 1
        if count > 1 and length % (count * block):
            raise ValueError(
                f"adam_jax.fuse: axis {axis} of a leaf of shape {leaf.shape} is sharded over "
                f"{spec[axis]!r} and is no multiple of {count} shards of blocks of {block}. Shard "
                f"another axis, or call the step inside jax.shard_map."
            )
    return names, [length // count for length, count in zip(leaf.shape, parts, strict=True)]


def _rule(leaf: Leaf, number: int) -> str:
    """Which axes of operands and results are the same, by which XLA propagates shardings."""

    def axes(value):
        names = [f"a{a}" for a in range(len(leaf.shape))]
        names[leaf.axis] += f"b{leaf.grains.get(value, 1)}"
        return " ".join(names)

    operands = [""] * number + [axes(value) for value in leaf.reads]
    return f"{', '.join(operands)} -> {', '.join(map(axes, leaf.writes))}"


@functools.cache
def needs_devices() -> Any:
    """A jaxpr that tells JAX, as a parameter of an equation, to lower it knowing the devices.

    It has an equation of `custom_partitioning`, for which JAX looks before it lowers.
    """
    identity = custom_partitioning(lambda x: x)
    identity.def_partition(
        partition=lambda mesh, operands, result: (
            mesh, lambda x: x, result.sharding, (operands[0].sharding,)
        ),
        sharding_rule="i -> i",
    )  # fmt: skip
    return jax.make_jaxpr(identity)(np.zeros(1, np.float32))
