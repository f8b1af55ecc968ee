"""What a storage makes of a model: bytes, leaf by leaf."""

from typing import Any

import jax

from adam_jax._checks import check_params
from adam_jax._ownership import path_name
from adam_jax.storage._protocol import Slot


def report(storage: Any, params: Any, moment: str = "nu") -> str:
    """Which leaves of a model a storage keeps, in how many bytes, and which stay whole.

    Nothing is allocated: the arrays of the parameters may be `jax.ShapeDtypeStruct`.

    Args:
      storage: a `Storage`, a dtype, or None, as in `mu_storage` and `nu_storage`.
      params: a tree of parameters, or of their shapes.
      moment: "mu" or "nu". Default "nu".

    Returns:
      A table in plain text. A line for each leaf has its path, its shape, what is kept of it, the
      bytes of that, and the bytes per element. "whole" is what stays as it is computed. The last
      line has the bytes per parameter, and the share of the parameters whose moment stays whole.

    Raises:
      TypeError: if `storage` is neither a `Storage` nor a dtype, or a parameter is neither floating
        point nor complex.
      ValueError: if the storage is not for this moment.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> params = {"bias": jnp.zeros(64), "kernel": jnp.zeros((64, 64))}
      >>> print(adam_jax.storage.report(adam_jax.storage.int8(), params))
      bias    [64]     whole float32[64]                           256 bytes    4.00 per element
      kernel  [64,64]  codes uint8[64,64] + scales bfloat16[2,64]  4,352 bytes  1.06 per element
      4,160 parameters in 4,608 bytes: 1.11 per parameter, 1.54% whole

    Source: the shapes of the state that `init` makes, by `jax.eval_shape`.
    """
    check_params("report", params)
    slot, plain = (Slot.of("report", moment, how) for how in (storage, None))
    kept, full = (jax.eval_shape(s.init, params) for s in (slot, plain))
    structure: Any = jax.tree.structure(params)
    names = slot.storage.parts._fields if slot.storage.parts else ("",)
    trees = [structure.flatten_up_to(tree) for tree in (kept if slot.storage.parts else [kept])]
    shape = lambda x: f"[{','.join(map(str, x.shape))}]"  # noqa: E731
    like = lambda x: f"{x.dtype}{shape(x)}"  # noqa: E731
    rows, elements, total, whole = [], 0, 0, 0
    leaves = jax.tree_util.tree_leaves_with_path(full)
    for (path, leaf), *stored in zip(leaves, *trees, strict=True):
        arrays = {name: x for name, x in zip(names, stored, strict=True) if x.dtype != bool}
        what = " + ".join(f"{name} {like(x)}".strip() for name, x in arrays.items())
        if like(stored[-1]) == like(leaf):
            what, whole = f"whole {like(leaf)}", whole + leaf.size
        size = sum(x.size * x.dtype.itemsize for x in arrays.values())
        each = f"{size / max(leaf.size, 1):.2f} per element"
        rows.append([path_name(path), shape(leaf), what, f"{size:,} bytes", each])
        elements, total = elements + leaf.size, total + size
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).strip() for row in rows]
    mean, share = (n / max(elements, 1) for n in (total, whole))
    last = f"{elements:,} parameters in {total:,} bytes: {mean:.2f} per parameter"
    return "\n".join([*lines, f"{last}, {share:.2%} whole"])
