"""A running job goes on here, from a state of optax, of PyTorch or of adam_jax 0.1.0."""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from adam_jax._checks import check_bool
from adam_jax._numerics import as_count
from adam_jax._ownership import is_placeholder, path_name
from adam_jax.moments import ScaleByMomentsState
from adam_jax.storage._protocol import STARTS

Of: TypeAlias = Literal["adam", "adamax", "adopt"]


def from_optax(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    *,
    of: Of = "adam",
    start_missing: bool = False,
) -> Any:
    """Convert a state of optax into one with which an optimizer of this package goes on.

    The moments are stored as `tx` stores them, in 8 bits if it does. What both states have at the
    same path is copied: injected hyperparameters, what `optax.contrib.reduce_on_plateau` learnt of
    the losses. All else is what it would be after as many steps of `tx`: counts, the weights that
    the moments have gathered under its rates, the steps of its schedules. A float32 Adam with
    constant rates then gives optax's updates bit for bit.

    A state of this package, or of adam_jax 0.1.0, is converted likewise, and keeps its weights.
    Restore its checkpoint without a target, and give the dicts and lists that come back to this
    function. Moments in 8 bits stay bit for bit what they are; for them `tx` must be the same chain
    with the same storage.

    A state of PyTorch is first made an `optax.ScaleByAdamState`, with ``count=step`` and for `mu`
    and `nu` trees like the parameters, of each `exp_avg` and `exp_avg_sq`, transposed where the
    parameter is.

    Args:
      tx: an optimizer of this package, or a chain that keeps its moments in `scale_by_moments`. For
        `optax.MultiSteps` give the optimizer that it wraps.
      params: the tree of parameters.
      state: a state of `optax.adam`, `adamw`, `nadam`, `nadamw`, `radam`, `adabelief`, `yogi`,
        `amsgrad`, `lion`, `adamax`, `adamaxw`, `contrib.ademamix` or `contrib.adopt`; or any in
        which NamedTuples, or the dicts that a checkpoint makes of them, have a `count`, and `mu`,
        `nu`, `nu_max` or `trace` that are trees shaped like the parameters.
      of: which kind of moments `state` has, which the state itself does not tell: "adamax" if `nu`
        is an infinity norm, as in optax (this package keeps its square); "adopt" if `mu` averages
        gradients that are divided already. Default "adam": neither.
      start_missing: whether the moments of parameters that `state` lacks, as after a model has
        grown, start at zero, with the bias correction of the others. Default False: an error names
        them.

    Returns:
      A state like ``tx.init(params)``.

    Raises:
      TypeError: if `state` has no moments and count, or `start_missing` is not a bool.
      ValueError: if `of` is none of the three; if the moment of a parameter is missing or of
        another shape, or `tx` keeps none there, or another kind of moment, or in another storage,
        naming it; if a hyperparameter is injected in `state` and not in `tx`; if the counts of
        `state` differ, or `tx` counts otherwise.

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
    if of not in get_args(Of):
        raise ValueError(f"of must be one of {', '.join(get_args(Of))}, got {of!r}.")
    check_bool("start_missing", start_missing)
    old = _as_now(_arrays(state))
    moments = _moments(old, params)
    counts = {m.node: old[*m.node, "count"] for m in moments if (*m.node, "count") in old}
    counts = counts or {path: array for path, array in old.items() if path[-1:] == ("count",)}
    if not counts:
        raise TypeError(
            f"from_optax takes a state with the NamedTuple of an Adam in it, that has count, mu "
            f"and nu, and found none in this {type(state).__name__}."
        )
    starts = {key: _Starts() for key in _STAGES.values()}
    for m in moments:
        is_norm = of == "adamax" and m.key == _NU and not m.is_own
        starts[m.key][m.name] = jnp.square(m.array) if is_norm else m.array
    new = _started(tx, params, starts)
    same = {path: old[path] for path, leaf in _arrays(new).items() if _fits(old.get(path), leaf)}
    started = _check_names(moments, starts, same, start_missing)
    _check_meaning(started, of, tx, params, new)
    lost = [path[-1] for path in old if path[-2:-1] == ("hyperparams",) and path not in same]
    if lost:
        raise ValueError(
            f"The state has injected hyperparameters that tx does not inject: {', '.join(lost)}. "
            f"Put optax.inject_hyperparams around the same ones of tx; or give from_optax the "
            f"inner_state alone, if tx is to have its own."
        )
    for m in started:
        same.pop(m.path, None)
    aged = _aged(tx, params, next(iter(counts.values())), same)
    new = _with_values(new, {**aged, **same})
    steps = [*counts.values(), *(node.count for node in _nodes(new))]
    if not any(isinstance(count, Tracer) for count in steps) and len(set(map(int, steps))) > 1:
        raise ValueError(
            f"All moments must have taken as many steps, those of the state and those that tx "
            f"counts, got counts of {', '.join(map(str, steps))}."
        )
    return new


# --- What is where in a state ---------------------------------------------------------------------

Path: TypeAlias = tuple[str, ...]
Key: TypeAlias = tuple[str, str]  # the stage that keeps a moment, and as what

_STAGES: dict[str, Key] = {
    "mu": ("scale_by_moments", "mu"),
    "nu": ("scale_by_moments", "nu"),
    "nu_max": ("running_max", "nu"),
    "mu_slow": ("mix_slow_moment", "mu"),
    "m1": ("scale_by_moments", "mu"),  # optax's AdEMAMix
    "m2": ("mix_slow_moment", "mu"),
    "trace": ("accumulate", "mu"),
}
_MU, _NU = _STAGES["mu"], _STAGES["nu"]


class _Moment(NamedTuple):
    """An array of a state that is the moment of a parameter, or a part of one."""

    key: Key
    name: str  # of the parameter; that of the part is before it
    node: Path  # of the NamedTuple that it is in
    path: Path
    array: Any
    is_own: bool  # of this package, where moments mean what they mean to `tx`


def _arrays(tree: Any) -> dict[Path, Any]:
    """The arrays of a tree by their paths, the same in the dicts that a checkpoint restores."""
    text = lambda key: jax.tree_util.keystr((key,), simple=True)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(map(text, path)): array for path, array in leaves}


def _as_now(arrays: dict[Path, Any]) -> dict[Path, Any]:
    """Counts and weights by their names of today, which were others in adam_jax 0.1.0."""
    now = dict(arrays)
    for path, array in arrays.items():
        if path[-1:] == ("step",) and jnp.issubdtype(array.dtype, jnp.integer):
            now[*path[:-1], "count"] = now.pop(path)
        if path[-2:] in (("mu_weight", "value"), ("nu_weight", "value")):
            rows = [(*path[:-1], name) for name in ("value", "ahead", "error", "age", "decay")]
            column = jnp.stack([jnp.asarray(arrays[row]) for row in rows])[:, None]
            weights = *path[:-2], "weights"
            now[weights] = jnp.concatenate([now.get(weights, column[:, :0]), column], axis=1)
    return now


def _moments(arrays: dict[Path, Any], params: Any) -> list[_Moment]:
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    moments = []
    for path, array in arrays.items():
        at = next((i for i, name in enumerate(path) if name in _STAGES), None)
        if at is None or "hyperparams" in path[:at] or is_placeholder(array):
            continue
        node, name = path[:at], "/".join(path[at + 1 :])
        if path[-1] == "value" and name not in names:  # in a box that Flax has around parameters
            name = "/".join(path[at + 1 : -1])
        is_own = (*node, "weights") in arrays
        moments.append(_Moment(_STAGES[path[at]], name, node, path, array, is_own))
    return moments


def _nodes(state: Any) -> list[ScaleByMomentsState]:
    is_node = lambda node: isinstance(node, ScaleByMomentsState)  # noqa: E731
    return list(filter(is_node, jax.tree.leaves(state, is_leaf=is_node)))


def _fits(array: Any, leaf: Any) -> bool:
    """Whether an array of another state may stand in the place of this one."""
    if array is None or jnp.shape(array) != jnp.shape(leaf):
        return False
    return is_placeholder(array) == is_placeholder(leaf)


# --- The new state --------------------------------------------------------------------------------


class _Starts(dict):
    """Moments by the names of their parameters; `asked` are the names that an `init` looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


