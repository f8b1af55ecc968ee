"""All of jax that is experimental or internal, in one file: what may change with any release.

    name                                        tried with      what changed
    jax.extend.core: Primitive, Literal,        0.7.1 – 0.12    ClosedJaxpr is Jaxpr since 0.12
      ClosedJaxpr, Jaxpr, jaxpr_as_fun
    jax.extend.backend: get_default_device      0.7.1 – 0.12
    jax.interpreters: ad, batching, mlir        0.7.1 – 0.12
    pallas: pallas_call, BlockSpec              0.7.1 – 0.12
    pallas.tpu                                  0.7.1 – 0.12
    pallas.triton                               0.7.1 – 0.11    deprecated since 0.11
    pallas.mosaic_gpu: kernel                   0.12            0.11.2 ran it on an H100, not tested
    jax.ShapeDtypeStruct                        0.7.1 – 0.12    vma is manual_axis_type since 0.11

Pallas is imported when the first kernel is made: a part of it that is gone is no error here.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.backend import get_default_device
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    jaxpr_as_fun,
)
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir

MOSAIC_GPU_SINCE = (0, 12)  # the first jax whose `mosaic_gpu.kernel` was tried
MOSAIC_GPU_FOR = "9.0"  # the compute capability that its kernels were compiled for: Hopper


def as_function(jaxpr: Jaxpr, constants: Sequence[Any]) -> Callable[..., list[Any]]:
    """What the equations compute, with these values of their constants."""
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, constants))


def pallas() -> Any:
    """What all backends of Pallas share."""
    return importlib.import_module("jax.experimental.pallas")


def backend(name: str) -> Any:
    """The module of Pallas for "triton", "tpu" or "mosaic_gpu".

    Raises:
      ImportError: if this jax has none.
    """
    return importlib.import_module(f"jax.experimental.pallas.{name}")


def compute_capability() -> str:
    """Of the GPU that is compiled for, as Pallas finds it: without a device, that of an H100."""
    return getattr(get_default_device(), "compute_capability", MOSAIC_GPU_FOR)


def array_type(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """The type of a result that varies over the same axes of a mesh as `like`.

    Inside `jax.shard_map` that is a part of the type.
    """
    known = inspect.signature(jax.ShapeDtypeStruct).parameters
    names = [name for name in ("vma", "manual_axis_type") if name in known]
    varying = {name: getattr(jax.typeof(like), name) for name in names}
    return jax.ShapeDtypeStruct(shape, dtype, **varying)
