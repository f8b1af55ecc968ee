r"""The step inside the backward pass: no gradients in memory.

A local chain steps every layer of a stack by itself. In a model whose layers are scanned, the
backward pass can therefore step a layer as soon as its gradient is known, and forget the gradient:

    forward     x₀ ──layer 0──▶ x₁ ──layer 1──▶ … ──layer L−1──▶ x_L ──▶ loss
    backward    x̄₀ ◀──layer 0── x̄₁ ◀──layer 1── … ◀──layer L−1── x̄_L ◀──┘
                       │               │                 │
                       θ₀ += u₀        θ₁ += u₁          θ_{L−1} += u_{L−1}

`scan` stands in the loss where `jax.lax.scan` would, and `value_and_step` takes the place of
`jax.value_and_grad` and `tx.update`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from adam_jax._checks import check_count, check_hyperparameter
from adam_jax._numerics import accumulator
from adam_jax._ownership import path_name
from adam_jax.storage._protocol import KEPT

# --- A chain on a stack ---------------------------------------------------------------------------


def stacked(
    tx: optax.GradientTransformation, axis: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Treat every layer of stacked leaves as a leaf of its own.

    .. math:: \mathrm{stacked}(T)(g)_l = T(g_l) \quad \text{for every layer } l

    A model whose layers are scanned keeps the weights of one kind in one array, with the layers
    along an axis. Without `stacked`, what a stage computes of a leaf is computed over all layers:
    the norms of `lamb`, the mean of `cautious`, the blocks of a storage.

    Args:
      tx: any chain, of adam_jax, optax or your own. With ``fuse(tx)`` the plain chain runs, without
        kernels (`adam_jax.backward` has them), and ``fuse(stacked(tx))`` is an error.
      axis: the axis of every leaf that the layers lie along. Default 0.

    Returns:
      A gradient transformation. Its state is that of `tx` with an axis of layers before the others,
      as `jax.vmap(tx.init)` makes it: counts have the shape (layers,). A scalar that you set in the
      state, such as an injected rate, is that of all layers. All layers draw the same random bits
      and get the same further arguments of `update`. A tree without leaves goes to `tx` as it is.

    Raises:
      ValueError: if a leaf does not have the axis, or the leaves differ in its length, naming one.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((12, 64, 64))}  # of 12 layers
      >>> tx = adam_jax.stacked(adam_jax.lamb(1e-3))
      >>> tx.init(params)[0].count.shape
      (12,)

    Source: none; it is `jax.vmap`.
    """
    inner: Any = optax.with_extra_args_support(tx)

    def init_fn(params):
        if not jax.tree.leaves(params):
            return inner.init(params)
        _layers("stacked", params, axis)
        return jax.vmap(inner.init, axis)(params)

    def update_fn(updates, state, params=None, **extra_args):
        def of_layer(updates, state, params):
            return inner.update(updates, state, params, **extra_args)

        if not jax.tree.leaves(updates):
            return of_layer(updates, state, params)
        state = _for_all(state, _layers("stacked", updates, axis))
        return jax.vmap(of_layer, (axis, 0, axis), (axis, 0))(updates, state, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _for_all(state: Any, number: int) -> Any:
    """A scalar in the state of layers, such as a rate set from outside, is that of every layer."""
    return jax.tree.map(lambda x: x if jnp.ndim(x) else jnp.broadcast_to(x, (number,)), state)


def _layers(name: str, tree: Any, axis: int = 0) -> int:
    """How many layers a stack has."""
    lengths: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where, shape = jax.tree_util.keystr(path) or "the leaf", jnp.shape(leaf)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"{name}: {where} of shape {shape} has no axis {axis} of layers.")
        lengths.setdefault(shape[axis], where)
    if len(lengths) != 1:
        found = " and ".join(f"{n} layers ({where})" for n, where in lengths.items()) or "no leaves"
        raise ValueError(f"{name} needs leaves with one number of layers, got {found}.")
    return next(iter(lengths))


# --- The loss -------------------------------------------------------------------------------------


class _Call:
    """The call of `scan` in a loss, whose results are known once it has been left and done."""

    results: Any = None
    count = 0


