"""The equations of a step: read from its jaxpr, with all that it calls."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

from adam_jax.fusion._tiles import OWN

# Equations that make an element of the result of the elements in the same place.
ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "complex", "conj", "convert_element_type",
    "copy", "cos", "cosh", "div", "eq", "erf", "erf_inv", "exp", "exp2", "expm1", "floor", "ge",
    "gt", "imag", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max",
    "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow", "real", "reduce_precision",
    "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub",
    "tan", "tanh", "xor",
}  # fmt: skip
CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
         "custom_vjp_call_jaxpr", "checkpoint"}  # fmt: skip
TYPES = {"pvary", "pcast"}  # equations of types alone: what varies within jax.shard_map


class Value:
    """An array of a step, before it is computed."""

    def __init__(self, aval: Any):
        self.shape, self.dtype, self.aval = aval.shape, aval.dtype, aval


class Equation(NamedTuple):
    """An equation of a step."""

    primitive: Any
    params: dict[str, Any]
    inputs: list[Any]  # values or constants
    outputs: list[Value]
    traces: tuple  # where it was written, then the calls around it

    @property
    def own(self) -> list[str]:
        """The name and the integers of an `own_equation`."""
        name = str(self.params.get("name", ""))
        return name.removeprefix(OWN).split() if name.startswith(OWN) else []

    @property
    def elementwise(self) -> bool:
        return self.primitive.name in ELEMENTWISE | TYPES

    @property
    def grained(self) -> tuple[Value, int] | None:
        """The operand or result that has one element for several of the leaf, and for how many."""
        if not self.own or self.own[0] == "positions":
            return None
        name, _, number, *_ = self.own
        value = self.outputs[0] if name in ("largest", "packed") else self.inputs[0]
        return value, int(number) if name in ("largest", "spread") else 8 // int(number)

    @property
    def stage(self) -> str:
        """The name of the stage that it is of."""
        return _stage(self.traces)

    def refuse(self) -> None:
        raise ValueError(
            f"adam_jax fuses chains that treat every element or block of a large leaf by itself, "
            f"and {self.stage} does not: it has the equation {self.primitive.name!r}. Fuse the "
            f"chain without it: a stage at an end of the chain goes outside, as in "
            f"optax.chain(optax.clip_by_global_norm(1.0), adam_jax.fuse(...)); in place of a "
            f"storage take another, such as adam_jax.storage.int8()."
        )


def _stage(traces: Sequence[Any]) -> str:
    """The stage that an equation is of: the innermost function made by one, but for our helpers."""
    helpers = (
        "/jax/",
        "/optax/_src/base.py",
        "/optax/tree_utils/",
        "/_combining.py",
        "/_jit.py",
        "/average.py",
        "/fusion/",
        "/signal.py",
        "/storage/_protocol.py",
    )
    for trace in traces:
        for frame in trace.frames if trace else ():
            path = frame.file_name.replace("\\", "/")
            name, *inside = frame.function_name.split(".<locals>")
            if inside and not any(helper in path for helper in helpers):
                return name
    return "a stage"


def inlined(
    closed: Any, inputs: Sequence[Any], traces: tuple = ()
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
        around = (eqn.source_info.traceback, *traces)
        equation = Equation(eqn.primitive, eqn.params, operands, results, around)
        if eqn.primitive.name in CALLS and not equation.own:
            called = next(
                eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params
            )
            consts = getattr(called, "consts", ())
            inside, results = inlined(called, [*operands, *consts], around)
            equations += inside
        else:
            equations.append(equation)
        env.update(zip(eqn.outvars, results, strict=True))
    return equations, [read(atom) for atom in jaxpr.outvars]


class Joined:
    """Which values were joined to one another, directly or by way of others."""

    def __init__(self) -> None:
        self.parent: dict[Value, Value] = {}

    def root(self, value: Value) -> Value:
        while value in self.parent:
            value = self.parent[value]
        return value

    def join(self, values: Iterable[Value]) -> None:
        roots = list(dict.fromkeys(map(self.root, values)))
        self.parent.update((root, roots[0]) for root in roots[1:])
