"""Kernels of sharded leaves: every device runs the kernel of its part, and nothing is moved.

XLA does not partition a kernel by itself, it would gather the leaf. Inside `jax.shard_map` there is
nothing to do: a part is a leaf there.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from adam_jax._kernel import Leaf, Value


def call(
    leaf: Leaf,
    tile: tuple[int, ...],
    platform: str,
    interpret: bool,
    scalars: Sequence[Any],
    arrays: Sequence[Any],
) -> list[Any]:
    """`leaf.call`, which XLA may partition as the arrays are sharded."""
    number = len(scalars)

    @custom_partitioning
    def kernel(*operands):
        return leaf.call(tile, platform, interpret, operands[:number], operands[number:])

    def partition(mesh, operands, results):
        spec = _common(leaf, [operand.sharding for operand in operands[number:]])
        names = [name if isinstance(name, tuple) else (name,) * (name is not None) for name in spec]
        parts = [math.prod(mesh.shape[name] for name in each) for each in names]
        grain = max(leaf.grains.values(), default=1)
        for axis, (length, count) in enumerate(zip(leaf.shape, parts, strict=True)):
            whole = count * (grain if axis == leaf.axis else 1)
            if count > 1 and length % whole:
                raise ValueError(
                    f"adam_jax.fuse: a leaf of shape {leaf.shape} is sharded as {spec}, and axis "
                    f"{axis} is no multiple of {whole}, {count} shards of whole blocks. Shard "
                    f"another axis, or call the step inside jax.shard_map."
                )
        lengths = [n // count for n, count in zip(leaf.shape, parts, strict=True)]

        def local(*operands):
            corner = [
                jax.lax.axis_index(each) * n if each else 0
                for each, n in zip(names, lengths, strict=True)
            ]
            size = leaf.tile(platform, lengths) or tile
            return leaf.call(
                size,
                platform,
                interpret,
                operands[:number],
                operands[number:],
                jnp.asarray(corner, jnp.int32),
            )

        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        replicated = NamedSharding(mesh, PartitionSpec())
        shardings = [replicated] * number + [sharding] * len(arrays)
        return mesh, local, [sharding] * len(leaf.writes), tuple(shardings)

    kernel.def_partition(partition=partition, sharding_rule=_rule(leaf, number))
    mesh = jax.typeof(arrays[0]).sharding.mesh
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return kernel(*scalars, *arrays)
    with jax.sharding.use_abstract_mesh(mesh):
        specs = [value.aval.sharding.spec for value in leaf.writes]
        return jax.sharding.auto_axes(kernel, out_sharding=specs)(*scalars, *arrays)


@functools.cache
def marker() -> Any:
    """What tells JAX, in a parameter of an equation, that its lowering needs to know the devices."""
    identity = custom_partitioning(lambda x: x)
    identity.def_partition(
        partition=lambda mesh, operands, result: (mesh, lambda x: x, result.sharding, operands),
        sharding_rule="i -> i",
    )
    return jax.make_jaxpr(identity)(np.zeros(1, np.float32))


def _common(leaf: Leaf, shardings: Sequence[Any]) -> tuple:
    """How the leaf is sharded: as its arrays are, of which some may be whole on every device."""
    found: dict[tuple, Value] = {}
    for value, sharding in zip(leaf.reads, shardings, strict=True):
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"adam_jax.fuse: a leaf of shape {leaf.shape} is sharded as {sharding}, which "
                f"names no mesh. Call the step inside jax.shard_map."
            )
        spec = (*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec)))
        if any(name is not None for name in spec) and value is not leaf.gradient:
            found[spec] = value
    if len(found) > 1:
        raise ValueError(
            f"adam_jax.fuse: the arrays of a leaf of shape {leaf.shape} are sharded as "
            f"{' and as '.join(map(str, found))}. Shard the state as the parameters are, or call the "
            f"step inside jax.shard_map."
        )
    return next(iter(found), (None,) * len(leaf.shape))


def _rule(leaf: Leaf, number: int) -> str:
    """Which axes of operands and results are the same, for XLA's propagation of shardings."""

    def axes(value):
        coarse = value.shape != leaf.shape
        letters = [chr(ord("a") + a) for a in range(len(leaf.shape))]
        if coarse:
            letters[leaf.axis] = f"g{leaf.grains[leaf.program.alike.root(value)]}"
        return " ".join(letters)

    operands = [""] * number + [axes(value) for value in leaf.reads]
    return f"{', '.join(operands)} -> {', '.join(map(axes, leaf.writes))}"
