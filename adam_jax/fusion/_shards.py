"""Kernels of sharded leaves: every device runs the kernel of its shard, and moves no data.

XLA does not partition a kernel by itself, it would gather the leaf. On a mesh with explicit axes
the shardings are part of the types, so it is known here which shard a device has. Inside
`jax.shard_map` there is nothing to do: a shard is a leaf there.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from adam_jax.fusion._kernel import Emitter, Kernel


def launch_on_shards(
    emitter: Emitter,
    kernel: Kernel,
    tile_shape: tuple[int, ...],
    scalars: Sequence[Any],
    arrays: Sequence[Any],
) -> Sequence[Any]:
    """`emitter.launch` on arrays that may be sharded over explicit axes of a mesh."""
    shardings = [jax.typeof(x).sharding for x in arrays]
    mesh = shardings[0].mesh
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return emitter.launch(kernel, tile_shape, scalars, arrays)
    common = _common_spec(kernel, shardings)
    mesh_axes, lengths = _shard(kernel, mesh, common)
    spec = PartitionSpec(*common)
    along = [(mesh_axes[axis], lengths[axis]) for axis in kernel.axes]
    shard_tile = emitter.tile_shape(kernel, lengths) or tile_shape

    def on_shard(scalars, arrays):
        offset = [jax.lax.axis_index(names) * length if names else 0 for names, length in along]
        return emitter.launch(kernel, shard_tile, scalars, arrays, jnp.asarray(offset, jnp.int32))

    sharded = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(PartitionSpec(), spec),
        out_specs=spec,
        check_vma=False,
    )
    return sharded(scalars, [jax.sharding.reshard(x, spec) for x in arrays])


def _common_spec(kernel: Kernel, shardings: Sequence[Any]) -> tuple:
    """How a leaf is sharded: as its arrays are, of which some may be replicated.

    JAX refuses equations between arrays that are sharded otherwise.
    """
    axes = len(kernel.shape)
    specs = [(*s.spec, *[None] * (axes - len(s.spec))) for s in shardings]
    return next((spec for spec in specs if spec.count(None) < axes), (None,) * axes)


def _shard(
    kernel: Kernel, mesh: Any, spec: Sequence[Any]
) -> tuple[list[tuple[str, ...]], tuple[int, ...]]:
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
    return mesh_axes, tuple(n // count for n, count in zip(kernel.shape, counts, strict=True))
