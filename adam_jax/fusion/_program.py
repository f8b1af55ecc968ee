"""The equations of a step, sorted into one kernel for each large leaf.

A local chain treats every element of a leaf, or every block of elements, by itself. So the
equations that JAX traces on whole leaves hold for a tile of a leaf too, and they are the body of
a kernel (`_kernel.py`). No kernel is written for any optimizer. `Program` sorts them:

    between scalars, and of small leaves     XLA computes them, outside of the kernels
    between the arrays of one large leaf     the kernel of this leaf, with seeds of its own
    anything else                            is not local: refused, with the name of its stage
"""

import functools
import math
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from adam_jax._numerics import SMALL
from adam_jax.fusion._graph import IDENTITIES, DisjointSets, Equation, Value, inlined
from adam_jax.fusion._jax import Jaxpr, as_function
from adam_jax.fusion._kernel import Emitter, Kernel
from adam_jax.fusion._tiles import Expansion, Reduction, wide_axes

DTYPES = {"float32", "bfloat16", "int32", "uint32", "int16", "uint16", "int8", "uint8", "bool"}


class Program:
    """A step, sorted.

    Args:
      jaxpr: the step, traced on whole leaves. Its inputs here are its arguments, then what it
        closes over.
      gradients: which of its arguments are the gradients, one for each leaf.
    """

    def __init__(self, jaxpr: Jaxpr, gradients: Sequence[int]):
        self.jaxpr = jaxpr
        self.inputs = [Value(var.aval) for var in (*jaxpr.invars, *jaxpr.constvars)]
        equations, self.outputs = inlined(jaxpr, self.inputs)
        self.equations = _needed(equations, self.outputs)
        # An array made of scalars alone has equal elements: one of them stands for it.
        self.uniform = {v for v in self.inputs if not v.shape}
        self.same_leaf = DisjointSets()
        self.same_shape = DisjointSets()  # within a leaf: of one block length
        for equation in self.equations:
            repeats = equation.elementwise or equation.primitive.name == "broadcast_in_dim"
            made_of_scalars = repeats and all(map(self.is_uniform, equation.inputs))
            self.uniform.update(v for v in equation.outputs if made_of_scalars or not v.shape)
            self.same_leaf.union(self.arrays(equation))
            if equation.elementwise:
                self.same_shape.union(self.arrays(equation))
        bodies: dict[Value, list[Equation]] = {}
        for equation in self.equations:
            for value in self.arrays(equation)[:1]:
                bodies.setdefault(self.same_leaf.find(value), []).append(equation)
        self.constants: dict[Value, Any] = {}
        own = self._own()
        self.kernels: dict[Value, Kernel] = {}
        for gradient in (self.inputs[index] for index in gradients):
            leaf = self.same_leaf.find(gradient)
            body = bodies.get(leaf, [])
            dtypes = {str(v.dtype) for equation in body for v in self.arrays(equation)}
            if body and math.prod(gradient.shape) >= SMALL and dtypes <= DTYPES:
                if leaf in self.kernels:
                    raise ValueError(
                        "adam_jax fuses chains that treat every leaf by itself, and this one has "
                        "equations between several leaves. Chain those outside of what is fused."
                    )
                self.kernels[leaf] = self._kernel(gradient, own.get(leaf, []), body)

    def _own(self) -> dict[Value, list[Equation]]:
        """The equations between integer scalars that a single leaf needs, for each such leaf.

        The seed of random bits is made so. XLA would launch a kernel for every seed. Integers are
        the same wherever they are computed, which is not promised of floats. A constant that is
        added tells the leaves apart, so it becomes a scalar that is given to their common kernel.
        """
        own: dict[Value, list[Equation]] = {}
        needed_by: dict[Value, set[Value | None]] = {v: {None} for v in self._values(self.outputs)}
        for n, equation in reversed([*enumerate(self.equations)]):
            leaves: set[Value | None] = {self.same_leaf.find(v) for v in self.arrays(equation)[:1]}
            if not leaves:
                leaves = set().union(*(needed_by.get(v, set()) for v in equation.outputs))
                leaf, *others = leaves
                if leaf is None or others or not _of_integers(equation):
                    leaves = {None}
                else:
                    if equation.primitive.name == "add":
                        inputs = [self._lifted(x) for x in equation.inputs]
                        equation = self.equations[n] = equation._replace(inputs=inputs)
                    own.setdefault(leaf, []).insert(0, equation)
            for value in self._values(equation.inputs):
                needed_by.setdefault(value, set()).update(leaves)
        return own

    def _lifted(self, x: Any) -> Value:
        """A constant as a scalar."""
        if isinstance(x, Value):
            return x
        value = Value(jax.typeof(x))
        self.constants[value] = x
        self.uniform.add(value)
        return value

    def _kernel(self, gradient: Value, own: list[Equation], body: list[Equation]) -> Kernel:
        """The kernel of a leaf, if the equations are local."""
        equations = [*own, *body]
        made = {v for equation in equations for v in equation.outputs}
        used = [v for equation in equations for v in equation.inputs if isinstance(v, Value)]
        used = list(dict.fromkeys(v for v in used if v not in made))
        reads = [v for v in used if v not in self.uniform]
        axis, block_of = self._blocks(gradient, body)
        kernel = Kernel(
            shape=gradient.shape,
            gradient=gradient,
            own=own,
            body=body,
            scalars=[v for v in used if v in self.uniform],
            reads=reads,
            writes=[v for v in dict.fromkeys(self._values(self.outputs)) if v in made],
            # The results of a step take the buffers of its first inputs, one by one.
            replaces={
                result: argument
                for result, argument in zip(self.outputs, self.inputs, strict=False)
                if isinstance(result, Value) and result in made and argument in reads
                if (argument.shape, argument.dtype) == (result.shape, result.dtype)
            },
            axis=axis,
            block_of={v: block_of.get(self.same_shape.find(v), 1) for v in (*made, *used)},
        )
        for equation in body:
            for value in self.arrays(equation):
                whole = kernel.shape_of(value, kernel.shape)
                if value.shape != whole or any(map(np.ndim, equation.inputs)):
                    equation.refuse()
        return kernel

    def _blocks(self, gradient: Value, body: list[Equation]) -> tuple[int | None, dict[Value, int]]:
        """The axis that blocks lie along, and how many elements share one.

        The latter for what stands for a set of arrays of the same shape.
        """
        axes: list[int | None] = []
        lengths: dict[Value, int] = {}
        for equation in body:
            operation = equation.tile_operation
            if not isinstance(operation, Reduction | Expansion):
                if operation is None and not equation.elementwise:
                    equation.refuse()
                continue
            (value,) = equation.outputs if isinstance(operation, Reduction) else equation.inputs
            axes.append(equation.params["axis"])
            length = equation.params["block"]
            known = lengths.setdefault(self.same_shape.find(value), length)
            if axes[0] != axes[-1] or known != length:
                equation.refuse()
        return axes[0] if axes else wide_axes(gradient.shape)[-2:][0], lengths

    def stage_in(self, message: str) -> str:
        """The stage of an equation that a message names."""
        words = set(re.findall(r"\w+", message))
        body = [equation for kernel in self.kernels.values() for equation in kernel.body]
        return next((e.stage for e in body if e.primitive.name in words), "a stage")

    def is_uniform(self, value: Any) -> bool:
        return value in self.uniform if isinstance(value, Value) else np.ndim(value) == 0

    def arrays(self, equation: Equation) -> list[Value]:
        """The inputs and outputs of an equation that are arrays of a leaf."""
        values = self._values((*equation.inputs, *equation.outputs))
        return [v for v in values if v not in self.uniform]

    @staticmethod
    def _values(atoms: Sequence[Any]) -> list[Value]:
        """Without the constants."""
        return [x for x in atoms if isinstance(x, Value)]

    def plain(self, *arguments: Any) -> list[Any]:
        """The results of the step, without kernels."""
        arity = len(self.jaxpr.invars)
        return as_function(self.jaxpr, arguments[arity:])(*arguments[:arity])

    def run(
        self, emitter: Emitter, launch: Callable[..., Any], arguments: Sequence[Any]
    ) -> list[Any]:
        """The results of the step.

        Args:
          emitter: makes the kernels.
          launch: called as `launch(kernel, tile_shape, scalars, arrays)`. Kernels that compute the
            same are one function, which is traced, lowered and compiled once.
          arguments: the arguments of the step, then what it closes over.
        """
        tiles = {k: emitter.tile_shape(k, k.shape) for k in self.kernels.values()}
        kernels = {kernel: tile for kernel, tile in tiles.items() if tile}
        inside = {id(equation) for kernel in kernels for equation in (*kernel.own, *kernel.body)}
        known = dict(zip(self.inputs, arguments, strict=True)) | self.constants
        elements = {v: x for v, x in known.items() if v in self.uniform}  # one of equal elements
        for equation in self.equations:
            if id(equation) in inside:
                continue
            _compute(equation, known)
            if self.uniform.issuperset(equation.outputs):
                _compute_element(equation, known, elements)
        launches: dict[Hashable, Callable[..., Any]] = {}
        for kernel, tile in kernels.items():
            scalars = [elements[value] for value in kernel.scalars]
            arrays = [known[value] for value in kernel.reads]
            once = launches.setdefault(kernel.key, jax.jit(functools.partial(launch, kernel, tile)))
            results = once(scalars, arrays)
            known.update(zip(kernel.writes, results, strict=True))
        return [known[v] if isinstance(v, Value) else v for v in self.outputs]


