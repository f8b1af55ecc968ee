r"""Another basis: matrices are turned, any chain runs there, and its update is turned back.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax._checks import check_count, check_hyperparameter, check_params
from adam_jax._numerics import accumulator, as_count, increment, wider
from adam_jax._ownership import at, owner
from adam_jax.sharding import explicit, in_one_part
from adam_jax.signal import check_updates

Sides = tuple[jax.Array | None, jax.Array | None]


class Basis(NamedTuple):
    r"""How the basis of a matrix is found: two orthonormal sides U and W, and when they change.

    A gradient :math:`G` of shape m × n is :math:`U^H G W` there. Write your own as functions of one
    leaf; between the steps a leaf has `parts`, a named tuple of arrays or None.

    Attributes:
      parts: the named tuple's class.
      init: ``(shape, dtype) -> parts`` of a leaf, or None to leave the leaf as it is.
      sides: ``(parts) -> (U, W)``, of shapes (…, m, r) and (…, n, s); None is the identity.
      gather: ``(parts, grad) -> parts`` at every step.
      renew: ``(parts, grad, first) -> parts`` at every `every`-th step, from the first on, which
        the boolean scalar `first` tells.
      every: the number of steps between two renewals.
      follows: True if a step uses the basis that came of the steps before it. Then the first step
        only finds the basis: its update is 0 and the chain's state stays; and first moments, which
        are linear in the gradients, are turned with the basis. False if the step's own gradient
        makes the basis, and the moments stay the numbers that they are.
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
      basis: what the basis keeps, a named tuple of trees like the parameters, with None where a
        leaf is left as it is.
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

    With an orthogonal basis plain descent stays what it is; a chain that looks at elements becomes
    another one. Weight decay may be inside where the basis is whole, as `eigenvectors` is; beside
    `singular_vectors` it belongs outside, because inside it reaches the projection only. The
    matrices of sharded leaves are gathered, on a mesh with explicit axes at every step.

    Args:
      basis: `eigenvectors`, `singular_vectors`, or your own `Basis`.
      tx: a chain from gradients to updates.

    Returns:
      A gradient transformation from gradients to updates, with an `InBasisState`. The matrix
      products are computed in at least float32.

    Raises:
      TypeError: if `basis` is no `Basis`; in `update`, if `tx` ends in `Moments`, or gets them.
      ValueError: in `init`, if first moments are kept as codes (`storage.int8`, `int4`), which
        cannot be turned, and the basis follows the gradients.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> tx = adam_jax.in_basis(adam_jax.basis.eigenvectors(), adam_jax.adam(0.1, eps=0.0))
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
    nothing = basis.parts(*[None] * len(basis.parts._fields))

    def sides_of(parts):
        return None if _left_out(parts) else basis.sides(parts)

    def on_each(fn, parts, grads, *others):
        pairs = zip(parts, grads, strict=True)
        return [each if _left_out(each) else fn(each, grad, *others) for each, grad in pairs]

    def init_fn(params):
        check_params("in_basis", params)
        leaves: list
        structure: Any
        leaves, structure = jax.tree.flatten(params)
        made = [basis.init(jnp.shape(p), accumulator(jnp.result_type(p))) for p in leaves]
        parts = [nothing if each is None else each for each in made]
        state = inner.init(structure.unflatten(map(_into, leaves, map(sides_of, parts))))
        if basis.follows:
            _turned_along(state, structure, [(None, None)] * len(leaves))  # or it cannot be
        return InBasisState(
            jnp.zeros([], jnp.int32), _as_trees(basis.parts, parts, structure), state
        )

    def update_fn(updates, state, params=None, **extra_args):
        check_updates("in_basis", updates)
        grads: list
        structure: Any
        grads, structure = jax.tree.flatten(updates)
        count, parts = as_count(state.count), _as_leaves(state.basis, structure)

        def renewed(parts, inner_state):
            new = on_each(basis.renew, parts, grads, count == 0)
            if basis.follows:
                changes = zip(map(sides_of, parts), map(sides_of, new), strict=True)
                inner_state = _turned_along(inner_state, structure, list(changes))
            return new, inner_state

        def moved_on(parts, inner_state):
            parts = on_each(basis.gather, parts, grads)
            due, stays = count % basis.every == 0, lambda *both: both
            return jax.lax.cond(due, renewed, stays, parts, inner_state)

        inner_state = state.inner
        if not basis.follows:
            parts, inner_state = moved_on(parts, inner_state)
        sides = [sides_of(each) for each in parts]
        beside = [None] * len(grads) if params is None else structure.flatten_up_to(params)
        there = params if params is None else structure.unflatten(map(_into, beside, sides))
        new, new_state = inner.update(
            structure.unflatten(map(_into, grads, sides)), inner_state, there, **extra_args
        )
        check_updates("in_basis", new)
        new = list(map(_out_of, structure.flatten_up_to(new), sides, grads, beside))
        if basis.follows:
            keep = lambda old, new: jnp.where(count == 0, old, new)  # noqa: E731
            new = [keep(jnp.zeros_like(update), update) for update in new]
            new_state = jax.tree.map(keep, inner_state, new_state)
            parts, new_state = moved_on(parts, new_state)
        kept = InBasisState(increment(count), _as_trees(basis.parts, parts, structure), new_state)
        return structure.unflatten(new), kept

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _left_out(parts: Any) -> bool:
    """Whether a leaf has no other basis."""
    return all(part is None for part in parts)


