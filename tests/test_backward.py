"""The step in the backward pass is the plain one: value_and_grad, then the chain on the stack."""

import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, refused, stack
from tables import MEMBERS, STORAGES, keeping

import adam_jax
from adam_jax import backward, storage

LAYERS, WIDTH = 3, 64


def block(x, layer, *, scale):
    """A residual layer with a small leaf, a scalar auxiliary loss, and something shared."""
    h = jnp.tanh(x @ layer["up"]) * scale[None]
    return x + h @ layer["down"] + layer["bias"][None], jnp.mean(jnp.square(h))


def loss(params, layers, tokens, *, wrap=lambda layer: layer):
    x = params["embedding"][tokens]
    layer = wrap(partial(block, scale=params["scale"]))
    x, costs = backward.scan(layer, x, layers)
    logits = x @ params["embedding"].T  # tied
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    return jnp.mean(each) + 0.01 * jnp.sum(costs)


def problem(dtype="float32"):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 8, dtype)  # noqa: E731
    params = {"embedding": draw(70, WIDTH), "scale": jnp.ones((WIDTH,), dtype)}
    layers = {
        "up": draw(LAYERS, WIDTH, WIDTH),
        "down": draw(LAYERS, WIDTH, WIDTH),
        "bias": draw(LAYERS, WIDTH),
    }
    return params, layers, jnp.asarray(rng.integers(0, 70, 20))


def plain_step(loss, tx, layers_tx=None):
    """The same with all gradients at once."""
    inner = optax.with_extra_args_support(tx)
    layers_tx = adam_jax.stacked(layers_tx or tx)

    def step(params, layers, state, *args):
        value, (grads, layer_grads) = jax.value_and_grad(loss, (0, 1))(params, layers, *args)
        extra_args = {"value": value, "grad_norm": state.grad_norm}
        updates, params_state = inner.update(grads, state.params, params, **extra_args)
        layer_updates, layers_state = layers_tx.update(
            layer_grads, state.layers, layers, **extra_args
        )
        norm = optax.tree.norm(jax.tree.map(jnp.float32, (grads, layer_grads)))
        params, layers = optax.apply_updates((params, layers), (updates, layer_updates))
        return value, params, layers, backward.BackwardState(norm, params_state, layers_state)

    return step


def both(loss, tx, dtype="float32", layers_tx=None, steps=20):
    """What the step in the backward pass makes of every state of a plain run, and the plain one."""
    params, layers, tokens = problem(dtype)
    step, plain = (
        jax.jit(make(loss, tx, layers_tx)) for make in (backward.value_and_step, plain_step)
    )
    starts, due = [(params, layers, backward.init(tx, params, layers, layers_tx))], []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            due.append(plain(*starts[-1], tokens))
            starts.append(due[-1][1:])
        found = [step(*start, tokens) for start in starts[:-1]]
    return stack(found), stack(due)


