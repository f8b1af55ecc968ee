"""From a state of optax to one of this package: a running job goes on here."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from adam_jax._ownership import path_name
from adam_jax.storage._protocol import STARTS

# The stage that keeps a moment of this name, and as what.
_STAGES = {
    "mu": ("scale_by_moments", "mu"),
    "nu": ("scale_by_moments", "nu"),
    "nu_max": ("running_max", "nu"),
    "mu_slow": ("mix_slow_moment", "mu"),
    "m1": ("scale_by_moments", "mu"),  # optax's AdEMAMix
    "m2": ("mix_slow_moment", "mu"),
}


def from_optax(tx: optax.GradientTransformation, params: Any, state: Any) -> Any:
    """The state with which an optimizer of this package goes on from a state of optax.

    The moments are kept as `tx` keeps them, in 8 bits if it does. All else is as after as many
    steps of `tx`: counts, the weights that the moments have gathered under its rates, the steps of
    its schedules. A float32 Adam with constant rates then gives optax's updates bit for bit.

    A state of PyTorch comes by way of `optax.ScaleByAdamState`: ``count=step``, and for `mu` and
    `nu` trees like the parameters with each `exp_avg` and `exp_avg_sq` in its place, transposed
    where the parameter is.

    Args:
      tx: an optimizer, or a chain that keeps its moments in `scale_by_moments`; what it keeps
        besides, such as a residual, starts anew. Not `optax.MultiSteps`, but what that wraps.
      params: the parameters.
      state: a state of `optax.adam`, `adamw`, `nadam`, `nadamw`, `radam`, `adabelief`, `yogi`,
        `amsgrad`, `lion` or `contrib.ademamix`; or any in which NamedTuples have a `count`, and
        `mu`, `nu` or `nu_max` that are trees shaped like the parameters. So have those of this
        package, as long as no storage keeps the moments in parts.

    Returns:
      A state like ``tx.init(params)``.

    Raises:
      TypeError: if `state` has no moments and count.
      ValueError: if the moment of a parameter is missing or of another shape, or `tx` keeps none
        there, naming it; if the counts of `state` differ, or `tx` counts otherwise.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> mu, nu = {"w": jnp.array([0.5, -3.0])}, {"w": jnp.array([0.25, 9.0])}
      >>> old = optax.ScaleByAdamState(jnp.int32(7), mu, nu), optax.EmptyState()  # of optax.adam
      >>> state = adam_jax.from_optax(adam_jax.adam(1e-3), params, old)
      >>> print(state[0].count, state[0].mu["w"], state[-1].count)
      7 [ 0.5 -3. ] 7

    Source: none.
    """
    found = _found(state)
    counts = [node.count for node in found if "count" in node._fields]
    if not counts:
        raise TypeError(
            f"from_optax takes a state with the NamedTuple of an Adam in it, that has count, mu "
            f"and nu, and found none in this {type(state).__name__}."
        )
    starts: dict[tuple[str, str], dict[str, Any]] = {_STAGES["mu"]: {}, _STAGES["nu"]: {}}
    for node in found:
        for name in _STAGES.keys() & set(node._fields):
            moments = jax.tree_util.tree_leaves_with_path(getattr(node, name))
            starts.setdefault(_STAGES[name], {}).update((path_name(path), m) for path, m in moments)
    token = STARTS.set(starts)
    try:
        with jax.disable_jit():  # a compiled init would keep in mind what it starts from here
            new = tx.init(params)
    finally:
        STARTS.reset(token)
    for (_, moment), left in starts.items():
        for path in left:
            raise ValueError(f"The state has a {moment} at {path!r}, and tx keeps none there.")
    aged = _aged(tx, params, counts[0])
    same = [*counts, *(node.count for node in _found(aged) if "count" in node._fields)]
    if not any(isinstance(count, Tracer) for count in same) and len(set(map(int, same))) > 1:
        raise ValueError(
            f"All moments must have taken as many steps, those of the state and those that tx "
            f"counts, got counts of {', '.join(map(str, same))}."
        )
    others = dict(jax.tree_util.tree_leaves_with_path(aged))

    def filled(path, leaf):
        other = others.get(path, leaf)
        return other if other.shape == leaf.shape else leaf

    return jax.tree_util.tree_map_with_path(filled, new)


def _found(state: Any) -> list[Any]:
    """The NamedTuples of a state that hold moments."""
    is_kept = lambda node: bool(_STAGES.keys() & set(getattr(node, "_fields", ())))  # noqa: E731
    return [node for node in jax.tree.leaves(state, is_leaf=is_kept) if is_kept(node)]


def _aged(tx: optax.GradientTransformation, params: Any, count: Any) -> Any:
    """The state after so many steps on parameters without elements: what does not depend on them.

    Weights come out as under any rates, constant, scheduled or injected.
    """
    none_of = lambda p: jnp.zeros((0,) * max(jnp.ndim(p), 1), jnp.result_type(p))  # noqa: E731
    empty = jax.tree.map(none_of, params)
    step = lambda _, state: tx.update(empty, state, empty)[1]  # noqa: E731
    steps = jax.jit(lambda count: jax.lax.fori_loop(0, count, step, tx.init(empty)))
    return steps(jnp.asarray(count, jnp.int32))
