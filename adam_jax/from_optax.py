"""A running job goes on here, from a state of optax, of PyTorch or of adam_jax 0.1.0."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from adam_jax._checks import check_bool
from adam_jax._numerics import as_count
from adam_jax._ownership import is_placeholder, path_name
from adam_jax.basis import InBasisState
from adam_jax.correction import MixSlowMomentState, RunningMaxState
from adam_jax.moments import ScaleByMomentsState
from adam_jax.storage._codes import Blocks
from adam_jax.storage._means import Factors
from adam_jax.storage._protocol import STARTS

Of: TypeAlias = Literal["adam", "adamax", "adopt"]
Key: TypeAlias = tuple[str, str]  # the stage that keeps a moment, and as what: "mu" or "nu"


def from_optax(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    *,
    of: Of = "adam",
    start_missing: bool = False,
) -> Any:
    """Convert a state of optax into one with which an optimizer of this package goes on.

    The moments are kept as `tx` keeps them, in 8 bits if it does. Injected hyperparameters stay
    what they are in `state`, and so does what the stages of `tx` keep that are in `state` too, such
    as `optax.contrib.reduce_on_plateau`. All else is as after as many steps of `tx`: counts, the
    weights that the moments have gathered under its rates, the steps of its schedules. A float32
    Adam with constant rates then gives optax's updates bit for bit.

    A state of adam_jax 0.1.0 goes on likewise, with the weights that it has: restore the checkpoint
    without a target (or by the same optimizer of that version), and give what comes back, dicts and
    lists, to this function. Moments in 8 bits stay bit for bit what they are.

    A state of PyTorch comes by way of `optax.ScaleByAdamState`: ``count=step``, and for `mu` and
    `nu` trees like the parameters with each `exp_avg` and `exp_avg_sq` in its place, transposed
    where the parameter is.

    Args:
      tx: an optimizer, or a chain that keeps its moments in `scale_by_moments`. Not
        `optax.MultiSteps`, but what that wraps.
      params: the parameters.
      state: a state of `optax.adam`, `adamw`, `nadam`, `nadamw`, `radam`, `adabelief`, `yogi`,
        `amsgrad`, `lion`, `adamax`, `adamaxw`, `contrib.ademamix` or `contrib.adopt`; or any in
        which NamedTuples, or the dicts that a checkpoint makes of them, have a `count`, and `mu`,
        `nu` or `nu_max` that are trees shaped like the parameters.
      of: what `mu` and `nu` of optax mean, which the state itself does not tell: "adamax", if `nu`
        is an infinity norm (here its square is kept); "adopt", if `mu` averages gradients that are
        normalized already; "adam", if neither. Default "adam".
      start_missing: whether the moments of parameters that `state` lacks, as after a model has
        grown, start at zero; their bias correction is that of the others. Default False: an error
        names them.

    Returns:
      A state like ``tx.init(params)``.

    Raises:
      TypeError: if `state` has no moments and count.
      ValueError: if the moment of a parameter is missing or of another shape, or `tx` keeps none
        there, or keeps another kind of moment, naming it; if a hyperparameter is injected in
        `state` and not in `tx`; if the counts of `state` differ, or `tx` counts otherwise.

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
    state = _unboxed(state, params)
    kept = [node for node in _nodes(state) if _moments(node)]
    due = [node for node in _nodes(jax.eval_shape(tx.init, params)) if _is_due(node)]
    counted = kept or [node for node in _nodes(state) if not due and _count(node) is not None]
    if not counted:
        raise TypeError(
            f"from_optax takes a state with the NamedTuple of an Adam in it, that has count, mu "
            f"and nu, and found none in this {type(state).__name__}."
        )
    _check_names(kept, due, start_missing)
    _check_meaning(kept, due, of, tx, params)
    new = _started(tx, params, kept, of)
    injected = dict(_hyperparams(new, state))
    aged = _aged(tx, params, _count(counted[0]), injected)
    _check_counts([*kept, *(node for node in _nodes(aged) if _moments(node))])
    values = {**dict(_simulated(aged)), **dict(_of_other_stages(new, state)), **injected}
    values.update(_weights(new, kept))
    values.update(_parts(new, kept))
    return _with_values(new, values)