def assert_same(found, due):
    """The loss bit for bit, floats to a few ulp; of what is rounded one in a thousand otherwise."""
    chex.assert_trees_all_equal(found[0], due[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, due)
    for x, y in zip(jax.tree.leaves(found[1:]), jax.tree.leaves(due[1:]), strict=True):
        if x.dtype.itemsize < 4 or jnp.issubdtype(x.dtype, jnp.integer):
            assert np.mean(x != y) <= 1e-3
        else:
            assert_close(x, y, "layer")


# --- The law --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_in_the_backward_pass_is_the_plain_member(name):
    found, due = both(loss, getattr(adam_jax, name)(1e-2))
    assert_same(found, due)
    assert np.all(found[3].grad_norm > 0)


@pytest.mark.parametrize("how", STORAGES)
def test_a_storage(how):
    assert_same(*both(loss, adam_jax.adamw(1e-2, **keeping(how))))


def every_member_with_every_storage():
    """The same for all pairs that there are, which is many minutes: `.ci/run` calls this file."""
    for name, member in MEMBERS.items():
        for how in STORAGES:
            taken = inspect.signature(member).parameters
            options = {k: v for k, v in keeping(how).items() if k in taken}
            if options:
                assert_same(*both(loss, member(1e-2, **options)))
                print(name, how, flush=True)
        jax.clear_caches()


def test_a_state_on_the_host():
    """By its type before and after, and with the numbers of the plain step."""
    tx = adam_jax.adamw(1e-2, **keeping(storage.on_host("bfloat16")))
    params, layers, tokens = problem()
    state = backward.init(tx, params, layers)
    _, *_, later = jax.jit(backward.value_and_step(loss, tx))(params, layers, state, tokens)
    spaces = [
        [jax.typeof(x).memory_space for x in jax.tree.leaves(s.layers)] for s in (state, later)
    ]
    assert jax.memory.Space.Host in spaces[1]
    # A state from a checkpoint may lie on the device, as that of jax 0.7 does on a CPU.
    assert spaces[0] in (spaces[1], [jax.memory.Space.Device] * len(spaces[0]))
    moved = jax.device_put(state, jax.memory.Space.Device)
    step = jax.jit(backward.value_and_step(loss, tx))
    chex.assert_trees_all_equal(step(params, layers, moved, tokens)[3], later)
    assert_same(*both(loss, tx, steps=3))


LOW = {
    "stochastic": adam_jax.round_stochastically(),
    "bfloat16": adam_jax.compensate("bfloat16"),
    "int8": adam_jax.compensate("int8"),
}


@pytest.mark.parametrize("how", LOW)
def test_bfloat16_parameters_and_a_rounding(how):
    tx = optax.chain(adam_jax.adamw(1e-2, **keeping("int8")), LOW[how])
    assert_same(*both(loss, tx, "bfloat16"))


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


CHAINS = {
    "a schedule": adam_jax.adam(
        optax.cosine_decay_schedule(1e-2, 10), lambda count: 1 - 0.5**count
    ),
    "injected": optax.inject_hyperparams(adam_jax.adam)(learning_rate=1e-2, b1=0.8),
    "masked decay": adam_jax.adamw(1e-2, mask=matrices),
    "fused": adam_jax.fuse(adam_jax.adamw(1e-2, **keeping("int8"))),
    "by group": optax.partition({True: adam_jax.adamw(1e-2), False: optax.set_to_zero()}, matrices),
    "clipped by blocks": optax.chain(optax.clip_by_block_rms(1e-3), adam_jax.adam(1e-2)),
    "clipped by the previous norm": optax.chain(
        backward.clip_by_previous_norm(1e-2), adam_jax.sgd(1.0)
    ),
}


@pytest.mark.parametrize("how", CHAINS)
def test_a_chain(how):
    assert_same(*both(loss, CHAINS[how]))


def test_another_chain_for_the_layers():
    assert_same(*both(loss, adam_jax.sgd(0.1), layers_tx=adam_jax.lamb(1e-2)))


def test_under_x64(x64):
    assert_same(*both(loss, adam_jax.adam(1e-2), "float64"))


def test_training_without_jit():
    params, layers, tokens = problem()
    tx = adam_jax.adam(1e-2)
    step = backward.value_and_step(loss, tx)
    carry = params, layers, backward.init(tx, params, layers)
    values = []
    for _ in range(3):
        value, *carry = step(*carry, tokens)
        values.append(float(value))
    assert values[2] < values[1] < values[0]


# --- From a run with all gradients at once --------------------------------------------------------

# The wide bias is kept in codes in the stack, in blocks across layers, and not in one layer.
STACK = {"kernel": (12, 64, 64), "bias": (12, 8), "wide bias": (12, 512)}
FROM = {
    "float32": (None, None),
    "int8": ("int8", "int8"),
    "means": (storage.block_mean(partial(storage.transformer_blocks, stacked=1)), "block_mean"),
    "rows": ("factored", "factored"),
}
PAIRS = [(name, "float32") for name in ("adam", "adamw", "amsgrad", "lion", "nadam")]
PAIRS += [("amsgrad", "int8"), ("lion", "int8"), ("nadam", "means"), ("adamw", "rows")]


def normal(rng, tree):
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


@pytest.mark.parametrize(("name", "how"), PAIRS)
def test_a_plain_state_goes_on_layer_by_layer(name, how):
    """The next updates are the plain run's: what is loaded is the same, whatever is then saved."""
    only = {"mu_storage"} if name == "lion" else {"mu_storage", "nu_storage"}
    tx, layers_tx = (
        getattr(adam_jax, name)(
            optax.linear_schedule(1e-2, 0.0, 10),
            **{k: v for k, v in keeping(*[how] * (how is not None)).items() if k in only},
        )
        for how in FROM[how]
    )
    in_layers, rng = adam_jax.stacked(layers_tx), np.random.default_rng(0)
    layers = normal(rng, {k: jax.ShapeDtypeStruct(shape, "float32") for k, shape in STACK.items()})
    state, update, update_layers = tx.init(layers), jax.jit(tx.update), jax.jit(in_layers.update)
    for _ in range(3):
        _, state = update(normal(rng, layers), state, layers)
    convert = jax.jit(lambda state: backward.from_plain(tx, layers, state, layers_tx))
    state_of_layers = convert(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state_of_layers, in_layers.init(layers))
    for _ in range(3 if how == "float32" else 1):
        grads = normal(rng, layers)
        due, state = update(grads, state, layers)
        found, state_of_layers = update_layers(grads, state_of_layers, layers)
        assert_close(found, due, "contracted")


def test_codes_of_a_plain_state_stay():
    """Within a layer they are not even rounded anew; where they cross layers, they are at first."""
    tx, params = adam_jax.adam(1e-2, **keeping("int8")), {"a": jnp.ones((12, 64, 64))}
    layers = {**params, "b": jnp.ones((12, 4096))}
    rng = np.random.default_rng(0)
    _, state = jax.jit(tx.update)(normal(rng, layers), jax.jit(tx.init)(layers), layers)
    (new, *_), (old, *_) = jax.jit(partial(backward.from_plain, tx))(layers, state), state
    for found, due in [(new.mu, old.mu), (new.nu, old.nu)]:
        chex.assert_trees_all_equal(found.codes["a"], due.codes["a"])
        chex.assert_trees_all_equal(found.scales["a"], due.scales["a"])
    assert old.mu.scales["b"].shape == (1, 4096)
    assert new.mu.scales["b"].shape == (12, 128)
    assert all(np.array_equal(of_layer, old.weights) for of_layer in new.weights)
    wide = adam_jax.adam(1e-2)
    into_codes = backward.from_plain(wide, layers, wide.init(layers), tx)
    chex.assert_trees_all_equal_shapes_and_dtypes(into_codes[0], new)


def test_a_plain_run_goes_on_in_the_backward_pass():
    """One state for all parameters, taken apart; injected rates, bfloat16 weights and residuals."""
    adam = optax.inject_hyperparams(adam_jax.adam, hyperparam_dtype=jnp.float32)
    tx = optax.chain(adam(learning_rate=1e-2), adam_jax.compensate("int8"))
    *params, tokens = problem("bfloat16")
    state = tx.init(params)

    @jax.jit
    def plain(params, state):
        value, grads = jax.value_and_grad(lambda params: loss(*params, tokens))(params)
        updates, state = tx.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    def of(number):
        is_pair = lambda x: isinstance(x, list)  # noqa: E731
        return jax.tree.map(lambda x: x[number] if is_pair(x) else x, state, is_leaf=is_pair)

    step = jax.jit(backward.value_and_step(loss, tx))
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            _, params, state = plain(params, state)
        layers_state = backward.from_plain(tx, params[1], of(1))
        start = backward.BackwardState(jnp.float32(0), of(0), layers_state)
        value, *found, new = step(*params, start, tokens)
        due_value, due, state = plain(params, state)
    assert value == due_value
    pairs = map(jax.tree.leaves, ((found, new[1:]), (due, (of(0), of(1)))))
    for x, y in zip(*pairs, strict=True):
        if x.dtype == jnp.bfloat16 or x.dtype == jnp.int8:
            assert np.mean(x != y) <= 1e-3
        else:
            assert_close(x, jnp.broadcast_to(y, x.shape), "layer")


def test_a_state_that_is_not_of_the_stack():
    layers = {"w": jnp.ones((3, 8))}
    adam, rows = adam_jax.adam(1e-2), optax.scale_by_factored_rms(min_dim_size_to_factor=8)
    with refused(ValueError, "mu w 3 2"):
        backward.from_plain(adam, layers, adam.init({"w": jnp.ones((2, 8))}))
    with refused(ValueError, "nu"):
        backward.from_plain(adam, layers, adam_jax.lion(1e-2).init(layers))
    with refused(ValueError, "layers_tx nu"):
        backward.from_plain(adam, layers, adam.init(layers), adam_jax.lion(1e-2))
    layers = {"w": jnp.ones((32, 16, 8))}  # Adafactor's rows and columns are of layers, then
    with refused(ValueError, "v_row adam_jax.backward.init"):
        backward.from_plain(rows, layers, rows.init(layers))


# --- What the loss may be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [None, jax.checkpoint_policies.dots_saveable], ids=["nothing", "products"]
)
def test_checkpoint_says_what_is_kept(policy):
    """Of a layer the forward scan keeps its input, and what the policy says; never weights."""
    tx, (params, layers, tokens) = adam_jax.sgd(0.1), problem()

    def kept(wrap):
        step = backward.value_and_step(partial(loss, wrap=wrap), tx)
        jaxpr = jax.make_jaxpr(step)(params, layers, backward.init(tx, params, layers), tokens)
        forward = next(e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan")
        return sorted(v.aval.shape for v in forward.outvars if v.aval.shape[:1] == (LAYERS,))

    x, h, cost = (LAYERS, 20, WIDTH), (LAYERS, 20, WIDTH), (LAYERS,)
    products = [] if policy is None else [h]
    wrap = partial(jax.checkpoint, policy=policy)
    assert kept(wrap) == [cost, x, *products]
    assert len(kept(lambda layer: layer)) > 4
    assert_same(*both(partial(loss, wrap=wrap), CHAINS["fused"]))


def test_other_arrays_along_the_layers():
    """Keys and numbers of layers; gates that have a gradient, and a carry of integers."""

    def gated(carry, x, *, scale):
        (x, number), (layer, key, gate) = carry, x
        keep = jax.random.bernoulli(key, 0.9, x.shape)
        new, cost = block(x, layer, scale=scale)
        return (jnp.where(keep, gate * new, x), number + 1), (cost, number)

    def loss(params, layers, tokens):
        x = params["embedding"][tokens]
        keys = jax.random.split(jax.random.key(0), LAYERS)
        gates = params["scale"][:LAYERS]
        (x, number), (costs, numbers) = backward.scan(
            partial(gated, scale=params["scale"]), (x, 0), (layers, keys, gates)
        )
        assert numbers.dtype == number.dtype == jnp.int32
        return jnp.mean(jnp.square(x)) + jnp.sum(costs * numbers.astype(costs.dtype))

    assert_same(*both(loss, adam_jax.adam(1e-2)))


def test_an_auxiliary_result():
    tx, (params, layers, tokens) = adam_jax.adam(1e-2), problem()

    def with_aux(*args):
        value = loss(*args)
        return value, {"twice": 2 * value}

    carry = params, layers, backward.init(tx, params, layers)
    value, *plain = jax.jit(backward.value_and_step(loss, tx))(*carry, tokens)
    (same, aux), *new = jax.jit(backward.value_and_step(with_aux, tx, has_aux=True))(*carry, tokens)
    chex.assert_trees_all_equal((same, aux["twice"], new), (value, 2 * value, plain))


def test_a_loss_that_is_not_finite_skips_the_step():
    """Decided by the loss, which is known before the backward pass."""
    finite = lambda step, value, **_: jnp.isfinite(value)  # noqa: E731
    tx = optax.conditionally_mask(adam_jax.adam(1e-2), finite, forward_extra_args=True)
    params, layers, tokens = problem()
    start = backward.init(tx, params, layers)

    def maybe(params, layers, tokens, factor):
        return loss(params, layers, tokens) * factor

    step = jax.jit(backward.value_and_step(maybe, tx))
    _, *same, state = step(params, layers, start, tokens, jnp.nan)
    chex.assert_trees_all_equal(same, [params, layers])
    chex.assert_trees_all_equal(state.layers.inner_state, start.layers.inner_state)
    _, moved, _, _ = step(params, layers, state, tokens, 1.0)
    assert not np.array_equal(moved["embedding"], params["embedding"])


# --- What is refused ------------------------------------------------------------------------------


def check_refused(names, loss=loss, tx=None, kind=ValueError, layers_tx=None):
    params, layers, tokens = problem()
    tx = adam_jax.adam(1e-2) if tx is None else tx
    step = backward.value_and_step(loss, tx, layers_tx)
    with refused(kind, names):
        jax.jit(step).lower(params, layers, backward.init(tx, params, layers, layers_tx), tokens)


@pytest.mark.parametrize("where", ["tx", "layers_tx"])
def test_a_chain_that_needs_all_gradients_is_refused_by_name(where):
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adam_jax.adam(1e-2))
    check_refused("clip_by_global_norm clip_by_previous_norm", **{where: clipped})
    check_refused("apply_if_finite", tx=optax.apply_if_finite(adam_jax.adam(1e-2), 3))


