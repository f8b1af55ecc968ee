"""Kernels for TPUs, and in Triton for the GPUs of older jax: all rows of a tile at once.

The grid of a kernel is the tiles of the leaf. Both backends take `pallas_call`, which brings a tile
to the kernel. Elementwise equations hold for a tile as they are.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._numerics import SMALL
from adam_jax.fusion import _elementwise, _jax
from adam_jax.fusion._graph import Equation, Value
from adam_jax.fusion._kernel import Kernel, as_array, numbers, tile_count, widened
from adam_jax.fusion._tiles import Expansion, Location, Reduction

LARGEST_BLOCK = 512  # of more rows than this a tile would have too few columns


@dataclass(frozen=True)
class Tpu:
    """Emits kernels for TPUs.

    Attributes:
      interpret: False on a device, else how Pallas interprets the kernel.
    """

    interpret: Any = False

    def tile_shape(self, kernel: Kernel, lengths: tuple[int, ...]) -> tuple[int, ...] | None:
        """Mosaic needs multiples of (8, 128) or whole axes, of every array."""
        lengths = kernel.seen(lengths)
        if not _fits(kernel, lengths) or len(lengths) == 1:
            return None
        rows, columns = lengths[-2:]
        # XLA lays a matrix out by columns where that pads less, and would copy it for a kernel.
        padded = lambda a, b: -(-a // 8) * 8 * -(-b // 128) * 128  # noqa: E731
        if padded(rows, columns) > padded(columns, rows) or rows * columns < SMALL:
            return None
        height = max(256, 8 * kernel.block)
        width = min(columns, max(128, 2**16 // height))  # Mosaic unrolls a tile
        return (*(1 for _ in lengths[:-2]), height, width)

    def launch(
        self,
        kernel: Kernel,
        tile_shape: tuple[int, ...],
        scalars: Sequence[Any],
        arrays: Sequence[Any],
        offset: Any = None,
    ) -> tuple[Any, ...]:
        tpu = _jax.backend("tpu")
        semantics = ("parallel",) * len(tile_shape)
        options = {
            "interpret": self.interpret,
            "compiler_params": tpu.CompilerParams(dimension_semantics=semantics),
        }
        in_smem = {"memory_space": tpu.SMEM}
        return _launch(kernel, tile_shape, scalars, arrays, offset, None, in_smem, options)


@dataclass(frozen=True)
class Triton:
    """Emits kernels in Triton.

    Attributes:
      interpret: False on a device, else how Pallas interprets the kernel.
    """

    interpret: Any = False

    def tile_shape(self, kernel: Kernel, lengths: tuple[int, ...]) -> tuple[int, ...] | None:
        """Triton needs powers of two."""
        lengths = kernel.seen(lengths)
        if not _fits(kernel, lengths):
            return None
        if len(lengths) == 1:
            return (SMALL,)
        width = min(_power_of_two(lengths[-1]), 128)
        height = max(min(_power_of_two(lengths[-2]), SMALL // width), kernel.block)
        return (*(1 for _ in lengths[:-2]), height, width)

    def launch(
        self,
        kernel: Kernel,
        tile_shape: tuple[int, ...],
        scalars: Sequence[Any],
        arrays: Sequence[Any],
        offset: Any = None,
    ) -> tuple[Any, ...]:
        triton = _jax.backend("triton")
        options = {
            "interpret": self.interpret,
            "compiler_params": triton.CompilerParams(num_warps=8),
        }
        return _launch(kernel, tile_shape, scalars, arrays, offset, triton, {}, options)


def _fits(kernel: Kernel, lengths: tuple[int, ...]) -> bool:
    blocks = kernel.has_blocks_of_rows and kernel.block <= LARGEST_BLOCK
    return blocks and math.prod(lengths) < 2**31


def _power_of_two(n: int) -> int:
    """The least one from n on."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Tile:
    """The tile of a leaf that a kernel works on.

    Arrays of a tile have the last two axes of those the kernel sees, or the only one, so blocks lie
    along their axis 0.

    Attributes:
      shape: the shape of the tile.
      index: which tile it is, along each axis of the leaf.
      lengths: the shape of what the kernel works on: the leaf, or a shard of it.
      offset: where in the leaf that shard begins, along each axis; zeros for a whole leaf.
    """

    shape: tuple[int, ...]
    index: list[Any]
    lengths: tuple[int, ...]
    offset: Any

    def positions(self) -> list[Any]:
        """The index in the leaf of every element of the tile, along each axis."""
        rows = self.shape[-2:]
        starts = [i * n + o for i, n, o in zip(self.index, self.shape, self.offset, strict=True)]
        ahead = len(starts) - len(rows)
        along = [jax.lax.broadcasted_iota(jnp.int32, rows, axis) for axis in range(len(rows))]
        return [*starts[:ahead], *(s + a for s, a in zip(starts[ahead:], along, strict=True))]

    def reduced(self, operation: Reduction, x: Any, block: int) -> Any:
        """One element for each block. What lies beyond the leaf contributes nothing: zeros."""
        axis, rows = max(len(self.lengths) - 2, 0), len(x)
        row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        parts = operation.each(x, row & (block - 1), block)
        if self.lengths[axis] % rows:
            inside = self.index[axis] * rows + row < self.lengths[axis]
            parts = jnp.where(inside, parts, jnp.zeros_like(parts))
        in_blocks = parts.reshape(-1, block, *x.shape[1:])
        if operation.combine is jnp.maximum:
            return operation.finish(jnp.max(in_blocks, 1))
        return operation.finish(jnp.sum(in_blocks, 1, dtype=jnp.int32))

    def expanded(self, operation: Expansion, x: Any, block: int) -> Any:
        """One element for each row of a block."""
        shape = (len(x), block, *x.shape[1:])
        repeated = jnp.broadcast_to(jnp.expand_dims(widened(x), 1), shape)
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        return operation.each(repeated, row, block).reshape(-1, *x.shape[1:]).astype(x.dtype)