def _into(leaf: Any, sides: Sides | None) -> Any:
    """U^H leaf W."""
    if sides is None:
        return leaf
    left, right = sides
    leaf = _wide(leaf)
    leaf = leaf if left is None else _product(_adjoint(left), leaf)
    return leaf if right is None else _product(leaf, right)


def _back(leaf: Any, sides: Sides | None) -> Any:
    """U leaf W^H."""
    if sides is None:
        return leaf
    left, right = (None if side is None else _adjoint(side) for side in sides)
    return _into(leaf, (left, right))


def _out_of(update: Any, sides: Sides | None, grad: Any, param: Any) -> Any:
    """The update in the leaf's own basis, as wide as the gradient and the parameter."""
    if sides is None:
        return update
    dtype = grad.dtype if param is None else wider(grad.dtype, jnp.result_type(param))
    return _beside(grad, _back(update, sides)).astype(dtype)


def _turned_along(state: Any, structure: Any, changes: list) -> Any:
    """The state with its first moments in the new basis: they are linear in the gradients.

    They are found by their names in the states of this package and of optax.
    """
    numbered = jax.tree_util.tree_leaves_with_path(structure.unflatten(range(len(changes))))
    number = dict(numbered)

    def turned(path, leaf):
        names = {getattr(key, "name", None) for key in path}
        place = owner(path, number)
        if place is None or not names & FIRST_MOMENTS:
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"in_basis turns first moments with a basis that follows the gradients, and the "
                f"codes{at(path)} cannot be turned: keep them as they are, or in a dtype, with "
                f"mu_storage=jnp.bfloat16."
            )
        old, new = changes[number[place]]
        if old is None:
            return leaf
        return _beside(leaf, _into(_back(leaf, old), new)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(turned, state)


FIRST_MOMENTS = {"mu", "mu_slow", "trace"}


def _as_trees(kind: Any, parts: list, structure: Any) -> Any:
    """For each part a tree like the parameters, which frameworks and checkpoints know."""
    return kind(*(structure.unflatten([p[i] for p in parts]) for i in range(len(kind._fields))))


def _as_leaves(trees: Any, structure: Any) -> list:
    return [type(trees)(*leaf) for leaf in zip(*map(structure.flatten_up_to, trees), strict=True)]


def _wide(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(accumulator(leaf.dtype))


def _adjoint(matrix: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(matrix, -1, -2))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """In full precision, also where a device would take fewer digits."""
    return jnp.matmul(_gathered(a), _gathered(b), precision=jax.lax.Precision.HIGHEST)


# On a mesh with explicit axes JAX neither multiplies nor decomposes matrices that are split.


def _gathered(x: jax.Array) -> jax.Array:
    """With the last two axes whole on every device."""
    return in_one_part(in_one_part(x, x.ndim - 1), x.ndim - 2)


def _beside(leaf: jax.Array, x: jax.Array) -> jax.Array:
    """An array laid out as another one is."""
    sharding = explicit(leaf)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


# --- The bases ------------------------------------------------------------------------------------


class Eigenvectors(NamedTuple):
    """What `eigenvectors` keeps of a matrix of shape m × n, or of a batch of them.

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
    r"""The eigenvectors of the gradient's second moments, for rows and for columns: SOAP's basis.

    .. math:: L_t = \beta L_{t-1} + (1 - \beta)\, G_t G_t^H, \qquad
              R_t = \beta R_{t-1} + (1 - \beta)\, G_t^H G_t

    The first step takes their eigenvectors, and later renewals one step of power iteration,
    :math:`U \leftarrow QR(L\,U)`. A step uses the vectors that came of the steps before it, so the
    first one changes no weight. The state has 2 m² + 2 n² numbers more for a matrix of m × n.

    Second moments do not turn with the basis. After a renewal an element may have those of another
    direction, and where these are small, as in a direction that had no gradient, the step is long.
    They must be forgotten soon: take b1 = b2 = 0.95, as the authors do. With b2 = 0.98 and more the
    loss of a small network, whose gradients have fewer directions than axes, rose before it fell,
    once a hundredfold.

    Args:
      decay: the rate :math:`\beta` of both averages, in [0, 1). Default 0.95.
      every: the number of steps between two renewals, positive. Default 10.
      largest: a longer side keeps its own basis, as an embedding's long one does. Default 8192.

    Returns:
      A `Basis` for `in_basis`. Leaves of fewer than two axes, or whose sides are all 1 or too long,
      are left as they are.

    Raises:
      ValueError: if `decay` is outside [0, 1), `every` or `largest` not positive.
      TypeError: if one of them is of another kind.

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

        def mixed(kept, new):
            return _beside(kept, kept * decay + (1 - decay) * new)

        left, right = parts.left, parts.right
        return parts._replace(
            left=None if left is None else mixed(left, _product(grad, adjoint)),
            right=None if right is None else mixed(right, _product(adjoint, grad)),
        )

    def renew(parts, grad, first):
        del grad

        def vectors(average, kept):
            if average is None:
                return None
            new = jax.lax.cond(
                first,
                lambda: jnp.linalg.eigh(_gathered(average))[1],
                lambda: jnp.linalg.qr(_product(average, kept))[0],
            )
            return _beside(kept, new)

        return parts._replace(
            left_vectors=vectors(parts.left, parts.left_vectors),
            right_vectors=vectors(parts.right, parts.right_vectors),
        )

    def sides(parts):
        return parts.left_vectors, parts.right_vectors

    return Basis(Eigenvectors, init, sides, gather, renew, every, follows=True)


class SingularVectors(NamedTuple):
    """What `singular_vectors` keeps of a matrix of shape m × n, or of a batch of them.

    Attributes:
      left: the leading left singular vectors as columns, m × r, if m ≤ n; else None.
      right: the leading right singular vectors as columns, n × r, if n < m; else None.
    """

    left: jax.Array | None
    right: jax.Array | None


def singular_vectors(rank: int, *, every: int = 200) -> Basis:
    r"""The leading singular vectors of the gradient on the shorter side: GaLore's projection.

    .. math:: G = U \Sigma W^H, \qquad U_r^H G \text{ if } m \le n, \text{ else } G\, W_r

    The moments have r rows (or columns) instead of all; what of a gradient lies outside is lost
    until the next renewal. When the vectors change, the moments stay the numbers that they are, as
    published. (The paper scales its update by 1/4: `optax.scale` after `in_basis`.)

    Args:
      rank: the number r of vectors, positive.
      every: the number of steps between two renewals, positive. Default 200.

    Returns:
      A `Basis` for `in_basis`. Leaves of fewer than two axes, or of a side of at most r, are left
      as they are.

    Raises:
      ValueError: if `rank` or `every` is not positive.
      TypeError: if one of them is not an integer.

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
        left, _, right = jnp.linalg.svd(_gathered(_wide(grad)), full_matrices=False)
        if parts.right is None:
            return SingularVectors(_beside(parts.left, left[..., :rank]), None)
        return SingularVectors(None, _beside(parts.right, _adjoint(right)[..., :rank]))

    def sides(parts):
        return parts.left, parts.right

    return Basis(SingularVectors, init, sides, lambda parts, grad: parts, renew, every, False)
