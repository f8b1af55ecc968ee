"""Rows of a leaf, each by itself: those without a gradient stay as they are.

A batch reaches a few rows of an embedding table, and the gradient of all others is exactly zero.
Adam moves those too, along the moments of earlier batches, and weight decay shrinks them.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

from adam_jax._ownership import path_name
from adam_jax.fusion._graph import Equation, Value, inlined
from adam_jax.signal import check_updates


def lazy(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Leave the rows without a gradient as they are: their weights and their moments.

    For a row :math:`i` along the first axis of a leaf, of weights :math:`\theta_i` and all that
    `tx` keeps of them :math:`s_i`, with the step of `tx` written :math:`T`:

    .. math:: (\theta_i, s_i)_t = \begin{cases}
              T(g_t, \theta_{t-1}, s_{t-1})_i & g_{t,i} \ne 0 \\
              (\theta_i, s_i)_{t-1} & g_{t,i} = 0
              \end{cases}

    The elements of a vector are its rows, and a scalar is one. What depends on no gradient and no
    parameter goes on at every step: counts, schedules, the weights of moments, random keys. So
    bias correction is by the step, not by how often a row was reached, and

        lazy(adam(learning_rate, eps_hat=True))

    is `torch.optim.SparseAdam` and LazyAdam of TensorFlow Addons. (Those tell by the index whether
    a row was reached. Here it is told by its gradient, and one that happens to be zero is taken
    for none.)

    Weight decay inside of `tx` falls on a row only at the steps that reach it. All rows are
    computed, so a step takes no less time than one of `tx`.

    Args:
      tx: a chain from gradients to updates, of adam_jax, optax or your own, whose stages treat
        every element of a leaf by itself, or blocks inside a row (`storage.int8` of a leaf of
        three axes or more; under 4,096 elements nothing is kept in blocks).

    Returns:
      A gradient transformation with the same `init` and the same state. The update of a row
      without a gradient is -0, which leaves a weight of -0 be. Inside `jax.shard_map` a device
      must have whole rows, because it sees no others.

    Raises:
      ValueError: in `update`, if a stage is not so local, naming it: `optax.clip_by_global_norm`,
        `optax.scale_by_trust_ratio`, `adam_jax.cautious`, the storages `int8` and `int4` of
        matrices and vectors, `factored` and `block_mean`, and what is fused.
      TypeError: in `update`, if `tx` emits `Moments`, or is given them: it is a part of a chain.

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

        def step(updates, state, params):
            return inner.update(updates, state, params, **extra_args)

        owners = _owners(step, updates, state, params)
        reached = [_reached(grad) for grad in jax.tree.leaves(updates)]

        def chosen(owner, new, old):
            return new if owner == NONE else jnp.where(_as_rows(reached[owner], new), new, old)

        new = step(updates, state, params)
        old = jax.tree.map(lambda update: -jnp.zeros_like(update), new[0]), state
        return jax.tree.map(chosen, owners, new, old)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _reached(grad: Any) -> jax.Array:
    """Which rows have a gradient. NaN is one."""
    return jnp.any(grad != 0, axis=tuple(range(1, jnp.ndim(grad))))


def _as_rows(reached: jax.Array, leaf: Any) -> jax.Array:
    """One number a row, with as many axes as the leaf."""
    return jnp.expand_dims(reached, tuple(range(1, jnp.ndim(leaf))))


# --- What of a step belongs to which leaf ---------------------------------------------------------

NONE = -1


def _owners(step: Callable[..., Any], updates: Any, state: Any, params: Any) -> Any:
    """For every array that a step returns, the number of the gradient whose rows it has, or NONE.

    It is read from the equations of the step: rows have what depends on a gradient or a parameter.
    On the way every equation that has to do with rows must be one that keeps them apart.
    """
    closed, shapes = jax.make_jaxpr(step, return_shape=True)(updates, state, params)
    due: Any = jax.tree.structure(updates)
    if jax.tree.structure(shapes[0]) != due:
        raise TypeError(
            "adam_jax.lazy goes around a whole chain, from gradients to updates, such as "
            "adam_jax.adam(1e-3), and this one emits something else: put the stages that follow "
            "inside as well."
        )
    inputs = [Value(var.aval) for var in closed.jaxpr.invars]
    consts = [Value(var.aval) for var in closed.jaxpr.constvars]
    equations, outputs = inlined(closed.jaxpr, [*inputs, *consts])
    grads, leaves = (jax.tree_util.tree_leaves_with_path(tree) for tree in (updates, params))
    number = {path_name(path): i for i, (path, _) in enumerate(grads)}
    of_params = inputs[len(inputs) - len(leaves) :]
    owner: dict[Value, int] = dict(zip(inputs, range(len(grads)), strict=False))
    for value, (path, _) in zip(of_params, leaves, strict=True):
        owner[value] = number.get(path_name(path), NONE)
    known = -1
    while known < len(owner):
        known = len(owner)
        for equation in equations:
            _follow(equation, owner)
        # What a step makes of the state is the state of the next.
        owner.update(
            (old, _owner(new, owner))
            for new, old in zip(outputs[len(grads) :], inputs[len(grads) :], strict=False)
            if _owner(new, owner) != NONE
        )
    owners = [_owner(value, owner) for value in outputs]
    if any(found not in (NONE, i) for i, found in enumerate(owners[: len(grads)])):
        _refuse_several()
    structure: Any = jax.tree.structure((updates, state))
    return structure.unflatten([*range(len(grads)), *owners[len(grads) :]])


def _owner(value: Any, owner: dict[Value, int]) -> int:
    return owner.get(value, NONE) if isinstance(value, Value) else NONE


def _follow(equation: Equation, owner: dict[Value, int]) -> None:
    """The results of an equation have the rows of its operands."""
    owners = {_owner(value, owner) for value in equation.inputs} - {NONE}
    if len(owners) > 1:
        _refuse_several()
    for number in owners:
        if not _is_local(equation):
            _refuse(equation)
        owner.update(dict.fromkeys(equation.outputs, number))


def _is_local(equation: Equation) -> bool:
    """Whether it keeps rows apart."""
    if equation.tile_operation:
        return equation.params.get("axis") != 0  # the axis that blocks lie along
    return equation.elementwise


def _refuse(equation: Equation) -> NoReturn:
    stage = equation.stage
    if equation.tile_operation:
        stage = "a storage in blocks, int8 or int4,"
    elif stage == "lazy":  # the function that has the equation was made by no stage
        stage = "a stage"
    raise ValueError(
        f"adam_jax.lazy takes chains that treat every element of a leaf, or every block inside a "
        f"row, by itself, and {stage} does not: it has the equation "
        f"{equation.primitive.name!r}. Put the stage outside, as in "
        f"optax.chain(optax.clip_by_global_norm(1.0), adam_jax.lazy(...)); in place of a storage "
        f"take a dtype or adam_jax.storage.stochastic()."
    )


def _refuse_several() -> NoReturn:
    raise ValueError(
        "adam_jax.lazy takes chains that treat every leaf by itself, and this one has equations "
        "between several leaves. Chain those outside of what is lazy."
    )