def test_a_loss_that_does_not_scan_the_layers():
    check_refused("scan layers", lambda params, layers, tokens: jnp.sum(params["embedding"]))


def test_a_leaf_that_is_not_scanned_is_named():
    def of_some(params, layers, tokens):
        some = {"up": layers["up"], "down": layers["down"]}
        x, _ = backward.scan(lambda x, w: (x @ w["up"], None), params["embedding"], some)
        return jnp.sum(x)

    check_refused("bias", of_some)


def test_a_loss_that_scans_twice():
    def twice(params, layers, tokens):
        return loss(params, layers, tokens) + loss(params, layers, tokens)

    check_refused("more than once", twice)


def test_a_loss_that_reads_the_layers_elsewhere():
    def decayed(params, layers, tokens):
        return loss(params, layers, tokens) + jnp.sum(jnp.square(layers["up"]))

    check_refused("LayerOutsideOfScan", decayed, kind=TypeError)


def test_a_loss_that_is_no_scalar():
    def vector(params, layers, tokens):
        return loss(params, layers, tokens) * jnp.ones(3)

    check_refused("scalar", vector, kind=TypeError)


def test_the_previous_norm_is_needed():
    stage = backward.clip_by_previous_norm(1.0)
    with pytest.raises(TypeError, match=r"optax\.clip_by_global_norm"):
        stage.update(jnp.ones(3), stage.init(None))
    for norm in (0.0, 0.5, jnp.nan):
        updates, _ = stage.update(jnp.ones(3), stage.init(None), grad_norm=norm)
        chex.assert_trees_all_equal(updates, jnp.ones(3))
    updates, _ = stage.update(jnp.ones(3), stage.init(None), grad_norm=jnp.inf)
    chex.assert_trees_all_equal(updates, jnp.zeros(3))


