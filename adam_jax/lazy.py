"""Rows without a gradient stay as they are, which embedding tables want.

A batch reaches a few rows of an embedding table, and the gradient of all others is exactly zero.
Adam moves those too, along the moments of earlier batches, and weight decay shrinks them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_jax._ownership import NONE, at, is_placeholder, leaves_by_path, owners
from adam_jax.basis import InBasisState
from adam_jax.signal import check_updates


def lazy(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Leave the rows without a gradient as they are: their weights and their moments.

    For a row :math:`i` along the first axis of a leaf, of weights :math:`\theta_i` and all that
    `tx` keeps of them :math:`s_i`, with the step of `tx` written :math:`T`:

    .. math:: (\theta_i, s_i)_t = \begin{cases}
              T(g_t, \theta_{t-1}, s_{t-1})_i & g_{t,i} \ne 0 \\
              (\theta_i, s_i)_{t-1} & g_{t,i} = 0
              \end{cases}

    The elements of a vector are its rows, and a scalar is one row. What belongs to no parameter is
    updated at every step: counts, schedules, the weights of moments, random keys. So bias
    correction goes by the number of steps, not by how often a row had a gradient, and

        lazy(adam(learning_rate, eps_hat=True))

    is `torch.optim.SparseAdam` and LazyAdam of TensorFlow Addons. (Those tell by the indices of a
    batch which rows to update. Here the gradient tells, and a row whose gradient happens to be zero
    stays.)

    Weight decay inside of `tx` shrinks a row only at steps with a gradient. `tx` sees all rows:
    a norm in it, as in `optax.clip_by_global_norm`, `adam_jax.scale_by_trust_ratio` or
    `adam_jax.cautious`, is the norm of the whole gradient or leaf, and a step takes no less time
    than one of `tx`.

    Args:
      tx: a chain from gradients to updates, of adam_jax, optax or your own. What it keeps of a leaf
        must have as many axes as the leaf, and the same first one.

    Returns:
      A gradient transformation with the `init` and the state of `tx`. The update of a row
      without a gradient is -0, which leaves a weight of -0 as it is. Inside `jax.shard_map` a
      device must have whole rows, because it sees no others.

    Raises:
      ValueError: in `update`, if the state keeps of a leaf an array without the leaf's rows, naming
        it, as the storages `int8` and `int4` (of vectors and matrices), `factored` and `block_mean`
        (over rows) do, and `in_basis`.
      TypeError: in `update`, if `tx` emits `Moments` or is given them, so is not a whole chain.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> tx = adam_jax.lazy(adam_jax.adamw(0.1, weight_decay=0.5))
      >>> table = jnp.ones((3, 2))
      >>> state = tx.init(table)
      >>> for row in (0, 2):
      ...     grads = jnp.zeros((3, 2)).at[row].set(4.0)
      ...     updates, state = tx.update(grads, state, table)
      ...     table = table + updates
      >>> [round(float(weight), 3) for weight in table[:, 0]]
      [0.85, 1.0, 0.876]

    Source: LazyAdam of TensorFlow Addons; `torch.optim.SparseAdam`. optax has none.
    """
    inner: Any = optax.with_extra_args_support(tx)

    def update_fn(updates, state, params=None, **extra_args):
        check_updates("lazy", updates)
        grads = leaves_by_path(updates)
        owner_of = owners(state, updates)
        _check_rows(state, owner_of, grads)
        new_updates, new_state = inner.update(updates, state, params, **extra_args)
        structure: Any = jax.tree.structure(updates)
        if structure != jax.tree.structure(new_updates):
            raise TypeError(
                "adam_jax.lazy goes around a whole chain, from gradients to updates, such as "
                "adam_jax.adam(1e-3), and this one emits something else: put the stages that "
                "follow inside as well."
            )
        reached = [None if grad is None else _reached(grad) for grad in grads.values()]

        def of_row(grad, update):
            return _of_rows(_reached(grad), update, -jnp.zeros_like(update))

        def kept(owner, old, new):
            return new if owner == NONE else _of_rows(reached[owner], new, old)

        return (
            jax.tree.map(of_row, updates, new_updates),
            jax.tree.map(kept, owner_of, state, new_state),
        )

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _reached(grad: Any) -> jax.Array:
    """Which rows have a gradient. NaN is one."""
    return jnp.any(grad != 0, axis=tuple(range(1, jnp.ndim(grad))))


def _of_rows(reached: jax.Array, new: jax.Array, old: Any) -> jax.Array:
    """The new numbers of the rows that were reached, and the old ones of the others."""
    return jnp.where(jnp.expand_dims(reached, tuple(range(1, jnp.ndim(new)))), new, old)


def _check_rows(state: Any, owner_of: Any, grads: dict[tuple, Any]) -> None:
    """What is kept of a leaf must have its rows."""
    in_basis = lambda node: isinstance(node, InBasisState)  # noqa: E731
    for node in jax.tree.leaves(state, is_leaf=in_basis):
        if in_basis(node) and not all(map(is_placeholder, jax.tree.leaves(node.basis))):
            raise ValueError(
                "adam_jax.lazy cannot go around adam_jax.in_basis, in which rows are mixed: give "
                "each leaf one of the two, with optax.partition."
            )
    leaves = list(grads.items())
    parts = jax.tree_util.tree_leaves_with_path(state)
    for (path, part), owner in zip(parts, jax.tree.leaves(owner_of), strict=True):
        if owner == NONE:
            continue
        of, grad = leaves[owner]
        shape, due = jnp.shape(part), jnp.shape(grad)
        if len(shape) != len(due) or shape[:1] != due[:1]:
            raise ValueError(
                f"adam_jax.lazy needs a state with the rows of the leaf, but for the leaf{at(of)} "
                f"of shape {due} tx keeps an array of shape {shape}{at(path)}: instead of a "
                f"storage in blocks or means take a dtype or adam_jax.storage.stochastic(), or "
                f"leave the leaf out of what is lazy with optax.partition."
            )
