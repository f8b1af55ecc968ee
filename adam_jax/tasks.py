r"""Stages for several losses: from a gradient for each task to one gradient.

The gradients :math:`g_1, \dots, g_k` of k losses are a tree like the parameters, whose leaves have
one more axis in front, the axis of tasks: what `jax.jacrev` of the vector of losses gives. A stage
of this module makes one gradient of them,

.. math:: d = \sum_i w_i g_i

and any chain follows::

    losses = lambda params: jnp.stack([loss_a(params), loss_b(params)])
    tx = optax.chain(adam_jax.tasks.mgda(), adam_jax.adam(1e-3))
    state = tx.init(params)
    updates, state = tx.update(jax.jacrev(losses)(params), state, params)

A method is a function from the inner products :math:`\langle g_i, g_j \rangle`, the k × k matrix
that `gram` computes, to the k weights that `combine` takes. So one of your own needs only these
two. All methods keep the size of a gradient: k equal tasks give the gradient of one.

- With a head for each task, the parameters that the tasks share get the combined gradient, and each
  head gets that of its own task, by ``optax.partition({"shared": mgda(), "heads": weighted([1,
  1])}, …)`` as the first stage.
- `per_task` takes the moments of each task before the combination.
- `optax.apply_if_finite`, `optax.MultiSteps` and other wrappers whose own state has the shape of
  the parameters go around the stages that follow: ``optax.chain(mgda(),
  optax.apply_if_finite(adam(1e-3), 3))``.
- Sharded leaves: the inner products are those of whole leaves, under `jax.jit` and inside
  `jax.shard_map`, where the type of a leaf tells over which axes of the mesh it is sharded. (With
  ``check_vma=False``, and so in `jax.pmap`, the type does not tell, which is an error.)
- Arithmetic is in at least float32. The inner product of complex gradients is its real part.

Every stage raises, in `update`, a ValueError that names the leaf if a gradient has no axis of
tasks, and a TypeError if it gets `Moments`.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adam_jax._checks import check_count, check_hyperparameter, check_integer
from adam_jax._jit import once
from adam_jax._numerics import accumulator, as_count, increment, real, safe_divide, scalar, wider
from adam_jax._ownership import at, leaves_by_path
from adam_jax._random import random_bits
from adam_jax.optimizers import adam
from adam_jax.sharding import over_shards
from adam_jax.signal import check_updates, params_of
from adam_jax.updates import CountState

# --- From gradients to their inner products, and from weights to one gradient ---------------------


def gram(grads: optax.Updates) -> jax.Array:
    r"""Compute the inner products of the tasks' gradients, over all leaves.

    .. math:: M_{ij} = \langle g_i, g_j \rangle = \operatorname{Re} \sum \bar g_i \, g_j

    Args:
      grads: a tree whose leaves have one leading axis of k tasks.

    Returns:
      A symmetric k × k matrix, float32, or float64 if a leaf is float64 or complex128.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> grads = {"w": jnp.array([[3.0, 0.0], [1.0, 1.0]]), "b": jnp.array([0.0, 2.0])}
      >>> print(adam_jax.tasks.gram(grads))
      [[9. 3.]
       [3. 6.]]

    Source: Désidéri, "Multiple-gradient descent algorithm" (Comptes Rendus Mathématique 350, 2012).
    """
    leaves = jax.tree.leaves(grads)
    dtype = functools.reduce(wider, [real(accumulator(leaf.dtype)) for leaf in leaves])
    products = [over_shards(jax.lax.psum, once(_products, leaf), leaf) for leaf in leaves]
    return functools.reduce(operator.add, [each.astype(dtype) for each in products])


def _products(leaf: jax.Array) -> jax.Array:
    """A sum, not a matrix product: in full precision on all devices, and for all shardings."""
    leaf = leaf.astype(accumulator(leaf.dtype))
    products = jnp.real(jnp.conj(leaf[:, None]) * leaf[None])
    return jnp.sum(products, axis=tuple(range(2, products.ndim)))


def combine(grads: optax.Updates, weights: jax.Array, params: Any = None) -> optax.Updates:
    r"""Sum up the tasks' gradients, each times its weight.

    .. math:: d = \sum_i w_i g_i

    Args:
      grads: a tree whose leaves have one leading axis of k tasks.
      weights: an array of k real numbers.
      params: the parameters, a tree like `grads` without the leading axis. Where a parameter has a
        wider dtype than its gradient, the result has that dtype. None, the default: the dtypes of
        `grads`.

    Returns:
      A tree like `grads` without the leading axis. The sum is computed in at least float32.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> grads = {"w": jnp.array([[3.0, 0.0], [1.0, 1.0]])}
      >>> print(adam_jax.tasks.combine(grads, jnp.array([1.0, -2.0])))
      {'w': Array([ 1., -2.], dtype=float32)}

    Source: Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (arXiv
    1810.04650), equation 1.
    """

    def combined(grad, param):
        dtype = grad.dtype if param is None else wider(grad.dtype, jnp.result_type(param))
        return once(_weighted_sum, grad, weights).astype(dtype)

    return jax.tree.map(combined, grads, params_of(grads, params))


def _weighted_sum(leaf: jax.Array, weights: jax.Array) -> jax.Array:
    """Added task by task: XLA's CPU backend takes hundreds of times as long for one reduction."""
    leaf = leaf.astype(accumulator(leaf.dtype))
    weights = weights.astype(leaf.dtype)
    return functools.reduce(operator.add, [weights[i] * leaf[i] for i in range(len(leaf))])