# --- Small batches accumulated in the moments -----------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_batches_accumulate_in_the_moments(k, x64):
    """m is that of the mean gradient; v that of the mean of the squares."""
    tx = optax.chain(
        adam_jax.scale_by_moments(backward.micro_decay(0.9, k), backward.micro_decay(0.99, k)),
        adam_jax.bias_correct(),
        adam_jax.scale_by_lr(backward.micro_rate(lambda step: 0.1 / (step.astype(float) + 1), k)),
    )
    rng = np.random.default_rng(0)
    params = start = jnp.asarray(rng.normal(size=5))
    state, m, v, due = tx.init(params), 0, 0, np.asarray(start)
    update = jax.jit(tx.update)
    for t in range(1, 11):
        grads = rng.normal(size=(k, 5))
        for grad in grads:
            before = params
            updates, state = update(jnp.asarray(grad), state, params)
            params = params + updates
        m, v = 0.9 * m + 0.1 * grads.mean(0), 0.99 * v + 0.01 * (grads**2).mean(0)
        direction = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        due = due - 0.1 / t * direction
        assert_close((state[0].mu, state[0].nu), (m, v), "algebra")
        assert_close(params, due, "moving")
        assert k == 1 or not np.array_equal(before, params)


@pytest.mark.parametrize("bad", [{"decay": 1.0, "k": 2}, {"decay": 0.9, "k": 0}])
def test_micro_decay_is_checked(bad):
    with pytest.raises(ValueError, match=r"^(decay|k) must be"):
        backward.micro_decay(**bad)


