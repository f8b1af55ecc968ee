r"""A chain runs on matrices in another basis, and its update is changed back: SOAP, GaLore.

Adam divides element by element, so what it does depends on the basis that a matrix is written in.
`in_basis(basis, tx)` is the chain :math:`B^{-1} \circ tx \circ B`; with the basis

- `eigenvectors`, of the gradient's second moments, ``in_basis(eigenvectors(), adamw(3e-3, 0.95,
  0.95))`` is SOAP: the axes are those along which the gradients of rows and columns are
  uncorrelated;
- `singular_vectors`, the leading ones of the gradient, ``in_basis(singular_vectors(128),
  adamw(1e-2))`` is GaLore: the moments have 128 rows (or columns) instead of all.

The last two axes of a leaf are a matrix, those in front a batch. Leaves of fewer axes, and those
that a basis leaves out, take the chain as it is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax._checks import check_count, check_hyperparameter, check_params
from adam_jax._numerics import accumulator, as_count, increment, wider
from adam_jax._ownership import NONE, at, is_placeholder, leaves_by_path, owners, placeholder
from adam_jax.sharding import as_sharded, in_one_part
from adam_jax.signal import check_updates, params_of

Sides = tuple[jax.Array | None, jax.Array | None]


class Basis(NamedTuple):
    r"""A rule for the basis of a matrix: how its two sides U and W are found, and how often.

    In the basis a gradient :math:`G` of shape m × n is :math:`U^H G W`. Write a basis of your own
    as functions of one leaf, for which the state keeps `parts`, a named tuple of arrays or None. On
    a mesh with explicit axes the functions get arrays whose last two axes are replicated. No
    derivative is taken of the functions.

    Attributes:
      parts: the class of the named tuple.
      init: ``(shape, dtype) -> parts`` of a leaf before the first step, or None to leave the leaf
        as it is.
      sides: ``(parts) -> (U, W)``, of shapes (…, m, r) and (…, n, s); None is the identity.
      gather: ``(parts, grad) -> parts``, called at every step, such as for a moving average.
      renew: ``(parts, grad, first) -> parts``, called at step 1 and at every `every`-th step after
        it; `first` is a boolean scalar, True at step 1.
      every: the number of steps between two renewals.
      follows: True if a step uses the basis of the previous step. Then step 1 only initialises the
        basis: its update is 0, and the chain's state does not change. First moments, which are
        linear in the gradients, change basis at a renewal. False if the step's own gradient makes
        the basis; then moments are not changed at a renewal.
    """

    parts: Any
    init: Callable[[tuple[int, ...], Any], Any]
    sides: Callable[[Any], Sides]
    gather: Callable[[Any, jax.Array], Any]
    renew: Callable[[Any, jax.Array, jax.Array], Any]
    every: int
    follows: bool


class InBasisState(NamedTuple):
    """The state of `in_basis`.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates.
      basis: what the basis keeps, a named tuple of trees like the parameters. Where a leaf has no
        such part there is a placeholder: False, with as many axes as the leaf.
      inner: the state of the chain, of parameters in that basis.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    basis: Any
    inner: optax.OptState