class _Reached(Exception):  # noqa: N818  # no error: the loss is left at its scan
    """What the loss gives to `scan`."""

    def __init__(self, *operands: Any):
        self.operands = operands


class LayerOutsideOfScan:
    """Stands for a leaf of the layers in a loss. Errors show the name of its type.

    Only `scan` can read it: elsewhere the layers would have a gradient that their step misses. What
    is read elsewhere belongs to `params`.
    """

    def __init__(self, call: _Call, number: int):
        self.call, self.number = call, number


def scan(f: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over the layers, which `value_and_step` steps on its way back.

    Called with arrays it *is* `jax.lax.scan`, so that one loss serves training, evaluation and
    `jax.grad`.

    Args:
      f: a layer, `(carry, x) -> (carry, y)`. What is kept of a layer for the way back is all that
        the derivative needs or, if `f` is wrapped in `jax.checkpoint`, what its policy says.
      init: the first carry, a tree of arrays.
      xs: the stacked layers, alone or in a tree with other arrays that have one row for each layer.

    Returns:
      The last carry, and the `y` of all layers, stacked.

    Raises:
      ValueError: in a loss of `value_and_step`, if it scans the layers more than once.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> layers = jnp.array([[2.0], [3.0]])
      >>> x, ys = adam_jax.backward.scan(lambda x, w: (w * x, x), jnp.ones(1), layers)
      >>> print(x, ys.ravel())
      [6.] [1. 2.]

    Source: none, see `jax.lax.scan`.
    """
    calls = {leaf.call for leaf in jax.tree.leaves(xs) if isinstance(leaf, LayerOutsideOfScan)}
    if not calls:
        return jax.lax.scan(f, init, xs)
    (call,) = calls
    if call.results is None:
        raise _Reached(f, init, xs)
    call.count += 1
    if call.count > 1:
        raise ValueError("adam_jax.backward: the loss scans the layers more than once.")
    return call.results


# --- The step -------------------------------------------------------------------------------------


class BackwardState(NamedTuple):
    """The state of `value_and_step`.

    Attributes:
      grad_norm: the norm of all gradients of the last step, a float32 scalar; 0 before the first.
      params: the state of the chain for `params`.
      layers: the state of the chain for `layers`. Each of its arrays has an axis of layers before
        the others, as in the state of `stacked`.
    """

    grad_norm: jax.Array
    params: Any
    layers: Any


def init(
    tx: optax.GradientTransformation,
    params: Any,
    layers: Any,
    layers_tx: optax.GradientTransformation | None = None,
) -> BackwardState:
    """The state before the first step of `value_and_step`, of the same chains.

    Args:
      tx: the chain for `params`.
      params: all that is trained besides the layers.
      layers: a tree of arrays with the layers along their first axis.
      layers_tx: the chain for a layer. None, the default: `tx`.

    Returns:
      A `BackwardState` that holds what the `init` of the chains make. A run that began with all
      gradients in memory at once goes on with `from_plain`.

    Raises:
      ValueError: if a leaf of `layers` has no axis, or the leaves differ in the number of layers.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> state = adam_jax.backward.init(adam_jax.adam(1e-3), jnp.ones(8), jnp.ones((4, 8, 8)))
      >>> state.layers[0].mu.shape, state.params[0].mu.shape
      ((4, 8, 8), (8,))

    Source: see `value_and_step`.
    """
    return BackwardState(
        grad_norm=jnp.zeros([], jnp.float32),
        params=tx.init(params),
        layers=stacked(layers_tx or tx).init(layers),
    )


def from_plain(
    tx: optax.GradientTransformation,
    layers: Any,
    state: Any,
    layers_tx: optax.GradientTransformation | None = None,
) -> Any:
    """Convert a state of `tx.init(layers)`, where a stack is one leaf, into that of the layers.

    So a run that kept all gradients at once goes on in the backward pass. Every layer gets the
    counts and the rates. Moments that are kept element by element stay bit for bit, and so do codes
    of 8 and 4 bits whose blocks lie within a layer. Where a block or a mean has elements of several
    layers (as of biases in 8 bits, from 12 layers on), and where a layer has fewer than the 4,096
    elements that a storage asks for, the moments are loaded, and those of each layer saved anew.

    The chain may be made of this package's stages, and of wrappers and stages that keep scalars and
    arrays shaped like the parameters. A state of `optax.adam` first goes through
    `adam_jax.from_optax`.

    Args:
      tx: the chain that made the state.
      layers: a tree of arrays with the layers along their first axis.
      state: the state. If it is for a tree with all parameters, take the part that belongs to
        `layers`, as the example does.
      layers_tx: the chain for a layer, which keeps the same moments, maybe in another storage.
        None, the default: `tx`. Where `tx` has a storage for stacks, such as
        ``block_mean(partial(transformer_blocks, stacked=1))``, give the chain for a layer the
        storage for a layer, ``block_mean()``.

    Returns:
      A state as `adam_jax.stacked(layers_tx).init(layers)` makes it: `layers` of a `BackwardState`.
      Arrays that do not change are not copied.

    Raises:
      ValueError: if the state is not one of `tx.init(layers)`, or keeps what cannot be taken apart
        by layers, naming it; or if `layers_tx` keeps other moments.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> from adam_jax import backward
      >>> params = {"head": jnp.ones(8), "layers": jnp.ones((4, 8, 8))}
      >>> tx = adam_jax.adam(1e-3)
      >>> state = tx.init(params)  # after some steps, or from a checkpoint
      >>> is_whole = lambda x: isinstance(x, dict) and x.keys() == params.keys()
      >>> def of(name):
      ...     return jax.tree.map(lambda x: x[name] if is_whole(x) else x, state, is_leaf=is_whole)
      >>> layers_state = backward.from_plain(tx, params["layers"], of("layers"))
      >>> state = backward.BackwardState(jnp.float32(0), of("head"), layers_state)
      >>> state.params[0].count.shape, state.layers[0].count.shape, state.layers[0].mu.shape
      ((), (4,), (4, 8, 8))

    Source: none.
    """
    number = _layers("adam_jax.backward", layers)
    like, slots = _kept(tx, layers)
    due, due_slots = _kept(layers_tx or tx, _row(layers))
    _check_is_of_stack(state, like)
    moments, due_moments = ([slot[:2] for slot, *_ in x] for x in (slots, due_slots))
    if moments != due_moments:
        raise ValueError(
            f"adam_jax.backward.from_plain needs chains with the same moments: tx keeps {moments}, "
            f"and layers_tx {due_moments}."
        )
    arrays, names = list(map(jnp.asarray, jax.tree.leaves(state))), _names(like)
    params = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(layers)}
    others, new = dict(zip(names, arrays, strict=True)), dict[int, Any]()
    for (slot, leaf, places), (due_slot, layer, due_places) in zip(slots, due_slots, strict=True):
        kept = [arrays[place] for place in places]
        of_layers = due_slot.of_layers(layer, params[leaf.path], slot, leaf, kept)
        new.update(zip(due_places, of_layers, strict=True))
        for place in places:
            del others[names[place]]
    for place, (name, of_layer) in enumerate(zip(_names(due), jax.tree.leaves(due), strict=True)):
        if place not in new:
            new[place] = _of_layers(name, others.get(name), of_layer, number)
    return jax.tree.unflatten(jax.tree.structure(due), [new[place] for place in range(len(new))])


def _kept(tx: optax.GradientTransformation, params: Any) -> tuple[Any, list[tuple]]:
    """A state in abstract, and which of its leaves each slot keeps of each parameter."""
    found: list[tuple] = []

    def looked_at(params):
        kept: list[tuple] = []
        token = KEPT.set(kept)
        try:
            with jax.disable_jit():  # what a compiled init returns are other objects
                state = tx.init(params)
        finally:
            KEPT.reset(token)
        places = {id(x): place for place, x in enumerate(jax.tree.leaves(state))}
        found.extend((slot, leaf, [places[id(x)] for x in parts]) for slot, leaf, parts in kept)
        return state

    return jax.eval_shape(looked_at, params), found


def _check_is_of_stack(state: Any, like: Any) -> None:
    shapes, due = (
        {jax.tree_util.keystr(path): jnp.shape(x) for path, x in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (state, like))
    )
    for name in (*due, *shapes):
        if shapes.get(name) != due.get(name):
            raise ValueError(
                f"adam_jax.backward.from_plain needs a state of tx.init(layers): at {name} it has "
                f"the shape {due.get(name)}, and the one given {shapes.get(name)}."
            )


def _of_layers(name: str, array: Any, of_layer: Any, number: int) -> Any:
    """What is no moment: of every element, or the same for all layers."""
    shape = number, *of_layer.shape
    if of_layer.dtype == bool:
        return jnp.zeros(shape, bool)  # a placeholder
    found = getattr(array, "shape", None)
    if found not in (shape, shape[1:]):
        raise ValueError(
            f"adam_jax.backward.from_plain cannot part by layers what the state keeps at {name}: "
            f"its shape is {found}, and that of a layer {of_layer.shape}. Start anew with "
            f"adam_jax.backward.init."
        )
    return jnp.broadcast_to(array, shape)


def value_and_step(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    layers_tx: optax.GradientTransformation | None = None,
    *,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any, Any, BackwardState]]:
    r"""Make a step of training that keeps no gradients: it steps each layer on the way back.

    The step is that of `jax.value_and_grad(loss, (0, 1))`, of `tx` on the gradients of `params` and
    of `adam_jax.stacked(layers_tx)` on those of `layers`. But the gradient of a layer lives only
    until the layer is stepped. So for the layers the step needs only the memory of weights and
    state, which it writes in place if they are donated, and of a layer or two.

    Compiled with jax 0.12 for 12 layers of two 1024 × 1024 matrices, the step needs in all, in
    bytes a parameter: with float32 and `adam` 13.2 on an H100 and 12.1 on a v5e, where all
    gradients at once need 16.5 and 18.1; with bfloat16, `compensate("int8")` and moments in 8 bits
    6.0 and 5.2, where all at once need 7.5 and 5.9 (`pytest tests/test_accelerators.py -k
    keeps_no_gradients`). XLA's CPU backend copies the weights and the state.

    With `storage.on_host` the state of a layer goes to the device and back while other layers are
    computed. Compiled, 48 such layers need, in bytes a parameter: in float32 with `adam` 8.0 of the
    host, and of the device 4.5 on an H100 and 5.0 on a v5e; with moments in 8 bits 2.1 of the host
    (4.1 with a v5e), and of the device 4.3 and 5.1 (`pytest tests/test_accelerators.py -k
    from_the_host`).

    Args:
      loss: `(params, layers, *args) -> value`, a real scalar. It calls `adam_jax.backward.scan`
        once, over all of `layers`, and outside of any `jax.jit`, `jax.vmap` or `jax.checkpoint` of
        its own. `params` is all else that is trained: embedding, head, norms.
      tx: the chain for `params`.
      layers_tx: the chain for a layer. None, the default: `tx`. With `adam_jax.fuse(tx)` each leaf
        of a layer is stepped in one kernel.
      has_aux: whether `loss` returns `(value, aux)`. Default False.

    Returns:
      A function `(params, layers, state, *args) -> (value, params, layers, state)`, with `value` as
      `loss` returns it, for ``jax.jit(step, donate_argnums=(0, 1, 2))``. `layers` is a tree of
      arrays with the layers along their first axis, and `state` a `BackwardState`, which `init`
      makes. To the chains it gives the loss as `value`, as optax does, and the norm of all
      gradients in the step before as `grad_norm`. So a step that is skipped for a loss that is not
      finite is ``optax.conditionally_mask(tx, lambda step, value, **_: jnp.isfinite(value),
      forward_extra_args=True)``.

    Raises:
      ValueError: when the step is traced, if the loss does not scan the layers, or not all of them,
        or twice; or if a chain needs the gradients of several leaves at once, naming the stage. In
        the place of `optax.clip_by_global_norm` take `adam_jax.backward.clip_by_previous_norm`.
      TypeError: if the loss reads the layers elsewhere, which are `LayerOutsideOfScan` there.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> from adam_jax import backward
      >>> def loss(params, layers, x, y):
      ...     x, _ = backward.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)
      ...     return jnp.mean((x @ params - y) ** 2)
      >>> params, layers = jnp.ones((8, 1)), jnp.stack([0.5 * jnp.eye(8)] * 4)
      >>> tx = adam_jax.adam(1e-2)
      >>> step = jax.jit(backward.value_and_step(loss, tx), donate_argnums=(0, 1, 2))
      >>> state = backward.init(tx, params, layers)
      >>> x, y = jnp.ones((2, 8)), jnp.ones((2, 1))
      >>> for _ in range(3):
      ...     value, params, layers, state = step(params, layers, state, x, y)
      ...     print(f"{value:.3f}")
      0.301
      0.044
      0.054

    Source: the idea is that of LOMO (Lv et al., arXiv 2306.09782), which has no state to keep.
    """
    params_tx: Any = optax.with_extra_args_support(tx)
    layer_tx: Any = optax.with_extra_args_support(layers_tx or tx)

    def step(params, layers, state, *args):
        number = _layers("adam_jax.backward", layers)
        weights, structure = jax.tree.flatten(layers)
        layers_state = _as_kept(layer_tx, layers, _for_all(state.layers, number))
        call = _Call()
        marks = jax.tree.unflatten(
            structure, [LayerOutsideOfScan(call, n) for n in range(len(weights))]
        )

        # The loss up to its scan, the scan, and the loss again with the results of the scan.
        def before(params):
            try:
                loss(params, marks, *args)
            except _Reached as reached:
                f, first, xs = reached.operands
                xs, with_weights = _without_layers(xs, layers)
                # What the layer closes over has a derivative too: it becomes an argument.
                layer, shared = jax.closure_convert(
                    lambda carry, w, x: f(carry, with_weights(x, w)),
                    first,
                    *map(_row, (weights, xs)),
                )
                floats, others, joined = _split((first, xs, shared))
                return floats, (others, layer, joined)
            raise ValueError("adam_jax.backward: the loss does not call scan(f, init, layers).")

        floats, pull_before, (others, f, joined) = _vjp(before, params)
        first, xs, shared = joined(floats, others)
        layer = _Layerwise(lambda carry, w, x, shared: f(carry, w, x, *shared))
        last, (ys, kept) = jax.lax.scan(
            lambda carry, x: layer.forward(carry, *x, shared), first, (weights, xs)
        )
        of_last, others, joined = _split((last, ys))

        def after(params, results):
            call.results = joined(results, others)
            out = loss(params, marks, *args)
            return out if has_aux else (out, None)

        value, pull_after, aux = jax.vjp(after, params, of_last, has_aux=True)
        if jnp.shape(value) or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"The loss must be a real scalar, got {jax.typeof(value)}.")
        grads, of_results = pull_after(jnp.ones_like(value))
        extra_args = {"value": value, "grad_norm": state.grad_norm}

        def back(carry, x):
            """One layer back: its cotangents, its gradient, its step."""
            of_carry, of_shared, weights, layers_state, squares = carry
            i, kept, xs, of_y = x
            at_i = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)  # noqa: E731
            old, old_state = jax.tree.map(at_i, (weights, layers_state))
            of_carry, of_weights, of_x, more = layer.backward(
                kept, (old, xs, shared), [*of_carry, *of_y]
            )
            grads, params = (jax.tree.unflatten(structure, x) for x in (of_weights, old))
            new, new_state = _stepped(layer_tx, grads, old_state, params, extra_args)

            def put(x, new):
                row = _beside(new[None], jax.typeof(x))  # whose axis jax 0.7 adds on the device
                return jax.lax.dynamic_update_index_in_dim(x, row, i, 0)

            weights, layers_state = jax.tree.map(
                put, (weights, layers_state), (jax.tree.leaves(new), new_state)
            )
            of_shared = [a + b for a, b in zip(of_shared, more, strict=True)]
            squares += _squares(of_weights)
            return (of_carry, of_shared, weights, layers_state, squares), of_x

        carries = len(_split(last)[0])
        none_yet = [jnp.zeros_like(x) for x in _split(shared)[0]]
        (of_first, of_shared, weights, layers_state, squares), of_xs = jax.lax.scan(
            back,
            (of_results[:carries], none_yet, weights, layers_state, jnp.zeros([], jnp.float32)),
            (jnp.arange(number), kept, xs, of_results[carries:]),
            reverse=True,
        )
        (more,) = pull_before([*of_first, *of_xs, *of_shared])
        grads = jax.tree.map(jnp.add, grads, more)
        params, params_state = _stepped(params_tx, grads, state.params, params, extra_args)
        grad_norm = jnp.sqrt(squares + _squares(grads))
        new_state = BackwardState(grad_norm, params_state, layers_state)
        value = (value, aux) if has_aux else value
        return value, params, jax.tree.unflatten(structure, weights), new_state

    return step


class _Layerwise:
    """A layer, and the way back from it, as the bodies of two scans.

    What the way back needs is kept, except for the weights and what is shared by all layers: those
    are there anyway.
    """

    def __init__(self, fn: Callable[..., tuple[Any, Any]]):
        self.fn = fn

    def forward(self, *operands: Any) -> tuple[Any, Any]:
        """The carry, weights, xs and what is shared, to the carry, and the y and what is kept."""
        floats, others, joined = _split(operands)
        self.counts = [len(_split(operand)[0]) for operand in operands]

        def run(floats):
            results, *rest = _split(self.fn(*joined(floats, others)))
            return results, tuple(rest)

        results, pull, (others_of_results, joined_results) = _vjp(run, floats)
        needed, self.structure = jax.tree.flatten(pull)
        known = {id(x): n for n, x in enumerate(jax.tree.leaves(operands[1:]))}
        self.sources = [known.get(id(x)) for x in needed]
        carry, y = joined_results(results, others_of_results)
        kept = [x for x, source in zip(needed, self.sources, strict=True) if source is None]
        return carry, (y, kept)

    def backward(self, kept: Any, known: Any, of_results: list[Any]) -> list[list[Any]]:
        """Cotangents of the floats of the results, to those of each of the operands."""
        remaining, known = iter(kept), jax.tree.leaves(known)
        needed = [next(remaining) if n is None else known[n] for n in self.sources]
        (cotangents,) = jax.tree.unflatten(self.structure, needed)(of_results)
        remaining = iter(cotangents)
        return [[next(remaining) for _ in range(count)] for count in self.counts]


def _vjp(fn: Callable[..., tuple[Any, tuple]], x: Any) -> tuple[Any, Any, tuple]:
    """`jax.vjp` of a function with a tuple of arrays and functions beside its result."""
    functions: list[Any] = []

    def on_arrays(x):
        result, (arrays, *others) = fn(x)
        functions[:] = others
        return result, arrays

    result, pull, arrays = jax.vjp(on_arrays, x, has_aux=True)
    return result, pull, (arrays, *functions)


def _split(tree: Any) -> tuple[Any, Any, Callable[..., Any]]:
    """The leaves that have derivatives, the others, and a function that makes the tree of both."""
    leaves, structure = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]

    def joined(floats, others):
        floats, others = iter(floats), iter(others)
        return jax.tree.unflatten(structure, [next(floats if f else others) for f in is_float])

    floats = [x for x, is_one in zip(leaves, is_float, strict=True) if is_one]
    others = [x for x, is_one in zip(leaves, is_float, strict=True) if not is_one]
    return floats, others, joined


def _without_layers(xs: Any, layers: Any) -> tuple[list[Any], Callable[..., Any]]:
    """The arrays among the leaves of `xs`, and a function that puts them and the weights back."""
    leaves, structure = jax.tree.flatten(xs)
    numbers = [x.number if isinstance(x, LayerOutsideOfScan) else None for x in leaves]
    for number, name in enumerate(_names(layers)):
        if numbers.count(number) != 1:
            how = "not scanned" if number not in numbers else "scanned more than once"
            raise ValueError(f"adam_jax.backward: the leaf {name} of the layers is {how}.")

    def with_weights(arrays, weights):
        arrays = iter(arrays)
        return jax.tree.unflatten(
            structure, [next(arrays) if n is None else weights[n] for n in numbers]
        )

    return [x for x in leaves if not isinstance(x, LayerOutsideOfScan)], with_weights


def _row(tree: Any) -> Any:
    """What one layer has of stacked arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), tree)


