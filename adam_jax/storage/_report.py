"""A table of the bytes that a storage takes for a model, leaf by leaf."""

from typing import Any

import jax

from adam_jax._checks import check_params
from adam_jax._ownership import path_name
from adam_jax.storage._protocol import Slot


def report(storage: Any, params: Any, moment: str = "nu") -> str:
    """Tabulate the bytes that a storage keeps of each leaf of a model.

    Nothing is allocated: the parameters may be `jax.ShapeDtypeStruct`.

    Args:
      storage: what `mu_storage` and `nu_storage` take: a `Storage`, a dtype, or None.
      params: a tree of parameters, or of `jax.ShapeDtypeStruct`.
      moment: which moment is kept, "mu" or "nu". Default "nu".

    Returns:
      A table in plain text, with a line for each leaf: its path, its shape, the arrays that are
      kept, their bytes, and their bytes per element. "whole" marks a moment that is kept as it is
      computed. The last line has the bytes per parameter, and the share of the parameters whose
      moment is kept whole.

    Raises:
      TypeError: if `storage` is neither a `Storage` nor a dtype, or if a parameter is neither
        floating-point nor complex.
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
    slot, plain_slot = (Slot.of("report", moment, how) for how in (storage, None))
    kept, plain = (jax.eval_shape(s.init, params) for s in (slot, plain_slot))
    structure: Any = jax.tree.structure(params)
    parts = slot.storage.parts
    names = parts._fields if parts else ("",)
    trees = [structure.flatten_up_to(tree) for tree in (kept if parts else [kept])]
    leaves = jax.tree_util.tree_leaves_with_path(plain)
    rows, elements, total, whole = [], 0, 0, 0
    for (path, leaf), *arrays in zip(leaves, *trees, strict=True):
        is_whole = _described(arrays[-1]) == _described(leaf)
        described = [
            f"{name} {_described(x)}".strip()
            for name, x in zip(names, arrays, strict=True)
            if x.dtype != bool  # a placeholder
        ]
        size = sum(x.size * x.dtype.itemsize for x in arrays if x.dtype != bool)
        rows.append(
            [
                path_name(path),
                _described(leaf).removeprefix(str(leaf.dtype)),
                f"whole {_described(leaf)}" if is_whole else " + ".join(described),
                f"{size:,} bytes",
                f"{size / max(leaf.size, 1):.2f} per element",
            ]
        )
        elements, total, whole = elements + leaf.size, total + size, whole + leaf.size * is_whole
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).strip() for row in rows]
    mean, share = (n / max(elements, 1) for n in (total, whole))
    last = f"{elements:,} parameters in {total:,} bytes: {mean:.2f} per parameter"
    return "\n".join([*lines, f"{last}, {share:.2%} whole"])


def _described(x: Any) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"