def _started(tx: Any, params: Any, starts: dict[Key, Any]) -> Any:
    """A state that `tx` makes with moments that start from those of the old one."""
    token = STARTS.set(starts)
    try:
        with jax.disable_jit():  # a compiled init would keep in mind what it starts from here
            return tx.init(params)
    finally:
        STARTS.reset(token)


def _with_values(state: Any, values: dict[Path, Any]) -> Any:
    """The state with other arrays at some paths, copied, in the dtypes that it has."""
    arrays = _arrays(state)
    filled = [
        jnp.array(values[path], leaf.dtype) if _fits(values.get(path), leaf) else leaf
        for path, leaf in arrays.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(state), filled)


def _step(tx: Any, params: Any, state: Any) -> Any:
    """The state after a step with the parameters as gradients."""
    value = jnp.zeros([], float)  # of the loss, for optax.contrib.reduce_on_plateau
    update = optax.with_extra_args_support(tx).update
    return update(params, state, params, value=value)[1]


def _aged(tx: Any, params: Any, count: Any, same: dict[Path, Any]) -> dict[Path, Any]:
    """The state after so many steps on parameters without elements: what does not depend on them.

    Weights come out as under any rates, constant, scheduled or injected. What a plateau of the loss
    has led to is not known.
    """
    none_of = lambda p: jnp.zeros((0,) * max(jnp.ndim(p), 1), jnp.result_type(p))  # noqa: E731
    empty = jax.tree.map(none_of, params)
    injected = {path: value for path, value in same.items() if "hyperparams" in path}

    @jax.jit
    def steps(count):
        step = lambda state: _step(tx, empty, state)  # noqa: E731
        start = _with_values(tx.init(empty), injected)
        state = jax.lax.fori_loop(0, count, lambda _, state: step(state), start)
        for node in _nodes(state)[:1]:  # the first step of in_basis may only make the basis
            state = jax.lax.cond(node.count < count, step, lambda state: state, state)
        return state

    aged = _arrays(steps(as_count(count)))
    return {path: x for path, x in aged.items() if (*path[:-1], "plateau_count") not in aged}


