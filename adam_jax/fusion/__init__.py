"""How much of a chain is one kernel: what XLA makes of it, and what is made for it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from adam_jax.fusion import _shards
from adam_jax.fusion._program import Program

# Where a step is lowered to kernels: for which backend of Pallas, and whether interpreted.
KERNELS = {"cuda": ("cuda", False), "tpu": ("tpu", False)}


def fused_step(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    r"""Update and apply, on a GPU and a TPU in one kernel for each large leaf.

    A step reads the parameters, the state and the gradients once and writes the parameters and the
    state once, in place if they are donated, and needs no memory besides. XLA alone makes one
    kernel of a float32 step, but not of moments in 8 or 4 bits.

    The chain stays the definition: `init` and the state are its own, and on a CPU, or called
    without `jax.jit`, the step is `tx.update` and `optax.apply_updates`. So are the leaves without
    a kernel: small ones (under 4,096 elements), those in other dtypes than float32 and bfloat16 or
    in blocks of a length that is no power of two, and on a TPU vectors and matrices that XLA lays
    out by columns there (such as 768 × 1000, whose rows would not fill its tiles).

    On a GPU they are Pallas's Triton kernels, of which jax 0.12 warns that they are deprecated.

    Sharded leaves: inside `jax.shard_map`, on meshes with explicit axes, and on GPUs also on those
    with automatic axes, every device runs the kernels of its part. What cannot be cut so is an
    error, never gathered.

    Args:
      tx: a chain of stages that treat every element or block of a leaf by itself, of adam_jax,
        optax or your own.

    Returns:
      A function `(params, state, grads, **extra_args) -> (params, state)`, to be compiled with
      ``jax.jit(step, donate_argnums=(0, 1))``.

    Raises:
      ValueError: where it is traced, if a stage is not local: if it needs more of a large leaf, or
        of several, than the elements of one place (`optax.clip_by_global_norm`,
        `optax.scale_by_trust_ratio`, `adam_jax.cautious`, the storages `factored` and
        `block_mean`).

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

    return _fused(step, leaves=2)


def fuse(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""A chain with one kernel for each large leaf, on a GPU and a TPU.

    As `fused_step`, for what applies the updates itself: `nnx.Optimizer`, Flax's `TrainState`, the
    wrappers of optax. The updates are written and read again, which costs 12 bytes a parameter in
    float32: 4 to write them, 8 to read them and the parameters where they are applied (and without
    weight decay the kernel does not read the parameters: 8 in all). They take the place of the
    gradients; if those are needed after the step, or come from outside of the compiled function,
    XLA copies them first, 8 bytes more.

    Args:
      tx: a chain of stages as in `fused_step`.

    Returns:
      The chain, with the same `init` and the same state.

    Raises:
      ValueError: in `update`, where it is traced, if a stage is not local. Chain it outside:
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
    return optax.GradientTransformationExtraArgs(inner.init, _fused(inner.update, leaves=0))


def _fused(fn: Callable[..., Any], leaves: int) -> Callable[..., Any]:
    """`fn` with kernels where it is lowered for a GPU or a TPU; argument `leaves` is the gradients.

    Its results take the place of its first arguments.
    """

    def fused(*args, **extra_args):
        flat, tree = jax.tree.flatten((args, extra_args))
        if not any(isinstance(x, Tracer) for x in flat):
            return fn(*args, **extra_args)
        places = [i for i, x in enumerate(flat) if isinstance(x, jax.Array | np.ndarray)]

        def on_arrays(*arrays):
            given = dict(zip(places, arrays, strict=True))
            args, extra_args = jax.tree.unflatten(
                tree, [given.get(i, x) for i, x in enumerate(flat)]
            )
            return fn(*args, **extra_args)

        arrays = [flat[i] for i in places]
        closed, shapes = jax.make_jaxpr(on_arrays, return_shape=True)(*arrays)
        first = len(jax.tree.leaves(args[:leaves]))
        grads = range(first, first + len(jax.tree.leaves(args[leaves])))
        program = Program(closed.jaxpr, [n for n, i in enumerate(places) if i in grads])
        results = _fused_p.bind(
            *arrays, *closed.consts, program=program, needs=_shards.needs_devices()
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return fused


# --- One equation, which is lowered to kernels or to the plain chain ------------------------------
# jax.lax.platform_dependent would trace the kernels of all platforms, and in an export for several
# lower each of them for all.

_fused_p = Primitive("adam_jax_fused")
_fused_p.multiple_results = True
_fused_p.def_impl(lambda *arrays, program, needs: program.plain(*arrays))
_fused_p.def_abstract_eval(lambda *_, program, needs: [var.aval for var in program.jaxpr.outvars])


def _lowering(lowered_for: str) -> Callable[..., Any]:
    def rule(context, *arrays, program, needs):
        if lowered_for not in KERNELS:
            return mlir.lower_fun(program.plain, multiple_results=True)(context, *arrays)
        platform, interpret = KERNELS[lowered_for]
        devices = getattr(context.module_context.axis_context, "num_devices", 1)
        explicit = any(
            jax.sharding.AxisType.Explicit in aval.sharding.mesh.axis_types
            for aval in context.avals_in
        )
        if lowered_for == "tpu" and devices > 1 and not explicit:
            raise ValueError(
                "adam_jax.fuse: on TPUs XLA does not partition kernels by itself. Call the step "
                "inside jax.shard_map, or use a mesh with explicit axes."
            )

        def call(leaf, tile, scalars, arrays):
            return _shards.call(leaf, tile, platform, interpret, scalars, arrays)

        def kernels(*arrays):
            return program.run(platform, call, arrays)

        module = context.module_context.replace(platforms=(lowered_for,))
        context = context.replace(module_context=module)
        return mlir.lower_fun(kernels, multiple_results=True)(context, *arrays)

    return rule


def _batched(arrays, axes, *, program, needs):
    results = jax.vmap(program.plain, axes)(*arrays)
    return results, [0] * len(results)


def _jvp(arrays, tangents, *, program, needs):
    tangents = tuple(ad.instantiate_zeros(t) for t in tangents)
    return jax.jvp(program.plain, tuple(arrays), tangents)


mlir.register_lowering(_fused_p, _lowering("default"))
for _platform in ("cpu", "cuda", "tpu"):
    mlir.register_lowering(_fused_p, _lowering(_platform), platform=_platform)
batching.primitive_batchers[_fused_p] = _batched
ad.primitive_jvps[_fused_p] = _jvp