# --- What is where in a state ---------------------------------------------------------------------


class _Node(NamedTuple):
    """A NamedTuple of a state, or the dict that a checkpoint restores in its place."""

    path: tuple
    tree: Any
    fields: dict[str, Any]


def _nodes(tree: Any, path: tuple = ()) -> Iterator[_Node]:
    """All of a state, but for what is inside of moments."""
    moments: Any = ()
    if _is_named(tree) or isinstance(tree, dict):
        node = _Node(path, tree, dict(tree._asdict() if _is_named(tree) else tree))
        yield node
        moments = _STAGES.keys() if _moments(node) else ()
    children = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    for key, child in children:
        if key and path_name(key) not in moments:
            yield from _nodes(child, path + key)


def _is_named(tree: Any) -> bool:
    return hasattr(tree, "_asdict")


def _count(node: _Node) -> Any:
    """The number of steps, which adam_jax 0.1.0 called `step` in some places."""
    return node.fields.get("count", node.fields.get("step"))


# The stage that keeps a moment of this name, and as what.
_STAGES: dict[str, Key] = {
    "mu": ("scale_by_moments", "mu"),
    "nu": ("scale_by_moments", "nu"),
    "nu_max": ("running_max", "nu"),
    "mu_slow": ("mix_slow_moment", "mu"),
    "m1": ("scale_by_moments", "mu"),  # optax's AdEMAMix
    "m2": ("mix_slow_moment", "mu"),
}
_MU, _NU = _STAGES["mu"], _STAGES["nu"]


def _moments(node: _Node) -> dict[Key, Any]:
    """What a node keeps, if it counts steps."""
    if _count(node) is None:
        return {}
    found = {_STAGES[name]: node.fields[name] for name in _STAGES if name in node.fields}
    return {key: tree for key, tree in found.items() if tree is not None}


def _is_due(node: _Node) -> bool:
    """Whether moments are started there: in the stages of this package."""
    return isinstance(node.tree, ScaleByMomentsState | RunningMaxState | MixSlowMomentState)


def _is_own(node: _Node) -> bool:
    """Whether it is of this package, where moments mean what they mean to `tx`."""
    return bool({"weights", "mu_weight", "nu_weight"} & node.fields.keys())


def _parts_of(moments: Any) -> dict[str, Any]:
    """The trees in which a storage keeps moments, by their names; {} if they are one tree."""
    if _is_named(moments) and moments._fields[-1] == "whole":
        return moments._asdict()
    if isinstance(moments, dict) and set(moments) in (set(Blocks._fields), set(Factors._fields)):
        return moments
    return {}


