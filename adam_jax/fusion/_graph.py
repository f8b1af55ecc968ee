"""The equations of a step, read from its jaxpr and from the jaxprs that it calls."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from adam_jax.fusion._jax import Literal
from adam_jax.fusion._tiles import OPERATIONS, TileOperation

# The elementwise equations of JAX.
ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "complex", "conj", "convert_element_type",
    "cos", "cosh", "div", "eq", "erf", "erf_inv", "exp", "exp2", "expm1", "floor", "ge",
    "gt", "imag", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max",
    "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow", "real", "reduce_precision",
    "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub",
    "tan", "tanh", "xor",
}  # fmt: skip
CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
         "custom_vjp_call_jaxpr", "checkpoint", "remat2"}  # fmt: skip
# The value of their input: the first two change the type only, along which mesh axes it varies.
IDENTITIES = {"pvary", "pcast", "copy", "optimization_barrier"}


class Value:
    """An array of a step, before it is computed."""

    def __init__(self, aval: Any):
        self.shape, self.dtype, self.aval = aval.shape, aval.dtype, aval


class Equation(NamedTuple):
    """An equation of a step.

    Attributes:
      primitive: what is computed.
      params: the parameters of the primitive.
      inputs: values or constants.
      outputs: values.
      sources: where the equation was written, then where the calls around it were.
    """

    primitive: Any
    params: dict[str, Any]
    inputs: list[Any]
    outputs: list[Value]
    sources: tuple

    @property
    def tile_operation(self) -> TileOperation | None:
        return OPERATIONS.get(self.primitive)

    @property
    def elementwise(self) -> bool:
        return self.primitive.name in ELEMENTWISE | IDENTITIES

    @property
    def stage(self) -> str:
        """The name of the stage, or of the storage, that the equation is part of."""
        return _stage(self.sources)

    def refuse(self) -> None:
        raise ValueError(
            f"adam_jax fuses chains that treat every element or block of a large leaf by itself, "
            f"and {self.stage} does not: it has the equation {self.primitive.name!r}. {REMEDY}; in "
            f"place of a storage take another, such as adam_jax.storage.int8()."
        )

    def refuse_in_kernels(self, which: str) -> None:
        raise ValueError(
            f"adam_jax.fuse: {self.stage} has the equation {self.primitive.name!r} {which}, which "
            f"a kernel would compute otherwise than the chain does. {REMEDY}."
        )


REMEDY = (
    "Fuse the chain without it: a stage at an end of the chain goes outside, as in "
    "optax.chain(optax.clip_by_global_norm(1.0), adam_jax.fuse(...))"
)

# The functions of a stage and of a storage, made by the function that it is named after.
STAGE = re.compile(r"(\w+)\.<locals>\.(?:update|update_fn|save|load)")


def _stage(sources: Sequence[Any]) -> str:
    """The innermost stage or storage around an equation: the frames begin at the equation."""
    for i, source in enumerate(sources):
        for frame in source.traceback.frames if source.traceback else ():
            if match := STAGE.fullmatch(frame.function_name):
                if match[1] not in ("stateless", "to_updates"):
                    return match[1]
                # `signal` makes these stages, and names them in their scope.
                scopes = [str(outer.name_stack).rpartition("/")[2] for outer in sources[i:]]
                return next(filter(None, scopes), match[1])
    return "a stage"


def inlined(
    closed: Any, inputs: Sequence[Any], sources: tuple = ()
) -> tuple[list[Equation], list[Any]]:
    """The equations of a jaxpr and of all that it calls, and its results.

    The inputs are those of its arguments, then those of what it closes over.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    env = dict(zip((*jaxpr.invars, *jaxpr.constvars), inputs, strict=True))
    equations: list[Equation] = []

    def read(atom: Any) -> Any:
        if isinstance(atom, Literal):
            aval: Any = atom.aval
            return np.asarray(atom.val, aval.dtype)
        return env[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        results: list[Any] = [Value(var.aval) for var in eqn.outvars]
        around = (eqn.source_info, *sources)
        if eqn.primitive.name in CALLS:
            called = next(
                eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params
            )
            consts = getattr(called, "consts", ())
            inside, results = inlined(called, [*operands, *consts], around)
            equations += inside
        elif eqn.primitive.name == "optimization_barrier":  # of several leaves: one for each value
            for operand, result in zip(operands, results, strict=True):
                equations.append(Equation(eqn.primitive, {}, [operand], [result], around))
        else:
            equations.append(Equation(eqn.primitive, eqn.params, operands, results, around))
        env.update(zip(eqn.outvars, results, strict=True))
    return equations, [read(atom) for atom in jaxpr.outvars]


class DisjointSets:
    """Sets of values that are united one by one (union-find)."""

    def __init__(self) -> None:
        self.parent: dict[Value, Value] = {}

    def find(self, value: Value) -> Value:
        """The member that stands for the set of a value."""
        while value in self.parent:
            value = self.parent[value]
        return value

    def union(self, values: Iterable[Value]) -> None:
        members = list(dict.fromkeys(map(self.find, values)))
        self.parent.update((other, members[0]) for other in members[1:])