def _launch(
    kernel: Kernel,
    tile_shape: tuple[int, ...],
    scalars: Sequence[Any],
    arrays: Sequence[Any],
    offset: Any,
    masking: Any,
    memory_of_numbers: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Any, ...]:
    """`Emitter.launch` by `pallas_call`.

    Args:
      kernel: as there, and the next four arguments.
      masking: the backend, if it reads and writes beyond the leaf unless it is told not to.
      memory_of_numbers: where scalars lie, for their `BlockSpec`.
      options: for `pallas_call`.
    """
    pl = _jax.pallas()
    given = [*numbers(scalars), *([] if offset is None else [offset])]
    whole = kernel.lengths(arrays)
    lengths, like = kernel.seen(whole), arrays[0]
    arrays = [x.reshape(kernel.seen(x.shape)) for x in arrays]

    def on_tile(*refs):
        """Pallas gives the references of all operands, then those of all results."""
        number_refs, array_refs = refs[: len(given)], refs[len(given) :]
        axes = range(len(tile_shape))
        tile = Tile(
            shape=tile_shape,
            index=[pl.program_id(axis) for axis in axes],
            lengths=lengths,
            offset=[0 if offset is None else number_refs[-1][axis] for axis in axes],
        )
        mask = functools.partial(_mask, kernel, tile) if masking else lambda _: None
        scalar_refs = zip(kernel.scalars, number_refs, strict=False)
        known = _elementwise.with_own(kernel.own, {v: ref[0] for v, ref in scalar_refs})
        for value, ref in zip(kernel.reads, array_refs, strict=False):
            known[value] = _loaded(masking, ref, mask(value))
        _compute(kernel, tile, known)
        for value, ref in zip(kernel.writes, array_refs[len(kernel.reads) :], strict=True):
            _store(masking, ref, known[value], mask(value))

    operand_of = {value: len(given) + n for n, value in enumerate(kernel.reads)}
    aliases = {
        operand_of[kernel.replaces[value]]: n
        for n, value in enumerate(kernel.writes)
        if value in kernel.replaces
    }
    blocks = functools.partial(_block_spec, kernel, tile_shape)
    # Under x64 Pallas's own index of a whole array has 64 bits, which Mosaic lacks.
    first = lambda *_: (np.int32(0),)  # noqa: E731
    call = pl.pallas_call(
        on_tile,
        grid=tile_count(lengths, tile_shape),
        in_specs=[
            *(pl.BlockSpec(x.shape, first, **memory_of_numbers) for x in given),
            *map(blocks, kernel.reads),
        ],
        out_specs=list(map(blocks, kernel.writes)),
        out_shape=[
            _jax.array_type(kernel.part_of(v, lengths), v.dtype, like) for v in kernel.writes
        ],
        input_output_aliases=aliases,
        name="adam_jax",
        **options,
    )
    results = call(*given, *arrays)
    return tuple(
        x.reshape(kernel.shape_of(v, whole)) for v, x in zip(kernel.writes, results, strict=True)
    )


def _compute(kernel: Kernel, tile: Tile, known: dict[Value, Any]) -> None:
    """Add the results of the equations to the values that are known."""
    for equation in kernel.body:
        (result,) = equation.outputs
        known[result] = _result(kernel, tile, equation, known)


def _result(kernel: Kernel, tile: Tile, equation: Equation, known: dict[Value, Any]) -> Any:
    operation = equation.tile_operation
    if isinstance(operation, Location):
        return operation.at(tile.positions(), kernel.seen(kernel.shape))
    shape_like = equation.inputs[0] if operation else equation.outputs[0]
    shape = kernel.part_of(shape_like, tile.shape)[-2:]
    inputs = [as_array(known[x] if isinstance(x, Value) else x, x, shape) for x in equation.inputs]
    if isinstance(operation, Reduction):
        return tile.reduced(operation, inputs[0], equation.params["block"])
    if isinstance(operation, Expansion):
        return tile.expanded(operation, inputs[0], equation.params["block"])
    return _elementwise.on_tile(equation, inputs)


def _block_spec(kernel: Kernel, tile_shape: tuple[int, ...], value: Value) -> Any:
    """The part of an array that belongs to a tile, without leading axes of length 1."""
    shape = kernel.part_of(value, tile_shape)
    squeezed = (None,) * max(len(shape) - 2, 0)
    return _jax.pallas().BlockSpec((*squeezed, *shape[-2:]), lambda *index: index)


def _mask(kernel: Kernel, tile: Tile, value: Value) -> Any:
    """Which elements of a tile of an array lie in the leaf; None for all."""
    shape, lengths = (kernel.part_of(value, n)[-2:] for n in (tile.shape, tile.lengths))
    index = tile.index[-2:]
    masks = [
        index[a] * n + jax.lax.broadcasted_iota(jnp.int32, shape, a) < lengths[a]
        for a, n in enumerate(shape)
        if lengths[a] % n
    ]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _loaded(backend: Any, ref: Any, mask: Any) -> Any:
    if mask is None:
        return ref[...]
    return backend.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _store(backend: Any, ref: Any, x: Any, mask: Any) -> None:
    if mask is None:
        ref[...] = x
    else:
        backend.store(ref, x, mask=mask)