def _arrays(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _names(moments: Any) -> set[str]:
    """The paths of the parameters of which there are moments."""
    trees = list(_parts_of(moments).values()) or [moments]
    return {name for tree in trees for name in _arrays(tree)}


def _names_by_key(nodes: list[_Node]) -> dict[Key, set[str]]:
    names: dict[Key, set[str]] = {}
    for node in nodes:
        for key, moments in _moments(node).items():
            names.setdefault(key, set()).update(_names(moments))
    return names


# --- What is refused ------------------------------------------------------------------------------


def _check_names(kept: list[_Node], due: list[_Node], start_missing: bool) -> None:
    """There must be a moment for every parameter, and a parameter for every moment."""
    given, needed = _names_by_key(kept), _names_by_key(due)
    for key in {**given, **needed}:
        stage, moment = key
        surplus = given.get(key, set()) - needed.get(key, set())
        missing = needed.get(key, set()) - given.get(key, set())
        if surplus:
            raise ValueError(
                f"The state has a {moment} for {stage} at {_listed(surplus)}, and tx keeps none "
                f"there."
            )
        if missing and not start_missing:
            raise ValueError(
                f"{stage} needs a {moment} for the parameter at {_listed(missing)}, and the state "
                f"has none: start it at zero with start_missing=True."
            )


def _listed(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _check_meaning(kept: list[_Node], due: list[_Node], of: Of, tx: Any, params: Any) -> None:
    """`mu` and `nu` must mean the same there and here."""
    foreign = _together([node for node in kept if not _is_own(node)])
    own = _together([node for node in kept if _is_own(node)])
    there = own if of == "adopt" else own | foreign
    here, given = _together(due), _names_by_key(kept)
    both = given.get(_MU, set()) & given.get(_NU, set())
    if both & here - there:
        raise ValueError(
            f"mu of the state averages normalized gradients, and mu of tx averages the gradients, "
            f"at {_listed(both & here - there)}: start anew with tx.init(params)."
        )
    if both & there - here:
        raise ValueError(
            f"tx averages normalized gradients in mu, as adopt and laprop do, and mu of the state "
            f"averages the gradients, at {_listed(both & there - here)}: say of='adopt' if the "
            f"state is one of optax.contrib.adopt, or start anew with tx.init(params)."
        )
    norm = _keeps_norm(tx, params) if foreign & here else None
    if norm is not None and norm != (of == "adamax"):
        raise ValueError(
            "tx keeps the square of the largest gradient in nu, as adamax does: say of='adamax' if "
            "the state is one of optax.adamax or optax.adamaxw, or start anew with tx.init(params)."
            if norm
            else "of='adamax', but tx averages squares in nu: start anew with tx.init(params)."
        )


def _together(nodes: list[_Node]) -> set[str]:
    """The parameters of which one node keeps both moments: both are then of the gradients."""
    moments = [_moments(node) for node in nodes]
    names = [_names(m[_MU]) & _names(m[_NU]) for m in moments if m.keys() >= {_MU, _NU}]
    return set().union(*names)


def _keeps_norm(tx: Any, params: Any) -> bool | None:
    """Whether the second moment of a first gradient g is g**2, as in adamax; None if nobody knows.

    It is tried, on parameters of one element: what rule a chain has cannot be asked.
    """
    with jax.ensure_compile_time_eval():
        one = jax.tree.map(lambda p: jnp.ones((1,) * jnp.ndim(p), jnp.result_type(p)), params)
        for node in _nodes(_step(tx, one, tx.init(one))):
            moments = _moments(node)
            if not (_is_due(node) and moments.keys() >= {_MU, _NU}):
                continue
            b1, b2 = jnp.abs(node.fields["weights"][-1])
            whole = (_parts_of(tree).get("whole", tree) for tree in (moments[_MU], moments[_NU]))
            for mu, nu in zip(*map(jax.tree.leaves, whole), strict=True):
                if not is_placeholder(mu) and not is_placeholder(nu) and b2 > 0.1:
                    grad = jnp.abs(mu.astype(float)) / (1 - b1)
                    return bool(jnp.all(nu.astype(float) > 0.95 * grad**2))
    return None


def _check_counts(nodes: list[_Node]) -> None:
    """All moments must have taken as many steps."""
    counts = [_count(node) for node in nodes]
    if not any(isinstance(count, Tracer) for count in counts) and len(set(map(int, counts))) > 1:
        raise ValueError(
            f"All moments must have taken as many steps, those of the state and those that tx "
            f"counts, got counts of {', '.join(map(str, counts))}."
        )


# --- The new state --------------------------------------------------------------------------------


def _started(tx: Any, params: Any, kept: list[_Node], of: Of) -> Any:
    """A state that `tx` makes with moments that start from those of the old one."""
    starts: dict[Key, dict[str, Any]] = {}
    for node in kept:
        for key, moments in _moments(node).items():
            if not _parts_of(moments):
                arrays = _arrays(moments)
                if of == "adamax" and key == _NU and not _is_own(node):
                    arrays = {name: jnp.square(norm) for name, norm in arrays.items()}
                starts.setdefault(key, {}).update(arrays)
    token = STARTS.set(starts)
    try:
        with jax.disable_jit():  # a compiled init would keep in mind what it starts from here
            return tx.init(params)
    finally:
        STARTS.reset(token)


def _with_values(state: Any, values: dict[tuple, Any]) -> Any:
    """The state with other arrays at some paths, copied, in the dtypes that it has."""

    def replaced(path, leaf):
        value = values.get(path)
        if value is None or jnp.shape(value) != jnp.shape(leaf):
            return leaf
        return jnp.array(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(replaced, state)


def _step(tx: Any, params: Any, state: Any) -> Any:
    """The state after a step with the parameters as gradients."""
    value = jnp.zeros([], float)  # of the loss, for optax.contrib.reduce_on_plateau
    update = optax.with_extra_args_support(tx).update
    return update(params, state, params, value=value)[1]


def _aged(tx: Any, params: Any, count: Any, injected: dict[tuple, Any]) -> Any:
    """The state after so many steps on parameters without elements: what does not depend on them.

    Weights come out as under any rates, constant, scheduled or injected.
    """
    none_of = lambda p: jnp.zeros((0,) * max(jnp.ndim(p), 1), jnp.result_type(p))  # noqa: E731
    empty = jax.tree.map(none_of, params)

    @jax.jit
    def steps(count):
        start = _with_values(tx.init(empty), injected)
        state = jax.lax.fori_loop(0, count, lambda _, state: _step(tx, empty, state), start)
        inside = [
            n
            for node in _nodes(state)
            if isinstance(node.tree, InBasisState)
            for n in _nodes(node.tree)
        ]
        counts = [_count(node) for node in inside if _moments(node)]
        if not counts:
            return state
        # A basis that follows the gradients takes a step to start.
        return jax.lax.cond(counts[0] < count, lambda s: _step(tx, empty, s), lambda s: s, state)

    return steps(as_count(count))


def _simulated(aged: Any) -> Iterator[tuple[tuple, Any]]:
    """What is known of a state by its age: all but what followed the value of a loss."""
    unknown = [node.path for node in _nodes(aged) if "plateau_count" in node.fields]
    for path, leaf in jax.tree_util.tree_leaves_with_path(aged):
        if not any(path[: len(start)] == start for start in unknown):
            yield path, leaf


def _of_other_stages(new: Any, state: Any) -> Iterator[tuple[tuple, Any]]:
    """What stages without moments keep, where there are as many of a kind in the old state.

    The fields tell the kind, also of the dicts that a checkpoint restores.
    """
    here = _by_kind(node for node in _nodes(new) if _is_named(node.tree))
    there = _by_kind(_nodes(state))
    for kind, nodes in here.items():
        if len(nodes) != len(there.get(kind, ())) or "hyperparams" in kind:
            continue
        for node, old in zip(nodes, there[kind], strict=True):
            arrays = _arrays(old.tree)
            inside = lambda tree, node=node: tree is not node.tree and _is_named(tree)  # noqa: E731
            for path, leaf in jax.tree_util.tree_leaves_with_path(node.tree, is_leaf=inside):
                name = path_name(path)
                if name in arrays and name != "count" and not _is_named(leaf):
                    yield node.path + path, arrays[name]


def _by_kind(nodes: Iterable[_Node]) -> dict[frozenset[str], list[_Node]]:
    kinds: dict[frozenset[str], list[_Node]] = {}
    for node in nodes:
        if not _moments(node):
            kinds.setdefault(frozenset(node.fields), []).append(node)
    return kinds


def _hyperparams(new: Any, state: Any) -> Iterator[tuple[tuple, Any]]:
    """The injected hyperparameters. Scheduled ones are left to the schedules of `tx`."""
    here, there = (
        [node for node in _nodes(tree) if "hyperparams" in node.fields] for tree in (new, state)
    )
    lost = [name for node in there[len(here) :] for name in node.fields["hyperparams"]]
    for node, old in zip(here, there, strict=False):
        due, scheduled = node.fields["hyperparams"], node.fields.get("hyperparams_states", {})
        for name, value in old.fields["hyperparams"].items():
            if name not in due or jnp.shape(value) != jnp.shape(due[name]):
                lost.append(name)
            elif name not in scheduled:
                keys = jax.tree_util.GetAttrKey("hyperparams"), jax.tree_util.DictKey(name)
                yield (*node.path, *keys), value
    if lost:
        raise ValueError(
            f"The state has injected hyperparameters that tx does not inject: {', '.join(lost)}. "
            f"Put optax.inject_hyperparams around the same ones of tx; or give from_optax the "
            f"inner_state alone, if tx is to have its own."
        )


def _weights(new: Any, kept: list[_Node]) -> Iterator[tuple[tuple, Any]]:
    """The weights of the moments, where the old state is of this package and has them."""
    columns = [
        (key, _names(_moments(node)[key]), column)
        for node in kept
        for key, column in _columns(node).items()
    ]
    for node in _nodes(new):
        if not isinstance(node.tree, ScaleByMomentsState):
            continue
        found = [
            next(
                (column for of, names, column in columns if of == key and names & _names(tree)),
                None,
            )
            for key, tree in _moments(node).items()
        ]
        known = [column for column in found if column is not None]
        if len(known) == len(found):
            yield (*node.path, jax.tree_util.GetAttrKey("weights")), jnp.stack(known, axis=1)


def _columns(node: _Node) -> dict[Key, Any]:
    """The weights of each moment. What adam_jax 0.1.0 had one by one is a column now."""
    weights, keys = node.fields.get("weights"), [key for key in (_MU, _NU) if key in _moments(node)]
    if weights is not None:
        return dict(zip(keys, jnp.asarray(weights).T, strict=True))
    old = {key: node.fields.get(f"{key[1]}_weight") for key in keys}
    fields = {key: w._asdict() if _is_named(w) else w for key, w in old.items() if w is not None}
    rows = "value", "ahead", "error", "age", "decay"
    return {key: jnp.stack([weight[row] for row in rows]) for key, weight in fields.items()}


def _parts(new: Any, kept: list[_Node]) -> Iterator[tuple[tuple, Any]]:
    """What a storage of this package keeps of moments, as it is."""
    stored: dict[Key, dict[str, Any]] = {}
    for node in kept:
        for key, moments in _moments(node).items():
            if _parts_of(moments):
                stored.setdefault(key, {}).update(_arrays(moments))
    for node in filter(_is_due, _nodes(new)):
        for field in _STAGES.keys() & node.fields.keys():
            arrays = stored.get(_STAGES[field], {})
            names = {name.partition("/")[2] for name in arrays}
            start = (*node.path, jax.tree_util.GetAttrKey(field))
            for path, leaf in jax.tree_util.tree_leaves_with_path(node.fields[field]):
                part, _, name = path_name(path).partition("/")
                if not _parts_of(node.fields[field]):
                    part, name = "whole", path_name(path)
                if name not in names:
                    continue
                old = arrays.get(f"{part}/{name}" if name else part)
                if old is None or is_placeholder(old):
                    fits = is_placeholder(leaf)
                else:
                    fits = not is_placeholder(leaf) and jnp.shape(old) == jnp.shape(leaf)
                    yield start + path, old
                if not fits:
                    raise ValueError(
                        f"The state keeps {field} of the parameter at {name!r} in parts, and not "
                        f"as tx does: give tx the storage that the state was made with."
                    )


def _unboxed(state: Any, params: Any) -> Any:
    """Without the dicts that a checkpoint makes of the boxes that Flax has around parameters."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not any(path and path[-1] == jax.tree_util.GetAttrKey("value") for path in paths):
        return state
    is_box = lambda node: isinstance(node, dict) and node.keys() == {"value"}  # noqa: E731
    unboxed = lambda node: node["value"] if is_box(node) else node  # noqa: E731
    return jax.tree.map(unboxed, state, is_leaf=is_box)