# --- Weights that do not look at the gradients ----------------------------------------------------


def weighted(
    weights: Sequence[float] | jax.Array | np.ndarray | Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    r"""Take the gradient of a weighted sum of the losses.

    .. math:: d = \sum_i w_i g_i

    Args:
      weights: k finite numbers, which may be negative, or a schedule from the number of steps taken
        so far to k numbers. Weights of 1/k give the mean.

    Returns:
      A gradient transformation from gradients with a leading axis of k tasks to one gradient, with
      a `CountState`.

    Raises:
      ValueError: if the weights are not a vector of finite numbers; in `update`, if there are more
        or fewer weights than tasks, or a gradient has no axis of tasks, naming the leaf.
      TypeError: if the weights are not real numbers; in `update`, if it gets `Moments`.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.tasks.weighted([0.5, 0.5])
      >>> update, _ = stage.update(jnp.array([[3.0, 0.0], [1.0, 1.0]]), stage.init(jnp.zeros(2)))
      >>> print(update)
      [2.  0.5]

    Source: Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (arXiv
    1810.04650), equation 1.
    """
    if not callable(weights):
        weights = _check_weights(weights)

    def weigh(grads, state, tasks, losses):
        del grads, losses
        count = as_count(state.count)
        current = _check_weights(weights(count)) if callable(weights) else weights
        if len(current) != tasks:
            raise ValueError(
                f"weighted got {len(current)} weights for gradients of {tasks} tasks: give one for "
                f"each."
            )
        return current, CountState(increment(count))

    return _stage("weighted", weigh, CountState.zero)


def _check_weights(weights: Any) -> jax.Array:
    try:
        array = jnp.asarray(weights)
    except (TypeError, ValueError):  # no array at all
        array = jnp.zeros(1, bool)
    if jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(float)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"weights must be real numbers or a schedule, got {weights!r}.")
    if array.ndim != 1 or not len(array):
        raise ValueError(f"weights must be a vector, one for each task, got {weights!r}.")
    if not isinstance(array, Tracer) and not bool(jnp.all(jnp.isfinite(array))):
        raise ValueError(f"weights must be finite, got {weights!r}.")
    return array.astype(accumulator(array.dtype))


# --- Weights that are a function of the inner products --------------------------------------------


def mgda() -> optax.GradientTransformationExtraArgs:
    r"""Take the shortest convex combination of the gradients, which descends for every task.

    .. math:: d = \sum_i w_i g_i, \qquad
              w = \arg\min \Big\{ \Big\| \sum_i w_i g_i \Big\| : w_i \ge 0, \sum_i w_i = 1 \Big\}

    Every :math:`\langle g_i, d \rangle` is at least :math:`\|d\|^2`. Where no step descends for all
    tasks the update is 0, even if the mean of the losses could still fall much. The smallest
    gradients have the largest weights; `per_task` can bring all to one size first.

    The minimum is exact up to rounding.

    Returns:
      A stateless gradient transformation from gradients with a leading axis of tasks, as
      `jax.jacrev` of the vector of losses makes them, to one gradient.

    Raises:
      ValueError: in `update`, if a gradient has no axis of tasks, or the leaves differ in the
        number of tasks, naming the leaf.
      TypeError: in `update`, if it gets `Moments`.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> import jax, optax
      >>> losses = lambda x: jnp.array([2 * x[0] - 1, x[1]])  # two tasks
      >>> params = jnp.zeros(2)
      >>> grads = jax.jacrev(losses)(params)  # (2, 2): a row for each task
      >>> print(adam_jax.tasks.mgda().update(grads, optax.EmptyState())[0].round(2))
      [0.4 0.8]
      >>> tx = optax.chain(adam_jax.tasks.mgda(), adam_jax.adam(1e-3))  # as it is used
      >>> updates, state = tx.update(grads, tx.init(params), params)

    Source: Désidéri, "Multiple-gradient descent algorithm" (Comptes Rendus Mathématique 350, 2012);
    Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (arXiv 1810.04650),
    equation 3.
    """
    return _stage_of_gram(
        "mgda", lambda m: _Cost(m, jnp.zeros_like(m[0]), jnp.ones_like(m[0, 0])).minimizer()
    )