def in_basis(
    basis: Basis, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Run a chain in another basis of every matrix.

    .. math:: U\, tx(U^H G\, W)\, W^H

    The last two axes of a leaf are a matrix G of m × n, the axes before them a batch; to leaves of
    fewer axes the chain is applied as it is. The columns of U, of length m, and of W, of length n,
    are the new axes of the rows and columns. `eigenvectors` has seen no gradient before the first
    step, so this step only initialises the basis: its update is 0.

    An orthogonal basis does not change plain gradient descent; it changes a chain that treats
    elements by themselves, as Adam does. Weight decay may be inside `tx` if the basis is complete,
    as `eigenvectors` is; with `singular_vectors` it belongs outside, because inside it reaches the
    projection only. The matrices of sharded leaves are gathered, on a mesh with explicit axes at
    every step.

    Derivatives through a step take the basis for a constant, because a basis has no derivative
    where two eigenvalues are equal, as those of a gradient of 0.

    Args:
      basis: `eigenvectors`, `singular_vectors`, or your own `Basis`.
      tx: a chain from gradients to updates, of adam_jax, optax or your own.

    Returns:
      A gradient transformation from gradients to updates, with an `InBasisState`. The matrix
      products are computed in at least float32.

    Raises:
      TypeError: if `basis` is no `Basis`; in `update`, if `tx` ends in `Moments`, or gets them.
      ValueError: in `init`, if the basis follows the gradients and first moments are kept as codes
        (`storage.int8`, `int4`), which cannot change basis; in `update`, if the gradients do not
        match the parameters of `init`, naming the leaf.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> tx = adam_jax.in_basis(adam_jax.basis.eigenvectors(), adam_jax.adam(0.1, eps=1e-3))
      >>> params = jnp.zeros((2, 2))
      >>> grads = jnp.array([[3.0, 3.0], [1.0, -1.0]])
      >>> state = tx.init(params)
      >>> first, state = tx.update(grads, state, params)
      >>> second, state = tx.update(grads, state, params)
      >>> print(jnp.abs(first).max(), jnp.linalg.svd(second)[1].round(3))  # like Muon's step
      0.0 [0.1 0.1]

    Source: Vyas et al., "SOAP" (arXiv 2409.11321); Zhao et al., "GaLore" (arXiv 2403.03507).
    """
    if not isinstance(basis, Basis):
        raise TypeError(
            f"basis must be one of adam_jax.basis, such as eigenvectors(), got {basis!r}."
        )
    inner: Any = optax.with_extra_args_support(tx)

    def sides_of(parts):
        return [None if each is None else basis.sides(each) for each in parts]

    def init_fn(params):
        check_params("in_basis", params)
        leaves, structure = _flatten(params)
        parts = [
            None if p is None else basis.init(jnp.shape(p), accumulator(jnp.result_type(p)))
            for p in leaves
        ]
        sides = sides_of(parts)
        state = inner.init(structure.unflatten(map(_into, leaves, sides)))
        if basis.follows:  # the first moments must be able to change basis
            jax.eval_shape(lambda state: _rotated(state, params, sides, sides), state)
        kept = _as_trees(basis.parts, parts, leaves, structure)
        return InBasisState(jnp.zeros([], jnp.int32), kept, state)

    def update_fn(updates, state, params=None, **extra_args):
        check_updates("in_basis", updates)
        grads, structure = _flatten(updates)
        count = as_count(state.count)
        due = count % basis.every == 0
        kept = _as_leaves(state.basis, updates)
        parts, constants = jax.lax.stop_gradient((list(map(_gathered, kept)), grads))
        constants = list(map(_gathered, constants))
        _check_shapes(updates, sides_of(parts))

        def on_each(fn, parts, *others):
            pairs = zip(parts, constants, strict=True)
            return [None if p is None else fn(p, grad, *others) for p, grad in pairs]

        def moved_on(parts):
            parts = on_each(basis.gather, parts)
            renewed = lambda parts: on_each(basis.renew, parts, count == 0)  # noqa: E731
            return jax.lax.cond(due, renewed, lambda parts: parts, parts)

        def step(parts):
            sides, beside = sides_of(parts), [None] * len(grads)
            there = params
            if params is not None:
                beside = structure.flatten_up_to(params_of(updates, params))
                there = structure.unflatten(map(_into, beside, sides))
            grads_there = structure.unflatten(map(_into, grads, sides))
            new, new_state = inner.update(grads_there, state.inner, there, **extra_args)
            check_updates("in_basis", new)
            return list(map(_out_of, structure.flatten_up_to(new), sides, grads, beside)), new_state

        if basis.follows:
            first = jax.tree.map(jnp.zeros_like, grads), state.inner
            unless_first = lambda new, old: jnp.where(count == 0, old, new)  # noqa: E731
            new, new_state = jax.tree.map(unless_first, step(parts), first)
            renewed = moved_on(parts)
            changes = sides_of(parts), sides_of(renewed)
            rotated = lambda state, changes: _rotated(state, updates, *changes)  # noqa: E731
            new_state = jax.lax.cond(due, rotated, lambda state, _: state, new_state, changes)
        else:
            renewed = moved_on(parts)
            new, new_state = step(renewed)
        renewed = jax.tree.map(as_sharded, renewed, kept)
        trees = _as_trees(basis.parts, renewed, grads, structure)
        return structure.unflatten(new), InBasisState(increment(count), trees, new_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- In the basis, and back -----------------------------------------------------------------------

_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _into(leaf: Any, sides: Sides | None) -> Any:
    """U^H leaf W."""
    if sides is None or leaf is None:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):  # in init
        return jax.eval_shape(_into, leaf, sides)
    left, right = sides
    leaf = _gathered(_wide(leaf))
    leaf = leaf if left is None else _product(_adjoint(left), leaf)
    return leaf if right is None else _product(leaf, right)


def _back(leaf: Any, sides: Sides) -> Any:
    """U leaf W^H."""
    left, right = (None if side is None else _adjoint(side) for side in sides)
    return _into(leaf, (left, right))


def _out_of(update: Any, sides: Sides | None, grad: Any, param: Any) -> Any:
    """The update in the leaf's own basis, as wide as the gradient and the parameter."""
    if sides is None or update is None:
        return update
    dtype = grad.dtype if param is None else wider(grad.dtype, jnp.result_type(param))
    return as_sharded(_back(update, sides), grad).astype(dtype)


def _rotated(state: Any, params: Any, old: list[Sides | None], new: list[Sides | None]) -> Any:
    """The state with its first moments in the new basis: they are linear in the gradients.

    They are found by their names in the states of this package and of optax.
    """

    def rotated(path, part, owner):
        names = {getattr(key, "name", None) for key in path}
        if owner == NONE or old[owner] is None or not names & FIRST_MOMENTS:
            return part
        if not jnp.issubdtype(part.dtype, jnp.inexact):
            raise ValueError(
                f"in_basis changes the basis of first moments with a basis that follows the "
                f"gradients, and that of the codes{at(path)} cannot be changed: keep them as they "
                f"are, or in a dtype, with mu_storage=jnp.bfloat16."
            )
        return as_sharded(_into(_back(part, old[owner]), new[owner]), part).astype(part.dtype)

    return jax.tree_util.tree_map_with_path(rotated, state, owners(state, params))


FIRST_MOMENTS = {"mu", "mu_slow", "trace"}


def _wide(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(accumulator(leaf.dtype))


def _adjoint(matrix: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(matrix, -1, -2))


def _gathered(tree: Any) -> Any:
    """With the last two axes replicated: on a mesh with explicit axes JAX neither multiplies nor
    decomposes matrices that are sharded."""
    return jax.tree.map(lambda x: in_one_part(x, -1, -2) if jnp.ndim(x) > 1 else x, tree)


# --- What the basis keeps of each leaf ------------------------------------------------------------


def _flatten(tree: Any) -> tuple[list, Any]:
    """A None is a leaf: frameworks leave parameters out of the gradients, but not of the model."""
    return jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)


def _as_trees(kind: Any, parts: list, leaves: list, structure: Any) -> Any:
    """For each part a tree like the parameters, which frameworks and checkpoints know."""

    def column(i):
        for each, leaf in zip(parts, leaves, strict=True):
            part = None if each is None else each[i]
            if part is None and leaf is not None:
                part = placeholder(jnp.shape(leaf))
            yield part

    return kind(*(structure.unflatten(column(i)) for i in range(len(kind._fields))))


def _as_leaves(trees: Any, updates: Any) -> list:
    """The parts of each leaf, or None if it has no other basis."""
    grads, structure = _flatten(updates)
    try:
        columns = [structure.flatten_up_to(tree) for tree in trees]
    except ValueError as error:
        raise ValueError(
            f"in_basis got gradients in another tree than the parameters of init() ({error}). "
            f"{_REMEDY}"
        ) from None
    leaves = []
    for path, grad, *parts in zip(leaves_by_path(updates), grads, *columns, strict=True):
        if (grad is None) != all(part is None for part in parts):
            missing = "no gradient for" if grad is None else "a gradient for what was None in init:"
            raise ValueError(f"in_basis got {missing} the leaf{at(path)}. {_REMEDY}")
        parts = [None if is_placeholder(part) else part for part in parts]
        leaves.append(None if all(part is None for part in parts) else type(trees)(*parts))
    return leaves


def _check_shapes(updates: Any, sides: list[Sides | None]) -> None:
    """A matrix must be as large as its basis."""
    for (path, grad), both in zip(leaves_by_path(updates).items(), sides, strict=True):
        for axis, side in zip((-2, -1), both or (), strict=False):
            if side is None:
                continue
            shape, (*batch, length, _) = jnp.shape(grad), jnp.shape(side)
            if len(shape) < 2 or shape[axis] != length or list(shape[:-2]) != batch:
                raise ValueError(
                    f"in_basis got a gradient of shape {shape} for the leaf{at(path)}, whose axis "
                    f"{axis} had length {length} in init(). {_REMEDY}"
                )


_REMEDY = "Give gradients shaped like the parameters of init(), or make the state anew with init()."


# --- The bases ------------------------------------------------------------------------------------


class Eigenvectors(NamedTuple):
    """The parts that `eigenvectors` keeps of an m × n matrix, or of a batch of them.

    Attributes:
      left: the moving average of G G^H, m × m, or None where m is too large.
      right: the moving average of G^H G, n × n, or None.
      left_vectors: the eigenvectors of `left`, as columns.
      right_vectors: the eigenvectors of `right`, as columns.
    """

    left: jax.Array | None
    right: jax.Array | None
    left_vectors: jax.Array | None
    right_vectors: jax.Array | None


def eigenvectors(decay: float = 0.95, *, every: int = 10, largest: int = 8192) -> Basis:
    r"""SOAP's basis: the eigenvectors of the averages of G Gᴴ and Gᴴ G, for gradients G.

    .. math:: L_t = \beta L_{t-1} + (1 - \beta)\, G_t G_t^H, \qquad
              R_t = \beta R_{t-1} + (1 - \beta)\, G_t^H G_t

    The first step takes their eigenvectors, and later renewals one step of power iteration,
    :math:`U \leftarrow QR(L\,U)` (and of R likewise). A step uses the basis of the previous step,
    so the first step changes no weight. For a matrix of m × n the state has 2 m² + 2 n² numbers
    more.

    The second moment v is not rotated: after a renewal a small v, as of a direction that had no
    gradient, can give large steps. The old v must be forgotten soon: take b1 = b2 = 0.95, as the
    authors do. With b2 = 0.98 and more the loss of a small network, whose gradients have fewer
    directions than axes, rose before it fell, once a hundredfold.

    Args:
      decay: the rate :math:`\beta` of both averages, in [0, 1): a number or a 0-d array. Default
        0.95.
      every: the number of steps between two renewals, a positive integer. Default 10.
      largest: the longest side that gets a new basis, a positive integer. A longer one, such as the
        vocabulary of an embedding, keeps its own. Default 8192.

    Returns:
      A `Basis` for `in_basis`. Leaves of fewer than two axes, or whose sides are all 1 or too long,
      are left as they are.

    Raises:
      ValueError: if `decay` is outside [0, 1), `every` or `largest` not positive.
      TypeError: if `decay` is not a number, or `every` or `largest` not an integer.

    Example:
      >>> import adam_jax
      >>> adamw = adam_jax.adamw(3e-3, b1=0.95, b2=0.95)
      >>> soap = adam_jax.in_basis(adam_jax.basis.eigenvectors(), adamw)

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv 2409.11321),
    algorithms 3 and 4.
    """
    decay = check_hyperparameter("decay", decay, upper=1.0)
    every, largest = check_count("every", every), check_count("largest", largest)

    def init(shape, dtype):
        sides = [n if 1 < n <= largest else None for n in shape[-2:]]
        if len(shape) < 2 or sides == [None, None]:
            return None
        batch = shape[:-2]
        zeros = [n and jnp.zeros((*batch, n, n), dtype) for n in sides]
        start = [n and jnp.broadcast_to(jnp.eye(n, dtype=dtype), (*batch, n, n)) for n in sides]
        return Eigenvectors(*zeros, *start)

    def gather(parts, grad):
        grad = _wide(grad)
        adjoint = _adjoint(grad)

        def mixed(average, new):
            return None if average is None else average * decay + (1 - decay) * new()

        return parts._replace(
            left=mixed(parts.left, lambda: _product(grad, adjoint)),
            right=mixed(parts.right, lambda: _product(adjoint, grad)),
        )

    def renew(parts, grad, first):
        del grad

        def vectors(average, old):
            if average is None:
                return None
            return jax.lax.cond(
                first,
                lambda: jnp.linalg.eigh(average)[1],
                lambda: jnp.linalg.qr(_product(average, old))[0],
            )

        return parts._replace(
            left_vectors=vectors(parts.left, parts.left_vectors),
            right_vectors=vectors(parts.right, parts.right_vectors),
        )

    def sides(parts):
        return parts.left_vectors, parts.right_vectors

    return Basis(Eigenvectors, init, sides, gather, renew, every, follows=True)


class SingularVectors(NamedTuple):
    """The part that `singular_vectors` keeps of an m × n matrix, or of a batch of them.

    Attributes:
      left: the leading left singular vectors as columns, m × r, if m ≤ n; else None.
      right: the leading right singular vectors as columns, n × r, if n < m; else None.
    """

    left: jax.Array | None
    right: jax.Array | None


def singular_vectors(rank: int, *, every: int = 200) -> Basis:
    r"""GaLore's basis: the leading singular vectors of the gradient, on its shorter side.

    .. math:: G = U \Sigma W^H, \qquad U_r^H G \text{ if } m \le n, \text{ else } G\, W_r

    The moments have r rows (or columns) instead of all. The part of a gradient outside of the span
    of the vectors is lost until the next renewal. When the vectors change, the moments are not
    rotated, as published. (The paper scales its update by 1/4: put ``optax.scale(0.25)`` after
    `in_basis`.)

    Args:
      rank: the number r of vectors, a positive integer.
      every: the number of steps between two renewals, a positive integer. Default 200.

    Returns:
      A `Basis` for `in_basis`. Leaves of fewer than two axes, or with a side of at most r, are left
      as they are.

    Raises:
      ValueError: if `rank` or `every` is not positive.
      TypeError: if `rank` or `every` is not an integer.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> tx = adam_jax.in_basis(adam_jax.basis.singular_vectors(128), adam_jax.adam(1e-2))
      >>> state = jax.eval_shape(tx.init, jnp.zeros((1024, 4096)))
      >>> print(state.basis.left.shape, state.inner[0].mu.shape)
      (1024, 128) (128, 4096)

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection"
    (arXiv 2403.03507), algorithm 2.
    """
    rank, every = check_count("rank", rank), check_count("every", every)

    def init(shape, dtype):
        if len(shape) < 2 or min(shape[-2:]) <= rank:
            return None
        *batch, m, n = shape
        vectors = jnp.broadcast_to(jnp.eye(min(m, n), rank, dtype=dtype), (*batch, min(m, n), rank))
        return SingularVectors(vectors, None) if m <= n else SingularVectors(None, vectors)

    def renew(parts, grad, first):
        del first
        left, _, right = jnp.linalg.svd(_wide(grad), full_matrices=False)
        if parts.right is None:
            return SingularVectors(left[..., :rank], None)
        return SingularVectors(None, _adjoint(right)[..., :rank])

    def sides(parts):
        return parts.left, parts.right

    return Basis(SingularVectors, init, sides, lambda parts, grad: parts, renew, every, False)
