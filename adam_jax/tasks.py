r"""Several losses: one gradient out of the gradients of many tasks.

Gradients :math:`g_1, \dots, g_k` of k losses are a tree like the parameters whose leaves have one
more axis in front, that of the tasks: what `jax.jacrev` of the vector of losses gives. A stage of
this module makes one gradient of them,

.. math:: d = \sum_i w_i g_i

and any chain follows::

    losses = lambda params: jnp.stack([loss_a(params), loss_b(params)])
    tx = optax.chain(adam_jax.tasks.mgda(), adam_jax.adam(1e-3))
    state = tx.init(params)
    updates, state = tx.update(jax.jacrev(losses)(params), state, params)

The methods differ in how they come from the inner products :math:`\langle g_i, g_j \rangle`, the
k × k matrix that `gram` computes, to the k weights that `combine` takes; so can one of your own.
All keep the size of a gradient: what k equal tasks give is the task.

- A network with a head for each task is combined where it is shared, and each head gets the
  gradient of its own task, by ``optax.partition({"shared": mgda(), "heads": weighted([1, 1])}, …)``
  as the first stage.
- Moments of each task, taken before the combination: `per_task`.
- `optax.apply_if_finite`, `optax.MultiSteps` and others whose own state has the shape of the
  parameters go around what follows: ``optax.chain(mgda(), optax.apply_if_finite(adam(1e-3), 3))``.
- Sharded leaves: the inner products are those of the whole leaves, under `jax.jit` and inside
  `jax.shard_map`, where the type of a leaf tells over which axes of the mesh it is split. (With
  ``check_vma=False``, and so in `jax.pmap`, it does not, which is an error.)
- Arithmetic is done in at least float32. The inner product of complex gradients is its real part.
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

from adam_jax._checks import check_count, check_hyperparameter, check_seed
from adam_jax._jit import once
from adam_jax._numerics import accumulator, as_count, increment, real, safe_divide, scalar, wider
from adam_jax._ownership import at, leaves_by_path
from adam_jax._random import random_bits
from adam_jax.optimizers import adam
from adam_jax.signal import check_updates, params_of
from adam_jax.updates import CountState

# --- The two common parts: from gradients to their inner products, from weights to one gradient ---


def gram(grads: optax.Updates) -> jax.Array:
    r"""The inner products of the tasks' gradients, over all leaves.

    .. math:: M_{ij} = \langle g_i, g_j \rangle = \operatorname{Re} \sum \bar g_i \, g_j

    Args:
      grads: a tree whose leaves have one leading axis of k tasks.

    Returns:
      A symmetric k × k matrix, in at least float32; float64 if a leaf is.

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
    return sum(_over_devices(once(_products, leaf), leaf).astype(dtype) for leaf in leaves)  # type: ignore


def _products(leaf: jax.Array) -> jax.Array:
    """As a sum, which a device computes in full precision and wherever the leaf is split."""
    leaf = leaf.astype(accumulator(leaf.dtype))
    products = jnp.real(jnp.conj(leaf[:, None]) * leaf[None])
    return jnp.sum(products, axis=tuple(range(2, products.ndim)))


def _over_devices(total: jax.Array, leaf: jax.Array) -> jax.Array:
    """Inside `jax.shard_map`: the sum over the devices that hold other parts of the leaf."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual and not _varies(jax.lax.axis_index(manual[0])):
        raise ValueError(
            "The inner products of gradients need to know which leaves are split over devices: "
            "give jax.shard_map check_vma=True, its default, or combine the tasks outside of it. "
            "(jax.pmap is a shard_map without: use jax.jit or jax.shard_map in its place.)"
        )
    axes = _varies(leaf)
    return jax.lax.psum(total, axes) if axes else total


def _varies(x: jax.Array) -> tuple[str, ...]:
    """The axes of the mesh along which devices hold different values, by the type of `x`."""
    kind: Any = jax.typeof(x)
    return tuple(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)


def combine(grads: optax.Updates, weights: jax.Array, params: Any = None) -> optax.Updates:
    r"""One gradient: the sum of the tasks' gradients with weights.

    .. math:: d = \sum_i w_i g_i

    Args:
      grads: a tree whose leaves have one leading axis of k tasks.
      weights: an array of k real numbers.
      params: the parameters, whose dtype the result has where it is wider than the gradient's.

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
    """Task by task: XLA needs hundreds of times as long for a sum along the first axis on a CPU."""
    leaf = leaf.astype(accumulator(leaf.dtype))
    weights = weights.astype(leaf.dtype)
    return functools.reduce(operator.add, [weights[i] * leaf[i] for i in range(len(leaf))])


