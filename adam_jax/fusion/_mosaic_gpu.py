"""Kernels for NVIDIA's GPUs, in Mosaic GPU: the rows of a tile one by one.

A program computes one tile of a leaf. The GPU's copy engine (TMA) brings the tile to shared memory
and takes the results back, and crops at the end of the leaf. In between each thread goes through
the rows of one column: the elements of a block lie in one column, so no thread needs anything of
another. Where few programs fit on a multiprocessor, several warpgroups share the rows of a tile.

What depends on a whole block, as a code does on the largest number of its block, needs a second
pass over the rows. It computes again what it needs of the first one, from shared memory: all of it
would not fit in registers, and to write it down would cost more.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax.fusion import _elementwise, _jax
from adam_jax.fusion._graph import Equation, Value
from adam_jax.fusion._kernel import Kernel, as_array, numbers, tile_count, widened
from adam_jax.fusion._tiles import Expansion, Location, Reduction

COLUMNS = 128  # of a tile: one for each thread of a warpgroup
SHARED = 227 * 1024  # bytes of shared memory that a multiprocessor has for its programs
FEW = 64 * 1024  # bytes of a tile: of three programs one waits for its tile while others compute
WARPGROUPS = 8  # of a multiprocessor, with 64 registers for each thread
MOST_ROWS = 256  # of a tile: what one copy takes
MOST_AXES = 5  # of an array that is copied
MOST_TILES = 65535  # along an axis of the grid but the last


@dataclass(frozen=True)
class MosaicGpu:
    """Emits kernels in Mosaic GPU.

    Attributes:
      interpret: False on a device, else how Pallas interprets the kernel.
    """

    interpret: Any = False

    def tile_shape(self, kernel: Kernel, lengths: tuple[int, ...]) -> tuple[int, ...] | None:
        """As many rows as are few bytes, or one block. A row of a leaf must be whole tiles."""
        lengths = kernel.seen(lengths)
        if (
            not kernel.has_blocks_of_rows
            or not 2 <= len(lengths) <= MOST_AXES
            or math.prod(lengths) >= 2**31
            or lengths[-1] % COLUMNS
            or any(v.dtype == bool for v in (*kernel.reads, *kernel.writes))
        ):
            return None
        rows, ahead = lengths[-2], (1,) * (len(lengths) - 2)
        height = kernel.block
        while 2 * height <= MOST_ROWS and Plan(kernel, 2 * height).shared_bytes <= FEW:
            height *= 2
        # Mosaic crops a copy of whole rows at the end of a stack, not at the end of each matrix.
        whole = ahead and lengths[-1] == COLUMNS
        while whole and rows % height and height > kernel.block:
            height //= 2
        height = min(height, rows)
        if whole and rows % height:
            return None
        tile_shape = (*ahead, height, COLUMNS)
        few = max(tile_count(lengths, tile_shape)[:-1]) <= MOST_TILES and height <= MOST_ROWS
        return tile_shape if few and Plan(kernel, height).shared_bytes <= SHARED else None

    def launch(
        self,
        kernel: Kernel,
        tile_shape: tuple[int, ...],
        scalars: Sequence[Any],
        arrays: Sequence[Any],
        offset: Any = None,
    ) -> tuple[Any, ...]:
        pl, gpu = _jax.pallas(), _jax.backend("mosaic_gpu")
        plan = Plan(kernel, tile_shape[-2])
        whole = kernel.lengths(arrays)
        lengths, like = kernel.seen(whole), arrays[0]
        given = [*numbers(scalars), *([] if offset is None else [offset])]
        array_of = {
            v: x.reshape(kernel.seen(x.shape)) for v, x in zip(kernel.reads, arrays, strict=True)
        }
        # What is written in place is a mutable array of JAX, which takes the buffer of the array.
        in_place = {v: jax.new_ref(array_of[v]) for v in plan.replaced}
        grid = tile_count(lengths, tile_shape)
        axes = tuple(f"tile{axis}" for axis in range(len(grid)))

        def adam_jax(*refs):
            """The references of all operands, then of all results, then of shared memory."""
            rest = iter(refs)
            take = lambda values: {v: next(rest) for v in values}  # noqa: E731
            number_refs = [next(rest) for _ in given]
            sources = take(v for v in kernel.reads if v not in in_place) | take(in_place)
            targets = take(plan.new) | {w: sources[v] for v, w in plan.replaced.items()}
            tile = take(kernel.reads)
            results = take(plan.apart) | {w: tile[v] for w, v in plan.over.items()}
            partial, arrived, together = take(plan.reductions), next(rest), next(rest)
            index = [jax.lax.axis_index(axis) for axis in axes]
            me = jax.lax.axis_index("warpgroup")

            def part(value):
                """Where the tile is in an array."""
                shape = kernel.part_of(value, tile_shape)
                slices = [pl.ds(i * n, n) for i, n in zip(index[-2:], shape[-2:], strict=True)]
                return (*index[:-2], *slices)

            @pl.when(me == 0)
            def _():
                for value, source in sources.items():
                    gpu.copy_gmem_to_smem(source.at[part(value)], tile[value], arrived)

            starts = [i * n for i, n in zip(index, tile_shape, strict=True)]
            height = jnp.minimum(tile_shape[-2], lengths[-2] - starts[-2])
            if offset is not None:
                starts = [start + number_refs[-1][axis] for axis, start in enumerate(starts)]
            scalar_refs = zip(kernel.scalars, number_refs, strict=False)
            known = _elementwise.with_own(kernel.own, {v: ref[0] for v, ref in scalar_refs})
            rows = Rows(plan, known, tile, partial, results, starts, height)
            rows.clear(me)
            gpu.barrier_wait(arrived)
            first = me * plan.chunk
            last = jnp.minimum(first + plan.chunk, height)
            for number in range(plan.passes):
                jax.lax.fori_loop(first, last, functools.partial(rows.compute, number), None)
                if number == plan.passes - 1:
                    gpu.commit_smem()
                gpu.barrier_arrive(together.at[number])
                gpu.barrier_wait(together.at[number])

            @pl.when(me == 0)
            def _():
                for value, target in targets.items():
                    gpu.copy_smem_to_gmem(results[value], target.at[part(value)])
                gpu.wait_smem_to_gmem(0, wait_read_only=True)

        made = gpu.kernel(
            adam_jax,
            out_type=[_jax.array_type(kernel.part_of(v, lengths), v.dtype, like) for v in plan.new],
            scratch_types=[
                *(gpu.SMEM(plan.shape_of(v), v.dtype) for v in (*kernel.reads, *plan.apart)),
                *(gpu.SMEM(plan.partial_shape(v), jnp.int32) for v in plan.reductions),
                gpu.Barrier(num_arrivals=len(kernel.reads)),
                gpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.passes),
            ],
            grid=grid,
            grid_names=axes,
            num_threads=plan.warpgroups,
            thread_name="warpgroup",
            compiler_params=gpu.CompilerParams(
                # How an array lies in the threads is given by how it is loaded. To infer it from
                # all equations takes seconds for a kernel.
                lowering_semantics=gpu.LoweringSemantics.Lane,
                # Between two passes no thread reads what another one wrote.
                unsafe_no_auto_barriers=True,
            ),
            interpret=self.interpret or None,
        )(*given, *(x for v, x in array_of.items() if v not in in_place), *in_place.values())
        result_of = dict(zip(plan.new, made, strict=True))
        result_of |= {plan.replaced[v]: jax.freeze(ref) for v, ref in in_place.items()}
        return tuple(result_of[v].reshape(kernel.shape_of(v, whole)) for v in kernel.writes)


class Plan:
    """What a kernel keeps in shared memory, and which pass over the rows computes what.

    Args:
      kernel: the kernel.
      height: how many rows a tile has.

    Attributes:
      reductions: the results of the equations between the passes.
      pass_of: for each value the first pass that can know it.
      passes: how many there are.
      replaced: for each array that is read and replaced, the one that takes its buffer.
      new: the arrays that are written to new buffers.
      over: the results that overwrite in shared memory what they replace.
      apart: the others. What a block shares must not be overwritten by the first row of it.
      warpgroups: how many share the rows.
      chunk: how many rows each of them has.
    """

    def __init__(self, kernel: Kernel, height: int):
        self.kernel, self.height = kernel, height
        self.reductions: list[Value] = []
        self.pass_of: dict[Value, int] = {}
        for equation in kernel.body:
            (result,) = equation.outputs
            values = [x for x in equation.inputs if isinstance(x, Value)]
            self.pass_of[result] = max((self.pass_of.get(x, 0) for x in values), default=0)
            if isinstance(equation.tile_operation, Reduction):
                self.reductions.append(result)
                self.pass_of[result] += 1
        self.passes = 1 + max(n for v, n in self.pass_of.items() if self.block_of(v) == 1)
        self.replaced = {v: w for w, v in kernel.replaces.items()}
        self.new = [v for v in kernel.writes if v not in kernel.replaces]
        self.over = {w: v for w, v in kernel.replaces.items() if self.block_of(w) == 1}
        self.apart = [v for v in kernel.writes if v not in self.over]
        # A power of two of rows each. What the last pass reduces, none finds in parts.
        self.warpgroups, self.chunk = 1, 1 << (height - 1).bit_length()
        programs = SHARED // self.shared_bytes
        late = [self.block_of(v) for v in self.reductions if self.pass_of[v] == self.passes]
        while 2 * self.warpgroups * programs <= WARPGROUPS and self.chunk > max(late, default=1):
            self.warpgroups, self.chunk = 2 * self.warpgroups, self.chunk // 2

    def block_of(self, value: Value) -> int:
        return self.kernel.block_of.get(value, 1)

    def shape_of(self, value: Value) -> tuple[int, ...]:
        """The shape of a value's tile."""
        return self.kernel.part_of(value, (self.height, COLUMNS))

    def parts_of_block(self, value: Value) -> int:
        """How many warpgroups share a block of a reduction."""
        return max(1, min(self.block_of(value) // self.chunk, self.warpgroups))

    def partial_shape(self, value: Value) -> tuple[int, int]:
        """One row for each block of a reduction, and each warpgroup that shares it."""
        own = max(1, self.chunk // self.block_of(value))
        return self.warpgroups * own, COLUMNS

    @property
    def shared_bytes(self) -> int:
        """How much shared memory a program takes."""
        arrays = [*self.kernel.reads, *self.apart]
        partial = sum(math.prod(self.partial_shape(v)) * 4 for v in self.reductions)
        return partial + sum(math.prod(self.shape_of(v)) * v.dtype.itemsize for v in arrays)

    @functools.cached_property
    def equations(self) -> list[list[Equation]]:
        """For each pass what it needs: for contributions to reductions, the last for results."""
        return [self._equations(number) for number in range(self.passes)]

    def _equations(self, number: int) -> list[Equation]:
        needed = {v for v in self.reductions if self.pass_of[v] == number + 1}
        if number == self.passes - 1:
            needed.update(self.kernel.writes)
        kept = []
        for equation in reversed(self.kernel.body):
            (result,) = equation.outputs
            if result in needed:
                kept.append(equation)
                if result not in self.reductions or self.pass_of[result] > number:
                    needed.update(x for x in equation.inputs if isinstance(x, Value))
        return kept[::-1]


@dataclass(frozen=True)
class Rows:
    """The rows of a tile in shared memory.

    Attributes:
      plan: what is computed when.
      known: the scalars.
      tile: for each array that is read the reference of its tile.
      partial: for each reduction the reference of what the rows so far contributed.
      results: for each array that is written the reference of its tile.
      starts: the index in the leaf of the first element of the tile, along each axis.
      height: how many rows of the tile lie in the leaf.
    """

    plan: Plan
    known: dict[Value, Any]
    tile: dict[Value, Any]
    partial: dict[Value, Any]
    results: dict[Value, Any]
    starts: list[Any]
    height: Any

    def clear(self, me: Any) -> None:
        """Nothing is contributed yet. Each warpgroup has a place of its own for contributions."""
        for ref in self.partial.values():
            own = ref.shape[0] // self.plan.warpgroups

            def clear(i, _, ref=ref):
                ref[i] = jnp.zeros(COLUMNS, jnp.int32)

            jax.lax.fori_loop(me * own, (me + 1) * own, clear, None)

    def compute(self, number: int, row: Any, _: None) -> None:
        """What a pass computes of a row."""
        known = dict(self.known)
        for equation in self.plan.equations[number]:
            (result,) = equation.outputs
            known[result] = self._result(number, row, equation, known)
        if number < self.plan.passes - 1:
            return
        for block in sorted({self.plan.block_of(v) for v in self.results}):
            end_of_block = ((row + 1) & (block - 1) == 0) | (row + 1 == self.height)

            @_jax.pallas().when(True if block == 1 else end_of_block)
            def _(block=block):
                for value, ref in self.results.items():
                    if self.plan.block_of(value) == block:
                        ref[_divided(row, block)] = known[value]

    def _result(self, number: int, row: Any, equation: Equation, known: dict[Value, Any]) -> Any:
        operation, (result,) = equation.tile_operation, equation.outputs
        if isinstance(operation, Location):
            index = [*self.starts[:-2], self.starts[-2] + row, self.starts[-1] + _columns()]
            return operation.at(index, self.plan.kernel.seen(self.plan.kernel.shape))
        if isinstance(operation, Reduction):
            if self.plan.pass_of[result] > number:
                (x,), block = self._inputs(row, equation, known), equation.params["block"]
                x = operation.each(x, row & (block - 1), block)
                own = _divided(row, min(self.plan.block_of(result), self.plan.chunk))
                self.partial[result][own] = operation.combine(self.partial[result][own], x)
            count = self.plan.parts_of_block(result)
            first = _divided(row, self.plan.block_of(result)) * count
            parts = [self.partial[result][first + n] for n in range(count)]
            return operation.finish(functools.reduce(operation.combine, parts))
        inputs = self._inputs(row, equation, known)
        if isinstance(operation, Expansion):
            (x,), block = inputs, equation.params["block"]
            return operation.each(widened(x), row & (block - 1), block).astype(x.dtype)
        return _elementwise.on_tile(equation, inputs)

    def _inputs(self, row: Any, equation: Equation, known: dict[Value, Any]) -> list[Any]:
        """One element for each column. A row of scales or of packed codes serves a block."""
        for x in equation.inputs:
            if isinstance(x, Value) and x not in known:
                known[x] = self.tile[x][_divided(row, self.plan.block_of(x))]
        values = [(known[x], x) if isinstance(x, Value) else (x, x) for x in equation.inputs]
        return [as_array(x, value, (COLUMNS,)) for x, value in values]


def _columns() -> Any:
    """The index of each column, in the thread that computes the column."""
    gpu = _jax.backend("mosaic_gpu")
    layout = gpu.Layout.WG_STRIDED((COLUMNS,), vec_size=1)
    return gpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (COLUMNS,), 0), layout)


def _divided(row: Any, block: int) -> Any:
    """Without remainder, by a power of two: in one instruction."""
    return row >> np.int32(block.bit_length() - 1) if block > 1 else row