# --- A chain on a stack ---------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("name", ["lamb", "cautious_adamw", "adamw"])
def test_a_stack_is_its_layers(name, axis):
    tx = getattr(adam_jax, name)(1e-2)
    layers = problem()[1]
    layers = {"up": layers["up"], "down": layers["down"]}
    whole = jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), layers)
    of_stack = adam_jax.stacked(tx, axis)
    updates, state = jax.jit(of_stack.update)(whole, of_stack.init(whole), whole)
    for i in range(LAYERS):
        one = jax.tree.map(lambda x: x[i], layers)  # noqa: B023
        due, due_state = jax.jit(tx.update)(one, tx.init(one), one)
        found = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0)[i], updates)  # noqa: B023
        assert_close(found, due, "contracted")
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[i], state), due_state)  # noqa: B023


def test_a_stack_of_other_lengths_is_refused():
    tx = adam_jax.stacked(adam_jax.adam(1e-2))
    for params, match in [
        ({"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))}, r"3 layers \(\['a'\]\) and 4"),
        ({"a": jnp.ones(())}, r"\['a'\] of shape \(\) has no axis 0"),
    ]:
        with pytest.raises(ValueError, match=match):
            tx.init(params)


ADAM = adam_jax.adam(1e-2)
INJECTED = optax.inject_hyperparams(adam_jax.adam)(learning_rate=1e-2)
WRAPPED = {
    "masked": (optax.masked, ADAM, {"up": True, "bias": False, "down": True}),
    "all masked": (optax.masked, ADAM, {"up": False, "bias": False, "down": False}),
    "a group without leaves": (
        lambda tx, labels: optax.partition({"a": tx, "b": optax.sgd(0.1)}, labels),
        ADAM,
        {"up": "b", "bias": "b", "down": "b"},
    ),
    "accumulated": (optax.MultiSteps, ADAM, 2),
    "injected": (optax.chain, INJECTED),
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.usefixtures("promoting")  # optax's accumulation is not strict
def test_a_wrapper_in_a_stack_and_around_it(how):
    """Which goes around which makes no difference, with leaves that are None, twice and afresh."""
    wrap, tx, *options = WRAPPED[how]
    layers = {**problem()[1], "none": None}
    options = [{**x, "none": None} if isinstance(x, dict) else x for x in options]
    found, due = [], []
    for way, steps in [
        (adam_jax.stacked(wrap(tx, *options)), found),
        (wrap(adam_jax.stacked(tx), *options), due),
    ]:
        state, update = way.init(layers), jax.jit(way.update)
        for _ in range(3):
            updates, state = update(layers, state, layers)
            steps.append(updates)
        if how != "injected":  # whose rate of 0 would be one
            steps.append(update(layers, jax.tree.map(jnp.zeros_like, state), layers)[0])
            chex.assert_trees_all_equal(steps[0], steps[3])
    assert_close(found, due, "contracted")


def test_a_scalar_set_in_the_state_is_that_of_all_layers():
    params, layers, tokens = problem()
    state = backward.init(INJECTED, params, layers)
    step = jax.jit(backward.value_and_step(loss, INJECTED))
    update = jax.jit(adam_jax.stacked(INJECTED).update)
    rates = [0.5, jnp.float32(0.5), jnp.full(LAYERS, 0.5, jnp.float32)]
    states = [optax.tree.set(state, learning_rate=rate) for rate in rates]
    updates = [update(layers, s.layers, layers) for s in states]
    chex.assert_trees_all_equal(*updates)
    new = [step(params, layers, s._replace(params=states[1].params), tokens) for s in states]
    chex.assert_trees_all_equal(*new)
    assert np.max(np.abs(new[0][2]["up"] - layers["up"])) > 0.4


def test_a_stack_tells_which_parts_are_shaped_like_the_parameters():
    layers, tx = problem()[1], adam_jax.stacked(ADAM)
    marked = optax.tree_map_params(tx, lambda _: "moment", tx.init(layers))
    assert set(jax.tree.leaves((marked[0].mu, marked[0].nu))) == {"moment"}
    assert marked[0].count.shape == (LAYERS,)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    every_member_with_every_storage()