def _of_integers(equation: Equation) -> bool:
    """Whether a kernel can compute it of scalars, and to the same bits."""
    dtypes = {str(x.dtype) for x in (*equation.inputs, *equation.outputs)}
    repeats = equation.elementwise or equation.primitive.name == "broadcast_in_dim"
    return repeats and dtypes <= {"int32", "uint32"}


def _needed(equations: list[Equation], outputs: Sequence[Any]) -> list[Equation]:
    """The equations that the outputs depend on."""
    needed = {v for v in outputs if isinstance(v, Value)}
    kept = []
    for equation in reversed(equations):
        if not needed.isdisjoint(equation.outputs):
            needed.update(v for v in equation.inputs if isinstance(v, Value))
            kept.append(equation)
    return kept[::-1]


def _compute(equation: Equation, known: dict[Value, Any]) -> None:
    """Add the results of an equation to the values that are known."""
    inputs = [known[x] if isinstance(x, Value) else x for x in equation.inputs]
    results = equation.primitive.bind(*inputs, **equation.params)
    several = equation.primitive.multiple_results
    known.update(zip(equation.outputs, results if several else [results], strict=True))


def _compute_element(
    equation: Equation, known: dict[Value, Any], elements: dict[Value, Any]
) -> None:
    """For an equation whose results have equal elements: add one element of each."""
    if all(v.shape == () for v in equation.outputs):
        elements.update((v, known[v]) for v in equation.outputs)
    elif equation.elementwise and equation.primitive.name not in IDENTITIES:
        _compute(equation, elements)
    else:  # broadcast or of another type, but equal
        (x,) = equation.inputs
        elements[equation.outputs[0]] = elements[x] if isinstance(x, Value) else x