def cagrad(c: jax.typing.ArrayLike = 0.5) -> optax.GradientTransformationExtraArgs:
    r"""Take the direction near the mean gradient whose worst task descends most.

    .. math:: d' = \arg\max_{\|d' - g_0\| \le c \|g_0\|} \min_i \langle g_i, d' \rangle,
              \qquad g_0 = \frac 1k \sum_i g_i, \qquad d = \frac{d'}{1 + c}

    The direction :math:`d'` is a sum of :math:`g_0` and one convex combination
    :math:`g_w = \sum_i w_i g_i`,

    .. math:: d' = g_0 + c \frac{\|g_0\|}{\|g_w\|} g_w, \qquad
              w = \arg\min \langle g_w, g_0 \rangle + c \, \|g_0\| \|g_w\|

    which is the problem of `mgda` with a linear term, solved by the same iteration. With c = 0 the
    direction is the mean. With c < 1 training ends at a minimum of the mean of the losses. The
    larger c is, the nearer the direction is to that of `mgda`. The worst task descends at least as
    much as along :math:`g_0 / (1 + c)`.

    Args:
      c: the radius in units of the mean gradient, finite and at least 0: a number or a 0-d array.
        Default 0.5.

    Returns:
      A stateless gradient transformation from gradients with a leading axis of tasks, as
      `jax.jacrev` of the vector of losses makes them, to one gradient. The division by 1 + c is
      that of the authors' code, so that equal tasks give the gradient of one.

    Raises:
      ValueError: if `c` is negative, infinite, NaN or not a scalar; in `update`, if a gradient has
        no axis of tasks, or the leaves differ in the number of tasks, naming the leaf.
      TypeError: if `c` is not a number; in `update`, if it gets `Moments`.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.tasks.cagrad(c=0.5)
      >>> grads = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(stage.update(grads, stage.init(jnp.zeros(2)))[0])
      [0.667 0.706]

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning" (arXiv
    2110.14048), algorithm 1.
    """
    c = check_hyperparameter("c", c)

    def weigh(m):
        radius = scalar(c, m.dtype)
        mean = jnp.full_like(m[0], 1 / len(m))
        linear = _dot(m, mean)  # ⟨g_i, g_0⟩
        slope = radius * jnp.sqrt(jnp.maximum(_dot(mean, linear), 0))
        w = _Cost(m, linear, slope).minimizer()
        square = _dot(w, _dot(m, w))
        is_zero = square <= _rounding(m) * _dot(w, _dot(jnp.abs(m), w))
        share = jnp.where(is_zero, 0, safe_divide(slope, jnp.sqrt(jnp.maximum(square, 0))))
        return (mean + share * w) / (1 + radius)

    return _stage_of_gram("cagrad", weigh)


