"""A chain runs as one kernel for each large leaf, on a GPU and a TPU.

_graph         the equations of a step, read from its jaxpr
_tiles         operations on blocks, each with a form for a leaf and a form for a tile
_program       which equations belong into which kernel
_kernel        the kernel of a leaf, for any backend
_emitters      which emitter makes kernels for a platform, or why none does
_mosaic_gpu    the emitter for NVIDIA's GPUs
_pallas_call   the emitters for TPUs, and in Triton for the GPUs of older jax
_elementwise   equations that a backend lacks, or computes otherwise than XLA
_shards        the kernels of a sharded leaf
_jax           all of jax that is experimental or internal
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from adam_jax.fusion import _shards
from adam_jax.fusion._emitters import emitter_for
from adam_jax.fusion._graph import REMEDY
from adam_jax.fusion._jax import Primitive, ad, batching, mlir
from adam_jax.fusion._program import Program


def fused_step(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    r"""Make a step that updates and applies, in one kernel for each large leaf on a GPU or TPU.

    The step reads the parameters, the state and the gradients once and writes the parameters and
    the state once, in place if they are donated, and needs no other memory. XLA alone makes one
    kernel of a float32 step, but not of a step with moments in 8 or 4 bits.

    The chain stays the definition: `init` and the state are those of `tx`, and on a CPU, or called
    without `jax.jit`, the step is `tx.update` and `optax.apply_updates`. The plain chain also
    computes the leaves that get no kernel (axes of length 1 do not count):

    - small leaves, under 4,096 elements, and those in other dtypes than float32 and bfloat16;
    - leaves whose blocks have a length that is no power of two, or lie along another axis than the
      second-to-last (`adam_jax.storage.int8` says along which);
    - on a TPU vectors, and matrices that XLA lays out by columns (such as 768 × 1000, whose rows
      would not fill its tiles);
    - in Mosaic GPU vectors, and leaves whose last axis is no multiple of 128.

    Without a kernel, compiled for an H100 and a v5e, 8-bit adamw moves 29.1 and 20.3 bytes a
    parameter of a patch embedding (16, 16, 3, 768), with 0.8 and 1.6 bytes of temporaries, and 23.1
    and 20.3 of convolutions (512, 512, 3, 3), with 0.4 and 0.5; a kernel would move 16.3.

    The kernels are Pallas's: on TPUs Mosaic, on NVIDIA's GPUs Mosaic GPU where jax is at least 0.12
    and the GPU a Hopper (compute capability 9.0), and Triton for all of NVIDIA's GPUs where jax is
    older. On any other GPU the plain chain runs, and a warning says why.

    Sharded leaves: inside `jax.shard_map` and on meshes with explicit axes every device runs the
    kernels of its shards. A leaf that cannot be computed shard by shard is an error; no leaf is
    ever gathered.

    Args:
      tx: a chain of stages that treat every element or block of a leaf by itself, of adam_jax,
        optax or your own.

    Returns:
      A function `(params, state, grads, **extra_args) -> (params, state)`, to be compiled with
      ``jax.jit(step, donate_argnums=(0, 1))``. Its state is made with ``tx.init(params)``.

    Raises:
      ValueError: when the step is traced, if a stage is not local: if an element of the result
        depends on other elements of a large leaf than those of its block, or on several leaves
        (`optax.clip_by_global_norm`, `optax.scale_by_trust_ratio`, `adam_jax.cautious`, the
        storages `factored` and `block_mean`).

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> from adam_jax import storage
      >>> tx = adam_jax.adamw(1e-3, mu_storage=storage.int8(), nu_storage=storage.int8())
      >>> step = jax.jit(adam_jax.fused_step(tx), donate_argnums=(0, 1))
      >>> params = jnp.ones((64, 64))
      >>> params, state = step(params, tx.init(params), jnp.full((64, 64), 3.0))
      >>> print(params[0, 0])
      0.9989

    Source: none. What it moves is measured in `examples/benchmarks/README.md`.
    """
    inner: Any = optax.with_extra_args_support(tx)

    def step(params, state, grads, **extra_args):
        updates, state = inner.update(grads, state, params, **extra_args)
        with jax.numpy_dtype_promotion("standard"):  # optax adds float32 updates to bfloat16
            return optax.apply_updates(params, updates), state

    return _fused(step, gradients=2)


def fuse(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Make a chain run as one kernel for each large leaf, on a GPU and a TPU.

    Like `fused_step`, for callers that apply the updates themselves: `nnx.Optimizer`, Flax's
    `TrainState`, the wrappers of optax. The updates are written and read again, which costs
    12 bytes a parameter in float32: 4 to write them, 8 to read the updates and the parameters when
    they are applied. (Without weight decay the kernel does not read the parameters: 8 in all.) The
    updates take the buffers of the gradients. If the gradients are needed after the step, or come
    from outside of the compiled function, XLA copies them first, 8 bytes more.

    Args:
      tx: a chain of stages that treat every element or block of a leaf by itself, of adam_jax,
        optax or your own.

    Returns:
      A gradient transformation with the `init` and the state of `tx`.

    Raises:
      ValueError: when `update` is traced, if a stage is not local: if an element of the result
        depends on more than its block of a large leaf, or on several leaves. Put that stage
        outside:
        ``optax.chain(optax.clip_by_global_norm(1.0), adam_jax.fuse(adam_jax.adamw(1e-3)))``.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> tx = adam_jax.fuse(adam_jax.adam(1e-3))
      >>> params = jnp.ones((64, 64))
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> print(updates[0, 0])
      -0.001

    Source: none, see `fused_step`.
    """
    inner: Any = optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(inner.init, _fused(inner.update, gradients=0))