# --- What is refused ------------------------------------------------------------------------------


def _check_names(
    moments: list[_Moment], starts: dict[Key, _Starts], same: dict[Path, Any], start_missing: bool
) -> list[_Moment]:
    """There must be a moment for every parameter, and a parameter for every moment.

    Returns those that the new state has been started from. Others may be parts that stay.
    """
    started = [m for m in moments if m.name in starts[m.key].asked]
    parts = [m._replace(name=m.name.partition("/")[2]) for m in moments if m.path in same]
    found = [*started, *(m for m in parts if m.name in starts[m.key].asked)]
    paths = {m.path for m in found}
    for (stage, moment), of_stage in starts.items():
        key = stage, moment
        if surplus := {m.name for m in moments if m.key == key and m.path not in paths}:
            raise ValueError(
                f"The state has a {moment} for {stage} at {_listed(surplus)}, and tx keeps none "
                f"there: give tx the parameters and the storage that the state was made with."
            )
        missing = of_stage.asked - {m.name for m in found if m.key == key}
        if missing and not start_missing:
            raise ValueError(
                f"{stage} needs a {moment} for the parameter at {_listed(missing)}, and the state "
                f"has none: start it at zero with start_missing=True."
            )
    return started


def _listed(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _check_meaning(started: list[_Moment], of: Of, tx: Any, params: Any, new: Any) -> None:
    """`mu` and `nu` must mean the same there and here.

    Where one node keeps both moments of a parameter, both are of the gradients.
    """
    mu, nu = ({m.name: m for m in started if m.key == key} for key in (_MU, _NU))
    both = mu.keys() & nu.keys()
    there = {name for name in both if mu[name].node == nu[name].node}
    of_optax = {name for name in there if not mu[name].is_own}
    if of == "adopt":
        there -= of_optax
    kept = [getattr(node.mu, "whole", node.mu) for node in _nodes(new) if node.nu is not None]
    here = {path_name(path[1:]) for path, _ in jax.tree_util.tree_leaves_with_path(kept)}
    if differ := both & (here ^ there):
        raise ValueError(
            f"mu averages gradients in one of the state and tx, and normalized gradients in the "
            f"other, as adopt and laprop do, at {_listed(differ)}: say of='adopt' if the state is "
            f"one of optax.contrib.adopt, or start anew with tx.init(params)."
        )
    keeps_norm = _keeps_norm(tx, params) if of_optax & here else None
    if keeps_norm is not None and keeps_norm != (of == "adamax"):
        raise ValueError(
            f"tx {'keeps' if keeps_norm else 'does not keep'} the square of an infinity norm in "
            f"nu: say of='adamax' if, and only if, the state is one of optax.adamax or "
            f"optax.adamaxw and tx an adamax, or start anew with tx.init(params)."
        )


def _keeps_norm(tx: Any, params: Any) -> bool | None:
    """Whether the second moment of a first gradient g is g**2, as in adamax; None if nobody knows.

    It is tried, on parameters of one element: what rule a chain has cannot be asked.
    """
    with jax.ensure_compile_time_eval():
        one = jax.tree.map(lambda p: jnp.ones((1,) * jnp.ndim(p), jnp.result_type(p)), params)
        for node in _nodes(_step(tx, one, tx.init(one))):
            decays = jnp.abs(node.weights[-1])
            mus, nus = ([x for x in jax.tree.leaves(m) if not is_placeholder(x)] for m in node[1:3])
            for mu, nu in zip(mus, nus, strict=False):
                if decays[1] > 0.1:
                    grad = jnp.abs(mu.astype(float)) / (1 - decays[0])
                    return bool(jnp.all(nu.astype(float) > 0.95 * grad**2))
    return None
