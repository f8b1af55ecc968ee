"""Elementwise equations on a tile, with the values that XLA gives.

A backend of Pallas takes most equations as they are. Some it lacks, and some are another function
there than in XLA for a few values. Those are made of others here, alike for all backends:

    Triton        max, min and clamp drop NaN, -x of 0 is 0, round is missing, and for bfloat16
                  division
    Mosaic        NaN != NaN is False, -x of 0 is 0, little is there for integers of 8 and 16 bits
    Mosaic GPU    floor, ceil and is_finite are missing, and for integers of 8 bits arithmetic
    all           nothing is promised of shifts by more bits than there are, of integers divided by
                  0, and of floats that an integer cannot hold

What remains is refused by name.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax.fusion._graph import IDENTITIES, Equation, Value


def on_tile(equation: Equation, inputs: list[Any]) -> Any:
    """An elementwise equation on arrays of a tile."""
    name = equation.primitive.name
    if name in IDENTITIES:
        return inputs[0]
    rule = RULES.get(name, _as_it_is)
    if name in OF_ANY_WIDTH or not any(map(_is_narrow, inputs)):
        return rule(equation, *inputs)
    # The lowest bits of a result depend on the lowest bits of what it is made of.
    result = rule(equation, *(x.astype(jnp.int32) if _is_narrow(x) else x for x in inputs))
    return result if result.dtype == bool else result.astype(equation.outputs[0].dtype)


def with_own(equations: list[Equation], known: dict[Value, Any]) -> dict[Value, Any]:
    """Scalars, and what a kernel's own equations make of them: `Kernel.own`."""
    known = dict(known)
    for equation in equations:
        inputs = [known[x] if isinstance(x, Value) else x for x in equation.inputs]
        repeated = equation.primitive.name == "broadcast_in_dim"  # one number stands for all
        known[equation.outputs[0]] = inputs[0] if repeated else on_tile(equation, inputs)
    return known


def _as_it_is(equation: Equation, *inputs: Any) -> Any:
    return equation.primitive.bind(*inputs, **equation.params)