def _fused(fn: Callable[..., Any], gradients: int) -> Callable[..., Any]:
    """`fn` with kernels where it is lowered for a GPU or a TPU.

    Args:
      fn: its results take the buffers of its first arguments.
      gradients: the index of the argument of `fn` that is the gradients.
    """

    def fused(*args, **extra_args):
        leaves, structure = jax.tree.flatten((args, extra_args))
        if not any(isinstance(x, Tracer) for x in leaves):
            return fn(*args, **extra_args)
        indices = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)]

        def on_arrays(*arrays):
            array_at = dict(zip(indices, arrays, strict=True))
            args, extra_args = jax.tree.unflatten(
                structure, [array_at.get(i, x) for i, x in enumerate(leaves)]
            )
            return fn(*args, **extra_args)

        arrays = [leaves[i] for i in indices]
        closed, shapes = jax.make_jaxpr(on_arrays, return_shape=True)(*arrays)
        first = len(jax.tree.leaves(args[:gradients]))
        is_gradient = range(first, first + len(jax.tree.leaves(args[gradients])))
        program = Program(closed.jaxpr, [n for n, i in enumerate(indices) if i in is_gradient])
        results = _fused_p.bind(*arrays, *closed.consts, program=program)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return fused


# --- One equation, which is lowered to kernels or to the plain chain ------------------------------
# jax.lax.platform_dependent would trace the kernels of all platforms, and an export for several
# platforms would lower the kernels of each for all of them.

_fused_p = Primitive("adam_jax_fused")
_fused_p.multiple_results = True
_fused_p.def_impl(lambda *arrays, program: program.plain(*arrays))
_fused_p.def_abstract_eval(lambda *_, program: [var.aval for var in program.jaxpr.outvars])


def _lowering(platform: str) -> Callable[..., Any]:
    def rule(context, *arrays, program):
        emitter = emitter_for(platform)
        if isinstance(emitter, str) and program.kernels:
            _warn(f"adam_jax.fuse: there are no kernels, the plain chain runs. {emitter}")
        if emitter is None or isinstance(emitter, str):
            return mlir.lower_fun(program.plain, multiple_results=True)(context, *arrays)
        devices = getattr(context.module_context.axis_context, "num_devices", 1)
        explicit = any(
            jax.sharding.AxisType.Explicit in aval.sharding.mesh.axis_types
            for aval in context.avals_in
        )
        if devices > 1 and not explicit:
            raise ValueError(
                "adam_jax.fuse: XLA does not partition kernels by itself. Call the step inside "
                "jax.shard_map, or use a mesh with explicit axes."
            )

        def in_kernels(*arrays):
            return program.run(
                emitter, functools.partial(_shards.launch_on_shards, emitter), arrays
            )

        module = context.module_context.replace(platforms=(platform,))
        context = context.replace(module_context=module)
        try:
            return mlir.lower_fun(in_kernels, multiple_results=True)(context, *arrays)
        except NotImplementedError as error:
            raise ValueError(
                f"adam_jax.fuse: Pallas has no kernel for {program.stage_in(str(error))} on this "
                f"platform: {error} {REMEDY}."
            ) from error

    return rule


@functools.cache
def _warn(message: str) -> None:
    """Once a process."""
    warnings.warn(message, stacklevel=2)


def _batched(arrays, axes, *, program):
    results = jax.vmap(program.plain, axes)(*arrays)
    return results, [0] * len(results)


def _jvp(arrays, tangents, *, program):
    tangents = tuple(ad.instantiate_zeros(t) for t in tangents)
    return jax.jvp(program.plain, tuple(arrays), tangents)


mlir.register_lowering(_fused_p, _lowering("cpu"))
for _platform in ("cuda", "rocm", "tpu"):
    mlir.register_lowering(_fused_p, _lowering(_platform), platform=_platform)
batching.primitive_batchers[_fused_p] = _batched
ad.primitive_jvps[_fused_p] = _jvp
