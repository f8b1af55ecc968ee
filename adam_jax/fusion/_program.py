"""A chain as kernels, one for each large leaf: which equations of a step belong into which kernel.

A local chain treats every element of a leaf, or every block of elements, by itself. So the
equations that JAX traces on whole leaves hold for a tile of a leaf too, and they are the body of
a Pallas kernel (`_kernel.py`). No kernel is written for any optimizer. `Program` sorts them:

    between scalars, and of small leaves     XLA computes them, outside of the kernels
    between the arrays of one large leaf     the kernel of this leaf
    anything else                            is not local: refused, with the name of its stage
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from adam_jax.fusion._graph import TYPES, Equation, Joined, Value, inlined
from adam_jax.fusion._kernel import LARGE, Leaf

DTYPES = {"float32", "bfloat16", "int32", "uint32", "int16", "uint16", "int8", "uint8", "bool"}


class Program:
    """A step, sorted.

    Args:
      jaxpr: the step, traced on whole leaves; its inputs here are its arguments, then what it
        closes over.
      leaves: which of its arguments are the leaves, one of each: the gradients.
    """

    def __init__(self, jaxpr: Jaxpr, leaves: Sequence[int]):
        self.jaxpr = jaxpr
        self.inputs = [Value(var.aval) for var in (*jaxpr.invars, *jaxpr.constvars)]
        equations, self.outputs = inlined(jaxpr, self.inputs)
        needed = {v for v in self.outputs if isinstance(v, Value)}
        self.equations: list[Equation] = []
        for equation in reversed(equations):
            if not needed.isdisjoint(equation.outputs):
                needed.update(v for v in equation.inputs if isinstance(v, Value))
                self.equations.append(equation)
        self.equations.reverse()
        # An array made of scalars alone has equal elements: one of them stands for it.
        self.uniform = {v for v in self.inputs if not v.shape}
        self.leaf, self.alike = Joined(), Joined()
        for equation in self.equations:
            spreads = equation.elementwise or equation.primitive.name == "broadcast_in_dim"
            made_of_scalars = spreads and all(map(self.is_uniform, equation.inputs))
            self.uniform.update(v for v in equation.outputs if made_of_scalars or not v.shape)
            self.leaf.join(self.arrays(equation))
            if equation.elementwise:
                self.alike.join(self.arrays(equation))
        bodies: dict[Value, list[Equation]] = {}
        for equation in self.equations:
            for value in self.arrays(equation)[:1]:
                bodies.setdefault(self.leaf.root(value), []).append(equation)
        self.leaves: dict[Value, Leaf] = {}
        for value in (self.inputs[number] for number in leaves):
            root = self.leaf.root(value)
            body = bodies.get(root, [])
            dtypes = {str(v.dtype) for equation in body for v in self.arrays(equation)}
            if body and math.prod(value.shape) >= LARGE and dtypes <= DTYPES:
                if root in self.leaves:
                    raise ValueError(
                        "adam_jax fuses chains that treat every leaf by itself, and this one has "
                        "equations between several leaves. Chain those outside of what is fused."
                    )
                self.leaves[root] = self._leaf(value, body)

    def _leaf(self, gradient: Value, body: list[Equation]) -> Leaf:
        """A large leaf, if its equations are local."""
        grain_of: dict[Value, int] = {}
        for equation in body:
            if not equation.elementwise and not equation.own:
                equation.refuse()
            if equation.grained:
                value, grain = equation.grained
                if grain_of.setdefault(self.alike.root(value), grain) != grain:
                    equation.refuse()
        made = {v for equation in body for v in equation.outputs}
        used = {v: None for e in body for v in e.inputs if isinstance(v, Value) and v not in made}
        grains = {v: grain_of.get(self.alike.root(v), 1) for v in (*made, *used)}
        reads = [v for v in used if v not in self.uniform]
        # The results of a step take the place of its first inputs, one by one.
        leaf = Leaf(
            shape=gradient.shape,
            gradient=gradient,
            body=body,
            scalars=[v for v in used if v in self.uniform],
            reads=reads,
            writes=list(
                dict.fromkeys(v for v in self.outputs if isinstance(v, Value) and v in made)
            ),
            replaces={
                new: old
                for new, old in zip(self.outputs, self.inputs, strict=False)
                if isinstance(new, Value) and new in made and old in reads
                if (old.shape, old.dtype) == (new.shape, new.dtype)
            },
            grains=grains,
        )
        for equation in body:
            for v in self.arrays(equation):
                if v.shape != leaf.cut(v, leaf.shape) or any(map(np.ndim, equation.inputs)):
                    equation.refuse()
        return leaf

    def is_uniform(self, value: Any) -> bool:
        return value in self.uniform if isinstance(value, Value) else np.ndim(value) == 0

    def arrays(self, equation: Equation) -> list[Value]:
        """What an equation has of leaves."""
        both = (*equation.inputs, *equation.outputs)
        return [v for v in both if isinstance(v, Value) and v not in self.uniform]

    def plain(self, *arguments: Any) -> list[Any]:
        """The results of the step, without kernels."""
        number = len(self.jaxpr.invars)
        closed = ClosedJaxpr(self.jaxpr, arguments[number:])
        return jaxpr_as_fun(closed)(*arguments[:number])

    def run(self, platform: str, call: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
        """Its results, where `call(leaf, tile, scalars, arrays)` calls the kernel of a leaf."""
        tiles = {leaf: leaf.tile(platform) for leaf in self.leaves.values()}
        kernels = {leaf: tile for leaf, tile in tiles.items() if tile}
        inside = {id(equation) for leaf in kernels for equation in leaf.body}
        known = dict(zip(self.inputs, arguments, strict=True))
        one = {v: x for v, x in known.items() if v in self.uniform}  # element of a uniform array

        def compute(equation, known):
            operands = [known[v] if isinstance(v, Value) else v for v in equation.inputs]
            results = equation.primitive.bind(*operands, **equation.params)
            several = equation.primitive.multiple_results
            known.update(zip(equation.outputs, results if several else [results], strict=True))

        for equation in self.equations:
            if id(equation) in inside:
                continue
            compute(equation, known)
            if not self.uniform.issuperset(equation.outputs):
                continue
            if all(v.shape == () for v in equation.outputs):
                one.update((v, known[v]) for v in equation.outputs)
            elif equation.elementwise and equation.primitive.name not in TYPES:
                compute(equation, one)
            else:
                (value,) = equation.inputs
                one[equation.outputs[0]] = one[value] if isinstance(value, Value) else value
        for leaf, tile in kernels.items():
            scalars = [one[value] for value in leaf.scalars]
            results = call(leaf, tile, scalars, [known[value] for value in leaf.reads])
            known.update(zip(leaf.writes, results, strict=True))
        return [known[v] if isinstance(v, Value) else v for v in self.outputs]
