"""Kernels of sharded leaves: every device runs the kernel of its shard, and moves no data.

XLA does not partition a kernel by itself, it would gather the leaf. Inside `jax.shard_map` there is
nothing to do: a shard is a leaf there.
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

from adam_jax.fusion._kernel import Kernel


def launch_on_shards(
    platform: str,
    interpret: Any,
    kernel: Kernel,
    tile_shape: tuple[int, ...],
    scalars: Sequence[Any],
    arrays: Sequence[Any],
) -> Sequence[Any]:
    """`kernel.launch` on arrays that may be sharded."""
    scalar_count = len(scalars)

    def on_leaf(*operands):
        scalars, arrays = operands[:scalar_count], operands[scalar_count:]
        return kernel.launch(platform, interpret, tile_shape, scalars, arrays)

    def on_shard(mesh, spec) -> Callable[..., Any]:
        mesh_axes, lengths = _shard(kernel, mesh, spec)
        along = [(mesh_axes[axis], lengths[axis]) for axis in kernel.axes]
        shard_tile = kernel.tile_shape(platform, lengths) or tile_shape

        def run(*operands):
            offset = [jax.lax.axis_index(names) * length if names else 0 for names, length in along]
            scalars, arrays = operands[:scalar_count], operands[scalar_count:]
            return kernel.launch(
                platform, interpret, shard_tile, scalars, arrays, jnp.asarray(offset, jnp.int32)
            )

        return run

    def partition(mesh, operands, results):
        spec = _common_spec(kernel, [operand.sharding for operand in operands[scalar_count:]])
        replicated, sharded = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), spec))
        shardings = (replicated,) * scalar_count + (sharded,) * len(arrays)
        return mesh, on_shard(mesh, spec), (sharded,) * len(kernel.writes), shardings

    shardings = [jax.typeof(x).sharding for x in arrays]
    mesh = shardings[0].mesh
    if jax.sharding.AxisType.Explicit in mesh.axis_types:  # shardings are part of the types
        spec = PartitionSpec(*_common_spec(kernel, shardings))
        sharded = jax.shard_map(
            on_shard(mesh, spec),
            mesh=mesh,
            in_specs=(*(PartitionSpec() for _ in scalars), *(spec for _ in arrays)),
            out_specs=tuple(spec for _ in kernel.writes),
            check_vma=False,
        )
        return sharded(*scalars, *(jax.sharding.reshard(x, spec) for x in arrays))
    partitioned = custom_partitioning(on_leaf)  # XLA gives the shardings when it partitions
    partitioned.def_partition(
        partition=partition, sharding_rule=_sharding_rule(kernel, scalar_count)
    )
    return partitioned(*scalars, *arrays)


def _common_spec(kernel: Kernel, shardings: Sequence[Any]) -> tuple:
    """How a leaf is sharded: as its arrays are, of which some may be replicated."""
    specs = set()
    for value, sharding in zip(kernel.reads, shardings, strict=True):
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"adam_jax.fuse: a leaf of shape {kernel.shape} is sharded as {sharding}, which "
                f"names no mesh. Call the step inside jax.shard_map."
            )
        spec = (*sharding.spec, *[None] * (len(kernel.shape) - len(sharding.spec)))
        if spec.count(None) < len(spec) and value is not kernel.gradient:
            specs.add(spec)
    if len(specs) > 1:
        several = " and as ".join(sorted(map(str, specs)))
        raise ValueError(
            f"adam_jax.fuse: the parameter and the state of a leaf of shape {kernel.shape} are "
            f"sharded as {several}. Shard them alike, or call the step inside jax.shard_map."
        )
    return next(iter(specs), (None,) * len(kernel.shape))


def _shard(kernel: Kernel, mesh: Any, spec: Sequence[Any]) -> tuple[list[tuple], list[int]]:
    """The mesh axes that each axis of a leaf is sharded over, and the shape of a shard."""
    mesh_axes = [name if isinstance(name, tuple) else (name,) * (name is not None) for name in spec]
    counts = [math.prod(mesh.shape[name] for name in names) for names in mesh_axes]
    for axis, (length, count) in enumerate(zip(kernel.shape, counts, strict=True)):
        block = kernel.block if axis == kernel.axis else 1
        if count > 1 and length % (count * block):
            raise ValueError(
                f"adam_jax.fuse: axis {axis} of a leaf of shape {kernel.shape} is sharded over "
                f"{spec[axis]!r} and is no multiple of {count} shards of blocks of {block}. Shard "
                f"another axis, or call the step inside jax.shard_map."
            )
    return mesh_axes, [n // count for n, count in zip(kernel.shape, counts, strict=True)]


def _sharding_rule(kernel: Kernel, scalar_count: int) -> str:
    """Which axes of operands and results are the same, by which XLA propagates shardings."""

    def axes(value):
        suffix = {kernel.axis: f"b{kernel.block_of.get(value, 1)}"}
        return " ".join(f"a{axis}{suffix.get(axis, '')}" for axis in range(len(kernel.shape)))

    operands = [""] * scalar_count + [axes(value) for value in kernel.reads]
    return f"{', '.join(operands)} -> {', '.join(map(axes, kernel.writes))}"


@functools.cache
def jaxpr_that_needs_devices() -> Any:
    """A dummy equation of `custom_partitioning`, so that JAX keeps the device assignment.

    JAX looks for one in the equations of a function and in their parameters before it lowers the
    function, and only then tells the lowering the devices. Ours arise in the lowering: too late.
    """
    identity = custom_partitioning(lambda x: x)
    identity.def_partition(
        partition=lambda mesh, operands, result: (
            mesh, lambda x: x, result.sharding, (operands[0].sharding,)
        ),
        sharding_rule="i -> i",
    )  # fmt: skip
    return jax.make_jaxpr(identity)(np.zeros(1, np.float32))