class _Cost(NamedTuple):
    r"""The function f(w) = ⟨linear, w⟩ + slope · √⟨w, m w⟩, for w ≥ 0 of sum 1."""

    m: jax.Array
    linear: jax.Array
    slope: jax.Array

    @jax.jit
    def minimizer(self) -> jax.Array:
        """Where f is least.

        A step moves weight between two tasks (a pairwise Frank-Wolfe step, arXiv 1511.05932). For
        two tasks one step is enough. For more, nearly parallel gradients would need many such
        steps, so each is followed by a Newton step.
        """
        tasks = len(self.m)

        def descends(carry):
            _, (_, _, gains), count = carry
            return gains & (count < 1000)

        def step(carry):
            w, (giver, taker, _), count = carry
            w = self.least_on_line(w, jnp.zeros_like(w).at[taker].add(1).at[giver].add(-1))
            if tasks > 2:
                w = self.least_on_line(w, self.newton_direction(w))
            return w, self.best_pair(w), count + 1

        start = jnp.full_like(self.m[0], 1 / tasks)
        w, *_ = jax.lax.while_loop(descends, step, (start, self.best_pair(start), 0))
        return w / jnp.sum(w)

    def derivatives(self, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The partial derivatives times √⟨w, m w⟩, and how much of each may be rounding."""
        square = jnp.maximum(_dot(w, _dot(self.m, w)), 0)
        noise = _rounding(self.m) * _dot(jnp.abs(self.m), w)
        length, longest = jnp.sqrt(square), jnp.sqrt(square + _dot(w, noise))
        derivatives = length * self.linear + self.slope * _dot(self.m, w)
        return derivatives, (longest - length) * jnp.abs(self.linear) + self.slope * noise

    def best_pair(self, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Which task gives weight to which, and whether f falls by more than rounding.

        The giver is the task of positive weight with the largest partial derivative, the taker the
        one for which f falls most, judged by its first two derivatives (Fan, Chen and Lin, JMLR 6).
        """
        derivatives, noise = self.derivatives(w)
        giver = jnp.argmax(jnp.where(w > 0, derivatives, -jnp.inf))
        gain = derivatives[giver] - derivatives
        gain = jnp.where(gain > noise[giver] + noise, gain, 0)
        squares = jnp.diag(self.m) + self.m[giver, giver]
        distance = jnp.maximum(squares - 2 * self.m[giver], _rounding(self.m) * squares)
        return giver, jnp.argmax(safe_divide(gain**2, distance)), jnp.max(gain) > 0

    def newton_direction(self, w: jax.Array) -> jax.Array:
        """To where the derivatives of all positive weights would be equal, were f quadratic.

        For `mgda` it is: its minimum is that of the square.
        """
        positive = (w > 0).astype(self.m.dtype)
        face = jnp.diag(positive) - jnp.outer(positive, positive) / jnp.sum(positive)
        curvature = self.slope * _dot(face, _dot(self.m, face))
        derivatives, _ = self.derivatives(w)
        return -_dot(jnp.linalg.pinv(curvature, hermitian=True), _dot(face, derivatives)) * positive

    def least_on_line(self, w: jax.Array, line: jax.Array) -> jax.Array:
        """Where f is least on w + t · line for t ≥ 0, up to where a weight becomes 0.

        There f is a t + slope · √(p t² + 2 q t + r) and a constant. Its derivative is 0 where
        p t + q = y, with y = -a √((p r - q²) / (slope² p - a²)).
        """
        a, product = _dot(line, self.linear), _dot(self.m, line)
        p, q, r = _dot(line, product), _dot(w, product), _dot(w, _dot(self.m, w))
        room = self.slope**2 * p - a**2
        y = -a * jnp.sqrt(safe_divide(jnp.maximum(p * r - q**2, 0), room))
        t = jnp.where((room > 0) & (p > 0), safe_divide(y - q, p), jnp.inf)
        zero_at = jnp.where(line < 0, safe_divide(w, -line), jnp.inf)
        t = jnp.clip(t, 0, jnp.minimum(jnp.min(zero_at), 10))  # at most 10: a line may be rounding
        return jnp.where(zero_at <= t, 0, w + t * line)


# --- Weights from projections and from eigenvectors -----------------------------------------------


def pcgrad(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    r"""Remove from each gradient its components that conflict with the others, then take the mean.

    .. math:: g_i' \leftarrow g_i' - \frac{\min(0, \langle g_i', g_j \rangle)}{\|g_j\|^2} g_j
              \text{ for all } j \ne i \text{ in random order}, \qquad d = \frac 1k \sum_i g_i'

    With two tasks neither loss rises to first order; with more one may. The order is a function of
    the seed and the step count, so a run can be repeated, on one device or on many.

    Args:
      seed: an integer, the seed of the random order. Default 0.

    Returns:
      A gradient transformation from gradients with a leading axis of tasks to one gradient, with a
      `CountState`. The gradient is the mean, where the paper takes the sum.

    Raises:
      ValueError: in `update`, if a gradient has no axis of tasks, or the leaves differ in the
        number of tasks, naming the leaf.
      TypeError: if `seed` is not an integer; in `update`, if it gets `Moments`.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.tasks.pcgrad()
      >>> grads = jnp.array([[2.0, 0.0], [-1.0, 1.0]])
      >>> print(stage.update(grads, stage.init(jnp.zeros(2)))[0])
      [0.5 1. ]

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning" (arXiv 2001.06782), algorithm 1.
    """
    seed = check_integer("seed", seed)

    def weigh(grads, state, *_):
        m = gram(grads)
        count = as_count(state.count)
        bits = random_bits(seed, "pcgrad", 0, count, m)
        weights = jnp.mean(_projected(m, jnp.argsort(bits, axis=1)), axis=0)
        return weights, CountState(increment(count, draws=True))

    return _stage("pcgrad", weigh, CountState.zero)


@jax.jit
def _projected(m: jax.Array, order: jax.Array) -> jax.Array:
    """In row i the coefficients of all g_j in the projected g_i.

    Row i of `order` is the order in which g_i is projected on the others; i itself is skipped.
    """

    def project(position, coefficients):
        other = jax.nn.one_hot(order[:, position], len(m), dtype=m.dtype)
        inner = jnp.sum(_dot(coefficients, m) * other, axis=1)
        conflict = jnp.where(jnp.diag(other) == 1, 0, jnp.minimum(inner, 0))
        return coefficients - safe_divide(conflict, _dot(other, jnp.diag(m)))[:, None] * other

    return jax.lax.fori_loop(0, len(m), project, jnp.eye(len(m), dtype=m.dtype))


def aligned_mtl() -> optax.GradientTransformationExtraArgs:
    r"""Whiten the gradients, bring all to the smallest singular value, and take the mean.

    .. math:: d = \frac 1k \sum_{ij} B_{ij} g_j, \qquad B = \sqrt{\lambda_{\min}} \, M^{-1/2}

    where M is the matrix of inner products and :math:`\lambda_{\min}` its smallest eigenvalue that
    is not 0; :math:`M^{-1/2}` is 0 on the null space of M. The gradients :math:`\sum_j B_{ij} g_j`
    are orthogonal and of one length, and no others of this length are nearer to the
    :math:`g_i`. So no direction counts more because more tasks, or larger ones, share it. Nothing
    is promised of a single task, and the length jumps where the rank of M changes: in float32 an
    eigenvalue below about k · 1e-7 of the largest counts as 0.

    Returns:
      A stateless gradient transformation from gradients with a leading axis of tasks, as
      `jax.jacrev` of the vector of losses makes them, to one gradient.

    Raises:
      ValueError: in `update`, if a gradient has no axis of tasks, or the leaves differ in the
        number of tasks, naming the leaf.
      TypeError: in `update`, if it gets `Moments`.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.tasks.aligned_mtl()
      >>> grads = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(stage.update(grads, stage.init(jnp.zeros(2)))[0])
      [0.5 0.5]

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning" (arXiv
    2305.19000), algorithm 1.
    """

    def weigh(m):
        values, vectors = jnp.linalg.eigh(m)
        nonzero = values > len(m) * jnp.finfo(m.dtype).eps * values[-1]
        least = jnp.min(jnp.where(nonzero, values, jnp.inf))
        scales = jnp.sqrt(jnp.where(nonzero, safe_divide(least, values), 0))
        mean = jnp.full_like(m[0], 1 / len(m))
        return _dot(vectors, scales * _dot(mean, vectors))

    return _stage_of_gram("aligned_mtl", weigh)


# --- Weights that are learned from the losses -----------------------------------------------------


def gradnorm(
    tasks: int,
    alpha: jax.typing.ArrayLike = 1.5,
    *,
    learning_rate: optax.ScalarOrSchedule = 0.025,
) -> optax.GradientTransformationExtraArgs:
    r"""Learn weights with which the tasks train at the same rate.

    .. math:: d = \frac 1k \sum_i w_i g_i, \qquad
              r_i = \frac{L_i / L_i(0)}{\frac 1k \sum_j L_j / L_j(0)}, \qquad
              \sum_i \Big| w_i \|g_i\| - r_i^\alpha \cdot \frac 1k \sum_j w_j \|g_j\| \Big|
              \to \min_w

    with the losses :math:`L_i`, and :math:`L_i(0)` those of the first step. The weights start at 1.
    In every step `adam` takes one step on the last sum, in which the term after the minus sign
    counts as constant. Then negative weights become 0, and all are scaled to the sum k.

    ``update(grads, state, params, value=losses)`` needs the k losses, which must be positive. The
    norms are those of all leaves that the stage gets; in the paper, those of one shared layer.
    (The learned variances of Kendall, Gal and Cipolla, arXiv 1705.07115, need no stage: they are
    parameters, and the loss ``jnp.sum(jnp.exp(-s) * losses + s)`` has one gradient.)

    Args:
      tasks: the number k of tasks, a positive integer.
      alpha: how much more weight a slow task gets, finite and at least 0: a number or a 0-d array.
        Default 1.5.
      learning_rate: the learning rate of the weights: a number, a 0-d array or a schedule. Default
        0.025.

    Returns:
      A gradient transformation from gradients with a leading axis of tasks to one gradient, with a
      `GradnormState`. The gradient is the mean, where the paper takes the sum.

    Raises:
      ValueError: if `tasks` is not positive, or `alpha` or the rate is out of range; in `update`,
        without the losses, if there are more or fewer losses than tasks, or if a gradient has no
        axis of tasks, naming the leaf.
      TypeError: if `tasks` is not an integer, or `alpha` or the rate of another kind than above; in
        `update`, if it gets `Moments`.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.tasks.gradnorm(2, learning_rate=0.5)
      >>> state = stage.init(jnp.zeros(2))
      >>> grads, losses = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 1.0])
      >>> update, state = stage.update(grads, state, value=losses)
      >>> print(update, state.weights.round(2))  # the first is longer than the mean
      [1.5 0.5] [0.5 1.5]

    Source: Chen et al., "GradNorm" (arXiv 1711.02257), algorithm 1.
    """
    tasks = check_count("tasks", tasks)
    alpha = check_hyperparameter("alpha", alpha)
    learner = adam(learning_rate)

    def init_fn(params):
        del params
        weights = jnp.ones(tasks, float)
        return GradnormState(
            count=jnp.zeros([], jnp.int32),
            weights=weights,
            initial=jnp.zeros(tasks, float),
            learner=learner.init(weights),
        )

    def weigh(grads, state, given_tasks, losses):
        if losses is None:
            raise ValueError("gradnorm needs the losses: pass value=losses to update().")
        if given_tasks != tasks or jnp.shape(losses) != (tasks,):
            raise ValueError(
                f"gradnorm was made for {tasks} tasks, but got gradients of {given_tasks} and "
                f"losses of shape {jnp.shape(losses)}."
            )
        weights = state.weights
        losses = jnp.asarray(losses).astype(weights.dtype)
        norms = jnp.sqrt(jnp.diag(gram(grads))).astype(weights.dtype)
        initial = jnp.where(state.count == 0, losses, state.initial)
        progress = losses / initial
        rates = progress / jnp.mean(progress)
        target = jnp.mean(weights * norms) * rates ** scalar(alpha, weights.dtype)
        gradient = jnp.sign(weights * norms - target) * norms
        step, learner_state = learner.update(gradient, state.learner, weights)
        learned = jnp.maximum(weights + step, 0)
        state = GradnormState(
            count=increment(as_count(state.count)),
            weights=learned * (tasks / jnp.sum(learned)),
            initial=initial,
            learner=learner_state,
        )
        return weights / tasks, state

    return _stage("gradnorm", weigh, init_fn)


class GradnormState(NamedTuple):
    """The state of `gradnorm`.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates.
      weights: the weights of the k tasks, of sum k, a vector in the default float dtype.
      initial: the k losses of the first step, a vector; zeros before it.
      learner: the state of the `adam` that learns the weights.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    weights: jax.Array
    initial: jax.Array
    learner: optax.OptState


# --- Each task by itself, before they are combined ------------------------------------------------


def per_task(tasks: int, tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Run a chain on each task's gradient by itself, with moments and norms of its own.

    Put it before a stage that combines the tasks. For instance ::

        optax.chain(
            adam_jax.tasks.per_task(
                2, optax.chain(adam_jax.scale_by_moments(), adam_jax.bias_correct())
            ),
            adam_jax.tasks.mgda(),
            adam_jax.scale_by_lr(1e-3),
        )

    combines Adam's directions, whose size does not depend on the size of a loss, and keeps k times
    the state; `mgda` before `adam` combines the gradients. With
    ``per_task(k, optax.normalize_by_update_norm())`` the gradient of each task has length 1.

    (Elementwise stages need no wrapper: without it, the two stages above give the same, if `init`
    gets parameters with an axis of tasks.)

    Args:
      tasks: the number k of tasks, a positive integer.
      tx: a chain from the gradient of one task to a plain update.

    Returns:
      A gradient transformation from gradients with a leading axis of tasks to updates with that
      axis. Its state is that of `tx`, with a leading axis of tasks on every leaf. `init` and
      `update` take the parameters without this axis.

    Raises:
      ValueError: if `tasks` is not positive; in `update`, if a gradient has another number of
        tasks, naming the leaf.
      TypeError: if `tasks` is not an integer or `tx` no gradient transformation; in `update`, if it
        gets `Moments`, or `tx` emits them.

    Example:
      >>> import adam_jax, optax, jax.numpy as jnp
      >>> direction = optax.chain(adam_jax.scale_by_moments(), adam_jax.bias_correct())
      >>> tx = optax.chain(adam_jax.tasks.per_task(2, direction), adam_jax.tasks.mgda())
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[1000.0, 0.0], [0.0, -0.001]])
      >>> print(tx.update(grads, tx.init(params), params)[0].round(2))
      [ 0.5 -0.5]

    Source: Kingma and Ba, "Adam" (arXiv 1412.6980), for each task.
    """
    tasks = check_count("tasks", tasks)
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"tx must be a gradient transformation, got {tx!r}.")
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        return jax.vmap(lambda _: tx.init(params), axis_size=tasks)(None)

    def update_fn(updates, state, params=None, **extra_args):
        given_tasks = _check_tasks("per_task", updates, params)
        if given_tasks not in (None, tasks):
            raise ValueError(
                f"per_task was made for {tasks} tasks, but got gradients of {given_tasks}."
            )

        def update_task(update, state):
            update, state = tx.update(update, state, params, **extra_args)
            check_updates("per_task", update)
            return update, state

        return jax.vmap(update_task, axis_size=tasks)(updates, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- From weights to a stage ----------------------------------------------------------------------


def _stage_of_gram(
    stage: str, weigh: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """A stage without state, whose weights are a function of the inner products.

    `weigh` gets the inner products over the largest of them. That changes no weight, and powers of
    small inner products would underflow.
    """

    def weigh_fn(grads, state, *_):
        m = gram(grads)
        return weigh(safe_divide(m, jnp.max(jnp.diag(m)))), state

    return _stage(stage, weigh_fn, lambda params: optax.EmptyState())


def _stage(
    stage: str, weigh: Callable[..., tuple[jax.Array, Any]], init: optax.TransformInitFn
) -> optax.GradientTransformationExtraArgs:
    """A stage from `weigh(grads, state, tasks, losses)`, which gives the weights and the state."""

    def update_fn(updates, state, params=None, *, value=None, **extra_args):
        del extra_args
        tasks = _check_tasks(stage, updates, params)
        if tasks is None:
            return updates, state
        weights, state = weigh(updates, state, tasks, value)
        return combine(updates, weights, params), state

    return optax.GradientTransformationExtraArgs(init, update_fn)


def _check_tasks(stage: str, updates: optax.Updates, params: Any) -> int | None:
    """The length of the axis of tasks, the same for all leaves; None for a tree without leaves."""
    remedy = "make them with jax.jacrev of the vector of losses"
    check_updates(stage, updates)
    param_at = leaves_by_path(params_of(updates, params))
    tasks = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        shape, param = jnp.shape(leaf), param_at.get(path)
        if not shape or not shape[0] or (param is not None and shape[1:] != jnp.shape(param)):
            of = "" if param is None else f", and its parameter {jnp.shape(param)}"
            raise ValueError(
                f"{stage} takes gradients with one leading axis of tasks, but the one{at(path)} "
                f"has shape {shape}{of}: {remedy}."
            )
        if tasks not in (None, shape[0]):
            raise ValueError(
                f"{stage} takes gradients of the same tasks for every leaf, but the one{at(path)} "
                f"has {shape[0]}, and others have {tasks}: {remedy}."
            )
        tasks = shape[0]
    return tasks


def _rounding(m: jax.Array) -> float:
    """How far rounding may move a sum of k products, relative to the sum of their magnitudes."""
    return 2 * len(m) * float(jnp.finfo(m.dtype).eps)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product in full precision: by default a GPU or TPU may round to fewer digits first."""
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
