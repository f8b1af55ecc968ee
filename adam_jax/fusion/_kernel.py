"""The kernel of a large leaf computes the equations of its chain, tile by tile, in Pallas.

Elementwise equations hold for a tile as they are, and tile operations have a form for it
(`_tiles.py`). The grid of the kernel is the tiles of the leaf. Scalars are computed outside of the
kernel and given to it.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from adam_jax._numerics import SMALL
from adam_jax.fusion import _elementwise
from adam_jax.fusion._graph import Equation, Value
from adam_jax.fusion._tiles import Tile, in_blocks, wide_axes

BACKENDS = {"cuda": "triton", "tpu": "tpu"}  # the modules of Pallas
LARGEST_BLOCK = 512  # of more rows than this a tile would have too few columns


@dataclass(frozen=True, eq=False)
class Kernel:
    """The kernel of one leaf.

    Attributes:
      shape: the shape of the leaf.
      gradient: the gradient of the leaf.
      body: the equations.
      scalars: the scalars that the equations need; an array of equal elements counts as one.
      reads: the arrays that the equations need.
      writes: the arrays that they make.
      replaces: for an array that is written, the one that is read whose buffer it takes.
      axis: the axis that the blocks lie along; None where all elements are one vector.
      block_of: for every array, how many elements of the leaf along the axis of the blocks share
        one of its elements: 1, or more for scales and for codes packed into bytes.
    """

    shape: tuple[int, ...]
    gradient: Value
    body: list[Equation]
    scalars: list[Value]
    reads: list[Value]
    writes: list[Value]
    replaces: dict[Value, Value]
    axis: int | None
    block_of: dict[Value, int]

    @property
    def axes(self) -> list[int]:
        """The axes of the leaf that the kernel sees: those longer than 1."""
        return wide_axes(self.shape)

    @property
    def block(self) -> int:
        """The longest block, which the others divide."""
        return max(self.block_of.values(), default=1)

    def shape_of(self, value: Value, lengths: Sequence[int]) -> tuple[int, ...]:
        """The shape of an array where that of the leaf or of a shard of it is `lengths`."""
        return in_blocks(lengths, self.axis, self.block_of.get(value, 1))

    def _seen(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of an array that the kernel sees: without the axes of length 1 of the leaf."""
        return tuple(shape[axis] for axis in self.axes)

    def _part_of(self, value: Value, lengths: Sequence[int]) -> tuple[int, ...]:
        """The part of an array that a kernel sees, where it sees `lengths` of the leaf."""
        return in_blocks(lengths, max(len(lengths) - 2, 0), self.block_of.get(value, 1))

    def tile_shape(self, platform: str, lengths: Sequence[int] = ()) -> tuple[int, ...] | None:
        """The shape of a tile, None where XLA does better or blocks do not fit."""
        lengths = self._seen(lengths or self.shape)
        block = self.block
        if block & (block - 1) or block > LARGEST_BLOCK or math.prod(lengths) >= 2**31:
            return None
        if block > 1 and self.axis != self.axes[-2:][0]:
            return None
        last_axes = (_triton_tile if platform == "cuda" else _mosaic_tile)(lengths, block)
        return last_axes and (*(1 for _ in lengths[:-2]), *last_axes)

    def launch(
        self,
        platform: str,
        interpret: Any,
        tile_shape: tuple[int, ...],
        scalars: Sequence[Any],
        arrays: Sequence[Any],
        offset: Any = None,
    ) -> tuple[Any, ...]:
        """What the kernel makes of the arrays of the leaf, or of the shard that begins at `offset`.

        Args:
          platform: "cuda" or "tpu".
          interpret: False on a device, else how Pallas interprets the kernel.
          tile_shape: what the method of this name gives.
          scalars: one for each of `scalars`.
          arrays: one for each of `reads`.
          offset: one int32 for each of `axes`; None for the whole leaf.
        """
        backend = importlib.import_module(f"jax.experimental.pallas.{BACKENDS[platform]}")
        numbers = [jnp.reshape(x.astype(np.int32) if x.dtype == bool else x, (1,)) for x in scalars]
        numbers += [] if offset is None else [offset]
        if platform == "tpu":
            memory_of_numbers = {"memory_space": backend.SMEM}
            semantics = ("parallel",) * len(tile_shape)
            compiler_params = backend.CompilerParams(dimension_semantics=semantics)
        else:
            memory_of_numbers = {}
            compiler_params = backend.CompilerParams(num_warps=8)
        whole = next(
            x.shape for v, x in zip(self.reads, arrays, strict=True) if v.shape == self.shape
        )
        lengths, varying = self._seen(whole), _varying(arrays[0])
        arrays = [x.reshape(self._seen(x.shape)) for x in arrays]

        def on_tile(*refs):
            """Pallas gives the references of all operands, then those of all results."""
            number_refs, array_refs = refs[: len(numbers)], refs[len(numbers) :]
            tile = Tile(
                shape=tile_shape,
                index=[pl.program_id(axis) for axis in range(len(tile_shape))],
                leaf_shape=self._seen(self.shape),
                lengths=lengths,
                offset=None if offset is None else number_refs[-1],
            )
            masks = functools.partial(self._mask, tile) if platform == "cuda" else lambda _: None
            known = {v: ref[0] for v, ref in zip(self.scalars, number_refs, strict=False)}
            for value, ref in zip(self.reads, array_refs, strict=False):
                known[value] = _loaded(backend, ref, masks(value))
            self._compute(tile, known)
            for value, ref in zip(self.writes, array_refs[len(self.reads) :], strict=True):
                _store(backend, ref, known[value], masks(value))

        operand_of = {value: len(numbers) + n for n, value in enumerate(self.reads)}
        aliases = {
            operand_of[self.replaces[value]]: n
            for n, value in enumerate(self.writes)
            if value in self.replaces
        }
        blocks = functools.partial(self._block_spec, tile_shape)
        kernel = pl.pallas_call(
            on_tile,
            grid=tuple(-(-n // t) for n, t in zip(lengths, tile_shape, strict=True)),
            # Under x64 Pallas's own index of a whole array has 64 bits, which Mosaic lacks.
            in_specs=[
                *(
                    pl.BlockSpec(x.shape, lambda *_: (np.int32(0),), **memory_of_numbers)
                    for x in numbers
                ),
                *map(blocks, self.reads),
            ],
            out_specs=list(map(blocks, self.writes)),
            out_shape=[
                jax.ShapeDtypeStruct(self._part_of(v, lengths), v.dtype, **varying)
                for v in self.writes
            ],
            input_output_aliases=aliases,
            interpret=interpret,
            compiler_params=compiler_params,
            name="adam_jax",
        )
        results = kernel(*numbers, *arrays)
        return tuple(
            x.reshape(self.shape_of(v, whole)) for v, x in zip(self.writes, results, strict=True)
        )

    def _block_spec(self, tile_shape: tuple[int, ...], value: Value) -> pl.BlockSpec:
        """The part of an array that belongs to a tile, without leading axes of length 1."""
        shape = self._part_of(value, tile_shape)
        squeezed = (None,) * max(len(shape) - 2, 0)
        return pl.BlockSpec((*squeezed, *shape[-2:]), lambda *index: index)

    def _mask(self, tile: Tile, value: Value) -> Any:
        """Which elements of a tile of an array lie in the leaf; None for all.

        Triton reads and writes beyond the leaf unless it is told not to. Mosaic does not.
        """
        shape, lengths = (self._part_of(value, n)[-2:] for n in (tile.shape, tile.lengths))
        index = tile.index[-2:]
        masks = [
            index[a] * n + jax.lax.broadcasted_iota(jnp.int32, shape, a) < lengths[a]
            for a, n in enumerate(shape)
            if lengths[a] % n
        ]
        return functools.reduce(jnp.logical_and, masks) if masks else None

    def _compute(self, tile: Tile, known: dict[Value, Any]) -> None:
        """Add the results of the equations to the values that are known."""
        for equation in self.body:
            (result,) = equation.outputs
            operation, inputs = equation.tile_operation, []
            for x in equation.inputs:
                shape = self._part_of(x if operation else result, tile.shape)[-2:]
                inputs.append(_as_array(known[x] if isinstance(x, Value) else x, x, shape))
            if operation:
                known[result] = operation.on_tile(tile, *inputs, **equation.params)
            else:
                known[result] = _elementwise.on_tile(equation, inputs)


def _triton_tile(lengths: tuple[int, ...], block: int) -> tuple[int, ...]:
    """Triton needs powers of two."""
    if len(lengths) == 1:
        return (SMALL,)
    width = min(_power_of_two(lengths[-1]), 128)
    height = max(min(_power_of_two(lengths[-2]), SMALL // width), block)
    return height, width


def _mosaic_tile(lengths: tuple[int, ...], block: int) -> tuple[int, ...] | None:
    """Mosaic needs multiples of (8, 128) or whole axes, of every array."""
    if len(lengths) == 1:
        return None
    rows, columns = lengths[-2:]
    # XLA lays a matrix out by columns where that pads less, and would copy it for a kernel.
    padded = lambda a, b: -(-a // 8) * 8 * -(-b // 128) * 128  # noqa: E731
    if padded(rows, columns) > padded(columns, rows) or rows * columns < SMALL:
        return None
    height = max(256, 8 * block)
    return height, min(columns, max(128, 2**16 // height))  # Mosaic unrolls a tile


def _power_of_two(n: int) -> int:
    """The least one from n on."""
    return 1 << (n - 1).bit_length()


def _varying(x: Any) -> dict[str, Any]:
    """Along which axes of a mesh an array varies inside `jax.shard_map`: a part of its type."""
    names = ("vma", "manual_axis_type")  # until jax 0.11, and since
    known = inspect.signature(jax.ShapeDtypeStruct).parameters
    return {name: getattr(jax.typeof(x), name) for name in names if name in known}


def _loaded(backend: Any, ref: Any, mask: Any) -> Any:
    if mask is None:
        return ref[...]
    return backend.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _store(backend: Any, ref: Any, x: Any, mask: Any) -> None:
    if mask is None:
        ref[...] = x
    else:
        backend.store(ref, x, mask=mask)


def _as_array(x: Any, value: Any, shape: tuple[int, ...]) -> Any:
    """An array of equal elements for a scalar: Mosaic broadcasts numbers, but no booleans."""
    if np.ndim(x):
        return x
    if value.dtype == bool:
        return jnp.full(shape, x, jnp.int32) != 0
    return jnp.full(shape, x, value.dtype)