def _in_float32(equation: Equation, *inputs: Any) -> Any:
    """Of bfloat16 as XLA computes it, rounded once."""
    if inputs[0].dtype != jnp.bfloat16:
        return _as_it_is(equation, *inputs)
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in inputs]
    return _as_it_is(equation, *wide).astype(jnp.bfloat16)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _is_narrow(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize < 4


# --- Comparisons ----------------------------------------------------------------------------------


def _not_equal(equation: Equation, x: Any, y: Any) -> Any:
    return jnp.logical_not(x == y)


def _is_finite(equation: Equation, x: Any) -> Any:
    return jnp.abs(x.astype(jnp.float32)) < jnp.inf


def _sign(equation: Equation, x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return jnp.where(x == 0, x, jnp.ones_like(x))
    return jnp.where(x > 0, jnp.ones_like(x), jnp.where(x < 0, jnp.full_like(x, -1), x))


def _extreme(of_bools: Callable[..., Any], of_floats: Callable[..., Any]) -> Callable[..., Any]:
    """The largest or the least; NaN if one is."""

    def extreme(equation: Any, x: Any, y: Any) -> Any:
        if x.dtype == bool:
            return of_bools(x, y)
        if not _is_float(x):
            return jnp.where(x >= y, *((x, y) if of_floats is jax.lax.max else (y, x)))
        return jnp.where(x == x, jnp.where(y == y, of_floats(x, y), y), x)

    return extreme


_max = _extreme(jax.lax.bitwise_or, jax.lax.max)
_min = _extreme(jax.lax.bitwise_and, jax.lax.min)


def _clamp(equation: Equation, least: Any, x: Any, most: Any) -> Any:
    return _min(None, _max(None, x, least), most)


def _select(equation: Equation, which: Any, *cases: Any) -> Any:
    if which.dtype != bool:
        equation.refuse_in_kernels("of more than two cases")
    if cases[0].dtype == bool:  # Mosaic has no selection of bools
        first, second = cases
        return (which & second) | (jnp.logical_not(which) & first)
    return _as_it_is(equation, which, *cases)


# --- Arithmetic -----------------------------------------------------------------------------------


def _neg(equation: Equation, x: Any) -> Any:
    return x * jnp.full_like(x, -1) if _is_float(x) else _as_it_is(equation, x)


def _whole(x: Any) -> tuple[Any, Any]:
    """A float without its fraction, and that as an integer.

    From 2**23 on a float has no fraction, and the integer is 0.
    """
    has_fraction = jnp.abs(x) < 2.0**23
    whole = jnp.where(has_fraction, x, jnp.zeros_like(x)).astype(jnp.int32)
    return jnp.where(has_fraction, whole.astype(x.dtype), x), whole


def _with_sign(whole: Any, x: Any) -> Any:
    """A zero has the sign of what became zero."""
    return jnp.where(whole == 0, x * 0, whole)


def _floor(equation: Equation, x: Any) -> Any:
    wide = x.astype(jnp.float32)
    whole, _ = _whole(wide)
    return _with_sign(whole - (whole > wide).astype(jnp.float32), wide).astype(x.dtype)


def _ceil(equation: Equation, x: Any) -> Any:
    wide = x.astype(jnp.float32)
    whole, _ = _whole(wide)
    return _with_sign(whole + (whole < wide).astype(jnp.float32), wide).astype(x.dtype)


def _round(equation: Equation, x: Any) -> Any:
    """To the nearest integer, of two as near to the even or the larger one, with the sign of x."""
    wide = x.astype(jnp.float32)
    size = jnp.abs(wide)
    down, integer = _whole(size)
    beyond = size - down
    up = beyond >= 0.5
    if equation.params["rounding_method"] == jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        up = (beyond > 0.5) | (up & (integer & 1 == 1))
    rounded = down + up.astype(jnp.float32)
    return _with_sign(jnp.where(wide < 0, rounded * -1, rounded), wide).astype(x.dtype)


def _div(equation: Equation, x: Any, y: Any) -> Any:
    if _is_float(x):
        return _in_float32(equation, x, y)
    divisor, zero, overflows = _divisor(equation, x, y)
    quotient = _as_it_is(equation, x, divisor)
    if zero is None:
        return quotient
    return jnp.where(zero, jnp.full_like(x, 0) - 1, jnp.where(overflows, x, quotient))


def _integer_pow(equation: Equation, x: Any) -> Any:
    if x.dtype == jnp.bfloat16 and equation.params["y"] < 0:  # rounded twice
        equation.refuse_in_kernels("of bfloat16 with a negative power")
    power = equation.params["y"]
    if power <= 0:  # Mosaic GPU has positive powers only
        return 1 / jax.lax.integer_pow(x, -power) if power else jnp.ones_like(x)
    return _as_it_is(equation, x)


def _rem(equation: Equation, x: Any, y: Any) -> Any:
    if _is_float(x):
        equation.refuse_in_kernels("of floats")
    divisor, zero, overflows = _divisor(equation, x, y)
    remainder = _as_it_is(equation, x, divisor)
    if zero is None:
        return remainder
    return jnp.where(zero, x, jnp.where(overflows, jnp.zeros_like(x), remainder))


def _divisor(equation: Equation, x: Any, y: Any) -> tuple[Any, Any, Any]:
    """A divisor that is safe, and where y is 0 or the quotient too large: None where neither is."""
    known = equation.inputs[1]
    if not isinstance(known, Value) and known not in (0, -1):
        return y, None, None
    least, signed = jnp.iinfo(x.dtype).min, jnp.issubdtype(x.dtype, jnp.signedinteger)
    overflows = (x == least) & (y == -1) if signed else jnp.zeros(x.shape, jnp.int32) != 0
    return jnp.where((y == 0) | overflows, jnp.ones_like(y), y), y == 0, overflows


def _shift(equation: Equation, x: Any, bits: Any) -> Any:
    """By as many bits as there are or more nothing is left, but the sign in arithmetic."""
    name, dtype = equation.primitive.name, equation.outputs[0].dtype
    width, wide = dtype.itemsize * 8, x.dtype.itemsize * 8
    if name == "shift_right_logical" and width < wide:
        x = x & (2**width - 1)
    if name == "shift_right_arithmetic" and width < wide:
        x = (x << (wide - width)) >> (wide - width)
    known = equation.inputs[1]
    if not isinstance(known, Value) and 0 <= known < width:
        return _as_it_is(equation, x, bits)
    inside = bits < np.asarray(width, bits.dtype)
    if jnp.issubdtype(bits.dtype, jnp.signedinteger):
        inside &= bits >= 0
    if name == "shift_right_arithmetic":
        return _as_it_is(equation, x, jnp.where(inside, bits, jnp.full_like(bits, width - 1)))
    shifted = _as_it_is(equation, x, jnp.where(inside, bits, jnp.zeros_like(bits)))
    return jnp.where(inside, shifted, jnp.zeros_like(shifted))


def _bits(equation: Equation, x: Any) -> Any:
    return x if x.dtype == equation.params["new_dtype"] else _as_it_is(equation, x)


def _of_float32(equation: Equation, *inputs: Any) -> Any:
    """What of bfloat16 is rounded in between, or missing."""
    if inputs[0].dtype != jnp.float32:
        equation.refuse_in_kernels(f"of {inputs[0].dtype}")
    return _as_it_is(equation, *inputs)


def _reduce_precision(equation: Equation, x: Any) -> Any:
    """A kernel keeps conversions that XLA leaves out."""
    bits = equation.params["exponent_bits"], equation.params["mantissa_bits"]
    if x.dtype == jnp.float32 and bits == (8, 7):
        return x.astype(jnp.bfloat16).astype(jnp.float32)
    return _as_it_is(equation, x)


# --- Conversions ----------------------------------------------------------------------------------


def _convert(equation: Equation, x: Any) -> Any:
    dtype = np.dtype(equation.params["new_dtype"])
    if dtype == x.dtype:
        return x
    if _is_float(x):
        x = x.astype(jnp.float32)
    elif x.dtype.itemsize < 4:
        x = x.astype(jnp.int32)
    if dtype.kind == "b":
        return jnp.logical_not(x == 0)
    if _is_float(x) and jnp.issubdtype(dtype, jnp.integer):
        return _to_integer(x, dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return x.astype(jnp.int32).astype(dtype) if dtype.itemsize < 4 else x.astype(dtype)
    if x.dtype == jnp.uint32:
        high, low = (half.astype(jnp.int32).astype(jnp.float32) for half in (x >> 16, x & 0xFFFF))
        x = high * 65536 + low
    return x.astype(jnp.float32).astype(dtype)


def _to_integer(x: Any, dtype: np.dtype) -> Any:
    """Of a float32: without its fraction, the nearest that the dtype holds, 0 for NaN."""
    info, half = jnp.iinfo(dtype), 2.0**31
    x = jnp.where(x == x, x, 0)
    x = jnp.where(x < float(info.min), float(info.min), x)
    if dtype.itemsize < 4:
        return jnp.where(x > info.max, float(info.max), x).astype(jnp.int32).astype(dtype)
    if info.min:
        inside = jnp.where(x < half, x, 0).astype(jnp.int32)
        return jnp.where(x < half, inside, jnp.full_like(inside, info.max))
    upper = jnp.where(x < half, x, x - half)  # a float32 from 2**31 on is an integer
    inside = jnp.where(upper < half, upper, 0).astype(jnp.int32).astype(dtype)
    inside = jnp.where(x < half, inside, inside + np.uint32(half))
    return jnp.where(upper < half, inside, jnp.full_like(inside, info.max))


IN_FLOAT32 = [
    "acos", "asin", "atan", "atan2", "cbrt", "cos", "cosh", "erf", "erf_inv", "exp", "expm1", "log",
    "log1p", "pow", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh",
]  # fmt: skip
OF_FLOAT32 = ["acosh", "asinh", "atanh", "exp2", "logistic", "nextafter"]
OF_ANY_WIDTH = {"bitcast_convert_type", "convert_element_type"}
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(IN_FLOAT32, _in_float32),
    **dict.fromkeys(OF_FLOAT32, _of_float32),
    "bitcast_convert_type": _bits,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "ceil": _ceil,
    "div": _div,
    "floor": _floor,
    "integer_pow": _integer_pow,
    "is_finite": _is_finite,  # Triton of jax 0.7 has none
    "max": _max,
    "min": _min,
    "ne": _not_equal,
    "neg": _neg,
    "reduce_precision": _reduce_precision,
    "rem": _rem,
    "round": _round,
    "select_n": _select,
    "shift_left": _shift,
    "shift_right_arithmetic": _shift,
    "shift_right_logical": _shift,
    "sign": _sign,  # Mosaic asks the TPU how to, and an export has none to ask
}