def _as_kept(layer_tx: Any, layers: Any, state: Any) -> Any:
    """A state whose arrays lie in the memory in which `storage.on_host` keeps them, or not."""
    kept = jax.make_jaxpr(layer_tx.init)(_row(layers)).out_avals

    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, map(_beside, leaves, kept))


def _beside(x: Any, type_: Any) -> Any:
    """An array in the memory that the type of another names."""
    there: Any = jax.typeof(x)
    space = type_.memory_space
    return x if there.memory_space == space else jax.device_put(x, space)


def _names(tree: Any) -> list[str]:
    """The paths of the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) or "the only leaf" for path, _ in leaves]


def _squares(grads: Any) -> jax.Array:
    """The squared norm of all gradients."""
    wide = [g.astype(accumulator(g.dtype)) for g in jax.tree.leaves(grads)]
    squares = [jnp.sum(jnp.abs(g) ** 2).astype(jnp.float32) for g in wide]
    return sum(squares, jnp.zeros([], jnp.float32))


def _stepped(tx: Any, grads: Any, state: Any, params: Any, extra_args: dict) -> tuple[Any, Any]:
    """New parameters and state of a chain that steps every leaf by itself."""
    update = lambda *args: tx.update(*args, **extra_args)  # noqa: E731
    closed = jax.make_jaxpr(update)(grads, state, params)
    names = _names(grads)
    others = len(closed.jaxpr.invars) - len(names)
    _check_local(closed.jaxpr, [{name} for name in names] + [set()] * others)
    with jax.numpy_dtype_promotion("standard"):  # optax adds float32 updates to bfloat16
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state


def _check_local(jaxpr: Any, sources: Sequence[set]) -> list[set]:
    """Of which gradients each result is made: of no more than one.

    Args:
      jaxpr: the equations of an update.
      sources: of which gradients each of its arguments is made.
    """
    known: dict[Any, set] = dict(zip((*jaxpr.invars, *jaxpr.constvars), sources, strict=False))
    read = lambda atom: set() if isinstance(atom, Literal) else known.get(atom, set())  # noqa: E731
    for eqn in jaxpr.eqns:
        inputs, together = [read(atom) for atom in eqn.invars], set()
        called = [eqn.params.get(name) for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "program")]
        called = [getattr(x, "jaxpr", x) for x in called if x is not None]
        called += [x.jaxpr for x in eqn.params.get("branches", ())]
        if eqn.primitive.name == "cond":
            together, *inputs = inputs
        if called:
            results = [_check_local(x, inputs) for x in called]
            outputs = [set().union(together, *found) for found in zip(*results, strict=True)]
        elif eqn.primitive.name == "optimization_barrier":
            outputs = inputs
        else:
            outputs = [set().union(*inputs)] * len(eqn.outvars)
        for output in outputs:
            if len(output) > 1:
                raise ValueError(
                    f"adam_jax.backward steps every leaf as soon as its gradient is known, and "
                    f"{_stage(eqn)} needs several at once: {', '.join(sorted(output))}. In the "
                    f"place of optax.clip_by_global_norm take adam_jax.backward."
                    f"clip_by_previous_norm, or clip every leaf by itself."
                )
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _stage(eqn: Any) -> str:
    """The name of the stage that an equation is part of, after the function that made it."""
    traceback = eqn.source_info.traceback
    names = [frame.function_name for frame in traceback.frames] if traceback else []
    matches = filter(None, (re.fullmatch(r"(\w+)\.<locals>\.update(_fn)?", n) for n in names))
    return next((match[1] for match in matches), "a stage")


# --- What goes with it ----------------------------------------------------------------------------


def clip_by_previous_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    r"""Scale the gradients down by the norm that all of them had together one step before.

    .. math:: g_t \mapsto g_t \min(1, c / \lVert g_{t-1} \rVert)

    In the backward pass the norm of all gradients is known only when all layers have been stepped,
    so `optax.clip_by_global_norm` cannot be used there. This stage lags by one step: the first step
    is not clipped, nor is a sudden spike; the step after a spike is made smaller than it need be.
    After a norm that is NaN nothing is clipped.

    Args:
      max_norm: the largest norm :math:`c`, finite and at least 0: a number or a 0-d array.

    Returns:
      A gradient transformation without state. Its `update` takes the norm as `grad_norm`, which
      `value_and_step` gives it.

    Raises:
      ValueError: if `max_norm` is negative, not finite or not a scalar.
      TypeError: if `max_norm` is not a number; in `update`, without `grad_norm`.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.backward.clip_by_previous_norm(1.0)
      >>> updates, _ = stage.update(jnp.array([3.0, -4.0]), stage.init(None), grad_norm=5.0)
      >>> print(updates)
      [ 0.6 -0.8]

    Source: none; `optax.clip_by_global_norm` with the norm of the step before.
    """
    max_norm = check_hyperparameter("max_norm", max_norm)

    def update_fn(updates, state, params=None, *, grad_norm=None, **extra_args):
        del params, extra_args
        if grad_norm is None:
            raise TypeError(
                "clip_by_previous_norm needs the norm of the last step's gradients as grad_norm, "
                "which adam_jax.backward.value_and_step gives. Elsewhere take "
                "optax.clip_by_global_norm."
            )
        norm = jnp.asarray(grad_norm, jnp.float32)
        scale = jnp.where(norm > max_norm, max_norm / jnp.maximum(norm, max_norm), 1)
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def micro_decay(decay: float, k: int) -> optax.Schedule:
    r"""The decay rates by which k small batches are one step of a moving average.

    .. math:: m_t = b\, m_{t-1} + \frac{1 - b}{k} \sum_{j=1}^k g_{t,j}
              \quad\text{with}\quad b_j = \frac{1 - (k - j + 1) \beta}{1 - (k - j) \beta},
              \quad \beta = \frac{1 - b}{k}

    So the gradients of several batches are accumulated in the moments, without a buffer. With
    `micro_rate` the parameters move at the last of the k batches only:

        scale_by_moments(micro_decay(0.9, k), micro_decay(0.999, k)) ▸ bias_correct() ▸
        scale_by_lr(micro_rate(1e-3, k))

    The first moment is exactly that of the mean gradient. The second averages the *squares* of the
    k gradients, not the square of their mean.

    Args:
      decay: the decay rate :math:`b` of a whole step, in [0, 1): a number or a 0-d array.
      k: the number of batches that make a step, a positive integer.

    Returns:
      A schedule from the number of batches so far to the decay rate, for `scale_by_moments`.

    Raises:
      ValueError: if `decay` is outside [0, 1), or `k` is not positive.
      TypeError: if `decay` is not a number, or `k` is not an integer.

    Example:
      >>> import adam_jax
      >>> rate = adam_jax.backward.micro_decay(0.9, 2)
      >>> print(f"{rate(0) * rate(1):.3f}")
      0.900

    Source: none. AdamAccumulation (Zhang et al., arXiv 2305.19982) accumulates both moments so.
    """
    b, k = check_hyperparameter("decay", decay, upper=1), check_count("k", k)

    def rate(count):
        left = jnp.asarray(k - count % k, float)  # batches to come of this step, with this one
        share = (1 - b) / k
        return (1 - left * share) / (1 - (left - 1) * share)

    return rate


def micro_rate(learning_rate: optax.ScalarOrSchedule, k: int) -> optax.Schedule:
    """The learning rate at the last of every k small batches, and 0 at the others.

    Args:
      learning_rate: a number, a 0-d array, or a schedule from the number of whole steps so far to
        the rate.
      k: the number of batches that make a step, a positive integer.

    Returns:
      A schedule from the number of batches so far to the learning rate, for `scale_by_lr`.

    Raises:
      ValueError: if `k` is not positive.
      TypeError: if `k` is not an integer.

    Example:
      >>> import adam_jax
      >>> rate = adam_jax.backward.micro_rate(1e-3, 2)
      >>> print(rate(0), rate(1))
      0.0 0.001

    Source: see `micro_decay`.
    """
    k = check_count("k", k)

    def rate(count):
        now = learning_rate(count // k) if callable(learning_rate) else learning_rate
        return jnp.where(count % k == k - 1, now, 0.0)

    return rate