# --- Weights that do not look at the gradients ----------------------------------------------------


def weighted(
    weights: Sequence[float] | jax.Array | np.ndarray | Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient of a weighted sum of the losses.

    .. math:: d = \sum_i w_i g_i

    Args:
      weights: k finite numbers, or a schedule from the number of steps taken so far to k numbers.
        Equal weights of 1/k give the mean. They may be negative.

    Returns:
      A gradient transformation from gradients with a leading axis of k tasks to one gradient, with
      a `CountState`.

    Raises:
      ValueError: if the weights are not a vector of finite numbers; in `update`, if there are not
        as many as tasks, or a gradient has no axis of tasks, naming the leaf.
      TypeError: if they are not numbers; in `update`, if it gets `Moments`.

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

    def weigh(grads, state, tasks, extra_args):
        del grads, extra_args
        count = as_count(state.count)
        now = _check_weights(weights(count)) if callable(weights) else weights
        if len(now) != tasks:
            raise ValueError(
                f"weighted got {len(now)} weights for gradients of {tasks} tasks: give one for "
                f"each."
            )
        return now, CountState(increment(count))

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
    r"""The shortest of all convex combinations, which descends for every task.

    .. math:: d = \sum_i w_i g_i, \qquad
              w = \arg\min \Big\{ \Big\| \sum_i w_i g_i \Big\| : w_i \ge 0, \sum_i w_i = 1 \Big\}

    Every :math:`\langle g_i, d \rangle` is at least :math:`\|d\|^2`, and where no step descends for
    all tasks the update is 0, even if the mean of the losses could still fall much. The smallest
    gradients count most; `per_task` can bring all to one size before.

    The point is exact but for rounding. Weight goes from one task to another, as much as shortens
    the sum most (Frank and Wolfe's steps, in pairs), and then all that take part go where they have
    equal inner products with the sum (Newton's step), or until a weight is 0: for two tasks one
    step, for more a few, at most 1,000.

    Returns:
      A stateless gradient transformation from gradients with a leading axis of tasks to one
      gradient.

    Raises:
      ValueError: in `update`, if a gradient has no axis of tasks, naming the leaf.
      TypeError: in `update`, if it gets `Moments`.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.tasks.mgda()
      >>> grads = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(stage.update(grads, stage.init(jnp.zeros(2)))[0].round(2))
      [0.4 0.8]

    Source: Désidéri, "Multiple-gradient descent algorithm" (Comptes Rendus Mathématique 350, 2012);
    Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (arXiv 1810.04650),
    equation 3; the steps: Lacoste-Julien and Jaggi (arXiv 1511.05932), algorithm 2, with the pairs
    of Fan, Chen and Lin, "Working Set Selection Using Second Order Information" (JMLR 6, 2005).
    """
    return _of_gram("mgda", lambda m: _on_simplex(m, jnp.zeros_like(m[0]), jnp.ones_like(m[0, 0])))


def cagrad(c: jax.typing.ArrayLike = 0.5) -> optax.GradientTransformationExtraArgs:
    r"""Near the mean gradient, the direction whose worst task descends most.

    .. math:: d' = \arg\max_{\|d' - g_0\| \le c \|g_0\|} \min_i \langle g_i, d' \rangle,
              \qquad g_0 = \frac 1k \sum_i g_i, \qquad d = \frac{d'}{1 + c}

    Its weights are those of :math:`g_0` and of one convex combination :math:`g_w`,

    .. math:: d' = g_0 + c \frac{\|g_0\|}{\|g_w\|} g_w, \qquad
              w = \arg\min \langle g_w, g_0 \rangle + c \, \|g_0\| \|g_w\|

    which is `mgda` with a linear term, and found as there. With c = 0 it is the mean; with c < 1 it
    goes to a minimum of the mean of the losses; the larger c, the nearer to `mgda`. The worst task
    descends at least as much as along :math:`g_0 / (1 + c)`.

    Args:
      c: the radius in units of the mean gradient, finite and at least 0: a number or a 0-d array.
        Default 0.5.

    Returns:
      A stateless gradient transformation from gradients with a leading axis of tasks to one
      gradient. It is divided by 1 + c, as in the authors' code, so that equal tasks give the task.

    Raises:
      ValueError: if `c` is negative, infinite, NaN or not a scalar; in `update`, if a gradient has
        no axis of tasks, naming the leaf.
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
        along = _dot(m, mean)  # ⟨g_i, g_0⟩
        most = radius * jnp.sqrt(jnp.maximum(_dot(mean, along), 0))
        w = _on_simplex(m, along, most)
        square = _dot(w, _dot(m, w))
        known = square > _rounding(m) * _dot(w, _dot(jnp.abs(m), w))
        share = jnp.where(known, safe_divide(most, jnp.sqrt(jnp.maximum(square, 0))), 0)
        return (mean + share * w) / (1 + radius)

    return _of_gram("cagrad", weigh)


@jax.jit
def _on_simplex(m: jax.Array, linear: jax.Array, slope: jax.Array) -> jax.Array:
    r"""The w ≥ 0 of sum 1 with the least ⟨linear, w⟩ + slope · √⟨w, m w⟩.

    In each step the task whose weight costs most gives weight to one whose weight costs less: the
    one with which that gains most. With two tasks this line is all there is. With more, gradients
    that are nearly parallel need many such steps, so a second line goes to where the tasks that
    take part would cost the same, if the cost were quadratic, as that of `mgda` is.
    """

    def costs(w):
        """The gradient by w times √⟨w, m w⟩, and what rounding may change of it."""
        square, sizes = jnp.maximum(_dot(w, _dot(m, w)), 0), _rounding(m) * _dot(jnp.abs(m), w)
        length, longer = jnp.sqrt(square), jnp.sqrt(square + _dot(w, sizes))
        cost = length * linear + slope * _dot(m, w)
        return cost, (longer - length) * jnp.abs(linear) + slope * sizes

    def chosen(w):
        """Who gives, who takes, and whether that gains more than rounding."""
        cost, noise = costs(w)
        giver = jnp.argmax(jnp.where(w > 0, cost, -jnp.inf))
        gain = cost[giver] - cost
        gain = jnp.where(gain > noise[giver] + noise, gain, 0)
        sizes = jnp.diag(m) + m[giver, giver]
        square = jnp.maximum(sizes - 2 * m[giver], _rounding(m) * sizes)
        return giver, jnp.argmax(safe_divide(gain**2, square)), jnp.max(gain) > 0

    def along(w, line):
        """To the least of a t + slope √(p t² + 2 q t + r): its derivative is 0 at p t + q = y."""
        a, product = _dot(line, linear), _dot(m, line)
        p, q, r = _dot(line, product), _dot(w, product), _dot(w, _dot(m, w))
        room = slope**2 * p - a**2
        y = -a * jnp.sqrt(safe_divide(jnp.maximum(p * r - q**2, 0), room))
        t = jnp.where((room > 0) & (p > 0), safe_divide(y - q, p), jnp.inf)
        ends = jnp.where(line < 0, safe_divide(w, -line), jnp.inf)
        t = jnp.clip(t, 0, jnp.minimum(jnp.min(ends), 10))  # 10, for a line that is rounding
        return jnp.where(ends <= t, 0, w + t * line)

    def step(carry):
        w, giver, taker, _, count = carry
        w = along(w, jnp.zeros_like(w).at[taker].add(1).at[giver].add(-1))
        if len(m) > 2:
            part = (w > 0).astype(m.dtype)
            face = jnp.diag(part) - jnp.outer(part, part) / jnp.sum(part)
            curvature = slope * _dot(face, _dot(m, face))
            line = -_dot(jnp.linalg.pinv(curvature, hermitian=True), _dot(face, costs(w)[0]))
            w = along(w, line * part)
        return w, *chosen(w), count + 1

    start = jnp.full_like(m[0], 1 / len(m))
    going = lambda carry: carry[3] & (carry[4] < 1000)  # noqa: E731
    w = jax.lax.while_loop(going, step, (start, *chosen(start), 0))[0]
    return w / jnp.sum(w)


def pcgrad(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    r"""Take from each gradient what conflicts with another one, then the mean.

    .. math:: g_i' \leftarrow g_i' - \frac{\min(0, \langle g_i', g_j \rangle)}{\|g_j\|^2} g_j
              \text{ for all } j \ne i \text{ in random order}, \qquad d = \frac 1k \sum_i g_i'

    With two tasks the step climbs for neither; with more it may. The order is a function of the
    seed and the step count: the same run draws the same, on one device or on many.

    Args:
      seed: an integer that starts the random order. Default 0.

    Returns:
      A gradient transformation from gradients with a leading axis of tasks to one gradient, with a
      `CountState`. It is the mean, where the paper takes the sum, so that equal tasks give the
      task.

    Raises:
      TypeError: if `seed` is not an integer; in `update`, if it gets `Moments`.
      ValueError: in `update`, if a gradient has no axis of tasks, naming the leaf.

    Example:
      >>> import adam_jax, jax.numpy as jnp
      >>> stage = adam_jax.tasks.pcgrad()
      >>> grads = jnp.array([[2.0, 0.0], [-1.0, 1.0]])
      >>> print(stage.update(grads, stage.init(jnp.zeros(2)))[0])
      [0.5 1. ]

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning" (arXiv 2001.06782), algorithm 1.
    """
    seed = check_seed(seed)

    def weigh(grads, state, tasks, extra_args):
        del tasks, extra_args
        m = gram(grads)
        count = as_count(state.count)
        bits = random_bits(seed, "pcgrad", 0, count, m)
        weights = jnp.mean(_surgery(m, jnp.argsort(bits, axis=1)), axis=0)
        return weights, CountState(increment(count, draws=True))

    return _stage("pcgrad", weigh, CountState.zero)


@jax.jit
def _surgery(m: jax.Array, order: jax.Array) -> jax.Array:
    """Row i: of which parts of all gradients gradient i is made, when it has met the others.

    Row i of the order says when; that it meets itself changes nothing.
    """

    def meet(position, parts):
        other = jax.nn.one_hot(order[:, position], len(m), dtype=m.dtype)
        inner = jnp.sum(_dot(parts, m) * other, axis=1)
        conflict = jnp.where(jnp.diag(other) == 1, 0, jnp.minimum(inner, 0))
        return parts - safe_divide(conflict, _dot(other, jnp.diag(m)))[:, None] * other

    return jax.lax.fori_loop(0, len(m), meet, jnp.eye(len(m), dtype=m.dtype))


def aligned_mtl() -> optax.GradientTransformationExtraArgs:
    r"""The mean of the nearest gradients that are orthogonal and of one length, the shortest.

    .. math:: d = \frac 1k \sum_{ij} B_{ij} g_j, \qquad B = \sqrt{\lambda_{\min}} \, M^{-1/2}

    with the inner products M, and their least eigenvalue that is not 0; on the space where it is 0,
    :math:`M^{-1/2}` is 0. No direction counts more because more tasks, or larger ones, share it.
    Nothing is promised of a single task, and near the change of a rank the length jumps: in float32
    an eigenvalue below about k · 1e-7 of the largest is 0.

    Returns:
      A stateless gradient transformation from gradients with a leading axis of tasks to one
      gradient.

    Raises:
      ValueError: in `update`, if a gradient has no axis of tasks, naming the leaf.
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
        kept = values > len(m) * jnp.finfo(m.dtype).eps * values[-1]
        least = jnp.min(jnp.where(kept, values, jnp.inf))
        scales = jnp.sqrt(jnp.where(kept, safe_divide(least, values), 0))
        mean = jnp.full_like(m[0], 1 / len(m))
        return _dot(vectors, scales * _dot(mean, vectors))

    return _of_gram("aligned_mtl", weigh)


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

    The weights start at 1. `adam` takes a step on this sum, in which the product on the right is a
    constant, and then they are scaled to the sum k. A weight that a step would make negative is 0.

    ``update(grads, state, params, value=losses)`` needs the k losses, which must be positive. In
    the paper the norms are those of one shared layer, here those of all leaves that the stage sees.
    (The learned variances of Kendall, Gal and Cipolla, arXiv 1705.07115, need no stage: they are
    parameters, and the loss ``jnp.sum(jnp.exp(-s) * losses + s)`` has one gradient.)

    Args:
      tasks: the number k of tasks, which the parameters do not tell.
      alpha: how strongly a slow task is pulled, finite and at least 0: a number or a 0-d array.
        Default 1.5.
      learning_rate: the rate of the weights, as in `scale_by_lr`. Default 0.025.

    Returns:
      A gradient transformation from gradients with a leading axis of tasks to one gradient, with a
      `GradnormState`. It is the mean, where the paper takes the sum, so that equal tasks give the
      task.

    Raises:
      ValueError: if `tasks` is not positive, `alpha` or the rate out of its range; in `update`,
        without the losses, if there are not as many as tasks, or if a gradient has no axis of
        tasks, naming the leaf.
      TypeError: if one of them is not a number; in `update`, if it gets `Moments`.

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

    def weigh(grads, state, found, extra_args):
        losses = extra_args.get("value")
        if losses is None:
            raise ValueError("gradnorm needs the losses: pass value=losses to update().")
        if found != tasks or jnp.shape(losses) != (tasks,):
            raise ValueError(
                f"gradnorm was made for {tasks} tasks, but got gradients of {found} and losses of "
                f"shape {jnp.shape(losses)}."
            )
        weights = state.weights
        losses = jnp.asarray(losses).astype(weights.dtype)
        norms = jnp.sqrt(jnp.diag(gram(grads))).astype(weights.dtype)
        initial = jnp.where(state.count == 0, losses, state.initial)
        progress = losses / initial
        rates = progress / jnp.mean(progress)
        due = jnp.mean(weights * norms) * rates ** scalar(alpha, weights.dtype)
        slope = jnp.sign(weights * norms - due) * norms
        step, learner_state = learner.update(slope, state.learner, weights)
        new = jnp.maximum(weights + step, 0)
        new = new * (tasks / jnp.sum(new))
        state = GradnormState(increment(as_count(state.count)), new, initial, learner_state)
        return weights / tasks, state

    return _stage("gradnorm", weigh, init_fn)


class GradnormState(NamedTuple):
    """The state of `gradnorm`.

    Attributes:
      count: the number of steps taken, an int32 scalar that saturates.
      weights: the weights of the k tasks, of sum k, in the default float dtype.
      initial: the losses of the first step.
      learner: the state of the `adam` that learns the weights.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    weights: jax.Array
    initial: jax.Array
    learner: optax.OptState


# --- Each task by itself, before they are combined ------------------------------------------------


def per_task(tasks: int, tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""A chain for each task: its own moments, its own norm.

    Placed before a combination, it makes of each task's gradient what `tx` makes of it alone::

        optax.chain(
            adam_jax.tasks.per_task(
                2, optax.chain(adam_jax.scale_by_moments(), adam_jax.bias_correct())
            ),
            adam_jax.tasks.mgda(),
            adam_jax.scale_by_lr(1e-3),
        )

    combines directions of Adam, which have one size whatever the sizes of the losses, for k times
    the state; `mgda` before `adam` combines gradients. With `optax.normalize_by_update_norm` each
    task has a gradient of length 1.

    (What does not look beyond an element needs no wrapper, because an axis of tasks is an axis:
    `scale_by_moments` directly before `mgda` gives the same, if `init` gets parameters with that
    axis.)

    Args:
      tasks: the number k of tasks, which the parameters do not tell.
      tx: what to do with the gradient of a task, from gradients to plain updates.

    Returns:
      A gradient transformation from gradients with a leading axis of tasks to updates with it. Its
      state is that of `tx` with this axis on every leaf; `init` and `update` take the parameters as
      they are.

    Raises:
      ValueError: if `tasks` is not positive; in `update`, if a gradient has not this many tasks,
        naming the leaf.
      TypeError: if `tx` is no gradient transformation; in `update`, if it ends in `Moments`.

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
        found = _check_tasks("per_task", updates, params)
        if found not in (None, tasks):
            raise ValueError(f"per_task was made for {tasks} tasks, but got gradients of {found}.")

        def alone(update, state):
            update, state = tx.update(update, state, params, **extra_args)
            check_updates("per_task", update)
            return update, state

        return jax.vmap(alone, axis_size=tasks)(updates, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- From weights to a stage ----------------------------------------------------------------------


def _of_gram(
    stage: str, weigh: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """A stage without state, whose weights are a function of the inner products.

    It gets them in units of the largest: its weights do not change with the size of all gradients,
    and powers of small numbers would be 0.
    """

    def weigh_fn(grads, state, tasks, extra_args):
        del tasks, extra_args
        m = gram(grads)
        return weigh(safe_divide(m, jnp.max(jnp.diag(m)))), state

    return _stage(stage, weigh_fn, lambda params: optax.EmptyState())


def _stage(
    stage: str, weigh: Callable[..., tuple[jax.Array, Any]], init: optax.TransformInitFn
) -> optax.GradientTransformationExtraArgs:
    """A stage from `weigh(grads, state, tasks, extra_args)`: the weights and the next state."""

    def update_fn(updates, state, params=None, **extra_args):
        tasks = _check_tasks(stage, updates, params)
        if tasks is None:
            return updates, state
        weights, state = weigh(updates, state, tasks, extra_args)
        return combine(updates, weights, params), state

    return optax.GradientTransformationExtraArgs(init, update_fn)


def _check_tasks(stage: str, updates: optax.Updates, params: Any) -> int | None:
    """The number of tasks, which all leaves have in front; None of a tree without leaves."""
    remedy = "make them with jax.jacrev of the vector of losses"
    check_updates(stage, updates)
    param_at = leaves_by_path(params_of(updates, params))
    found: dict[int, tuple] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        shape, param = jnp.shape(leaf), param_at.get(path)
        if not shape or not shape[0] or (param is not None and shape[1:] != jnp.shape(param)):
            of = "" if param is None else f", and its parameter {jnp.shape(param)}"
            raise ValueError(
                f"{stage} takes gradients with one leading axis of tasks, but the one{at(path)} "
                f"has shape {shape}{of}: {remedy}."
            )
        found.setdefault(shape[0], path)
    if len(found) > 1:
        (k, one), (other_k, other), *_ = found.items()
        raise ValueError(
            f"{stage} takes gradients of the same tasks for every leaf, but the one{at(one)} has "
            f"{k} and the one{at(other)} has {other_k}: {remedy}."
        )
    return next(iter(found), None)


def _rounding(m: jax.Array) -> float:
    """What rounding may change of a sum of k products, relative to that of their sizes."""
    return 2 * len(m) * float(jnp.finfo(m.dtype).eps)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product in full precision, also where a device would take fewer digits."""
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
