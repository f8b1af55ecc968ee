"""How moments are kept: what is lost, what is not, and that nothing else changes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from chains import members
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from memory import CHOICES, bytes_per_parameter
from support import assert_close

import adam_jax
from adam_jax import storage
from adam_jax.storage import Leaf, Storage

SHAPE = (64, 128)
COLUMNS = storage.block_mean(lambda path, shape: (*shape[:-1], 1))

STORAGES = {
    "cast": storage.cast(jnp.bfloat16),
    "stochastic": storage.stochastic(jnp.bfloat16, seed=1),
    "stochastic float16": storage.stochastic(jnp.float16, seed=2),
    "int8": storage.int8(seed=3),
    "int4": storage.int4(seed=4),
    "factored": storage.factored(),
    "block_mean": COLUMNS,
}
each_storage = pytest.mark.parametrize("how", STORAGES.values(), ids=STORAGES.keys())


def at(moment, shape=SHAPE, count=0, index=0, path="w"):
    return Leaf(moment, path, shape, jnp.dtype("float32"), index, jnp.int32(count))


def kept_by(how, learning_rate=1e-2, **options):
    """adamw with both moments in a storage, or with the second where it is only for that."""
    mu = {} if how.only == "nu" else {"mu_storage": how}
    return adam_jax.adamw(learning_rate, nu_storage=how, **mu, **options)


def tree(seed=0, dtype="float32"):
    """Leaves that fit every storage, and leaves that do not: small, odd, complex, None."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": SHAPE, "stacked": (2, 64, 64), "bias": (128,), "odd": (4099,), "scalar": ()}
    leaves = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    return leaves | {"none": None}


def trained(tx, params, steps=3, update=None):
    update = jax.jit(tx.update) if update is None else update
    state = tx.init(params)
    for step in range(steps):
        grads = {name: tree(step + 1)[name] for name in params}
        grads = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# --- Memory ---------------------------------------------------------------------------------------

# Bytes per parameter of the GPT-2 tree, to the two digits of the claim: the state, and in all.
BYTES = {
    "float32": (8.00, 16.00),
    "bfloat16, to nearest": (4.00, 12.00),
    "bfloat16, at random": (4.00, 12.00),
    "8-bit": (2.13, 10.13),
    "4-bit": (1.07, 9.07),
    "8-bit m, factored v": (1.1, 9.1),
    "8-bit m, block-mean v": (1.1, 9.1),
    "float32, no rounding stage": (8.00, 12.00),
    "float32, round_stochastically": (8.00, 12.00),
    "float32, compensate bfloat16": (10.00, 14.00),
    "8-bit, compensate int8": (3.2, 7.2),
    "8-bit m, factored v, compensate int8": (2.2, 6.2),
}


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
def test_bytes_per_parameter(choice):
    state, total = bytes_per_parameter(choice)
    most_state, most_total = BYTES[choice.name]
    assert round(state, 2) <= most_state
    assert round(total, 2) <= most_total


def test_what_is_kept_of_each_leaf():
    params = tree() | {"complex": jnp.ones(SHAPE, "complex64")}
    state = kept_by(storage.int8()).init(params)[0]
    assert isinstance(state.mu["kernel"], storage.Blocks)
    assert isinstance(state.nu["stacked"], storage.Blocks)
    for name in ("bias", "odd", "scalar"):  # small, or not divided by the group
        assert state.mu[name].dtype == state.nu[name].dtype == jnp.float32
        assert state.mu[name].shape == params[name].shape
    assert state.mu["complex"].dtype == jnp.complex64
    assert state.nu["complex"].codes.dtype == jnp.uint8
    assert state.mu["none"] is None
    factors = kept_by(storage.factored()).init(params)[0].nu
    assert factors["kernel"].rows.shape == (64, 1)
    assert factors["kernel"].columns.shape == (1, 128)
    assert factors["stacked"].rows.shape == (2, 64, 1)
    assert factors["stacked"].columns.shape == (2, 1, 64)
    assert kept_by(COLUMNS).init(params)[0].nu["stacked"].shape == (1, 1, 64)


@each_storage
def test_shapes_and_dtypes_never_change(how):
    for dtype in ("float32", "bfloat16"):
        params = jax.tree.map(lambda p, d=dtype: p.astype(d), tree())
        tx = kept_by(how)
        state = tx.init(params)
        _, later = jax.eval_shape(tx.update, params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(later, state)
        _, later = jax.eval_shape(tx.update, tree(), state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(later, state)


# --- What is lost ---------------------------------------------------------------------------------


def magnitudes(rng, shape=SHAPE):
    """Numbers whose sizes differ by a few powers of ten between blocks and within them."""
    rows = np.exp(2 * rng.normal(size=(shape[0], 1)))
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape)) * rows).astype(np.float32)


def round_trip(how, moment, x, count=0):
    leaf = at(moment, x.shape, count)
    return np.asarray(how.load(how.save(jnp.asarray(x), leaf), leaf), np.float64)


# The largest error of one round trip, as a share of the largest magnitude in the block: half a
# step rounded to nearest, a whole one rounded at random. For a root of k steps a step is 2/k wide.
WORST = {
    ("cast", "mu"): 2**-8,
    ("cast", "nu"): 2**-8,
    ("stochastic", "mu"): 2**-7,
    ("stochastic", "nu"): 2**-7,
    ("stochastic float16", "mu"): 2**-10,
    ("stochastic float16", "nu"): 2**-10,
    ("int8", "mu"): 2 / 127 * 1.01,
    ("int8", "nu"): 2 / 256 * 1.01,
    ("int4", "mu"): 2 / 7 * 1.01,
    ("int4", "nu"): 2 / 16 * 1.01,
}


@pytest.mark.parametrize(("name", "moment"), WORST, ids=str)
def test_round_trip_error(name, moment):
    rng = np.random.default_rng(0)
    x = magnitudes(rng, (256, 128))
    x = np.clip(x, -100, 100) if "float16" in name else x
    x = np.square(x) if moment == "nu" else x
    blocks = np.abs(x.astype(np.float64)).reshape(256, -1, 64 if name == "int4" else 32)
    scale = np.broadcast_to(blocks.max(axis=-1, keepdims=True), blocks.shape).reshape(x.shape)
    error = np.abs(round_trip(STORAGES[name], moment, x) - x) / scale
    assert error.max() <= WORST[name, moment]
    assert error.max() > WORST[name, moment] / 4  # the bound is not a loose one


@pytest.mark.parametrize(
    "name", ["stochastic", "stochastic float16", "int8", "int4"], ids=lambda name: name
)
@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_rounding_at_random_is_right_on_the_mean(name, moment):
    """Over all elements and 500 draws each, and for every element alone."""
    rng = np.random.default_rng(0)
    x = magnitudes(rng)
    if "float16" in name:
        x = np.clip(x, -100, 100)
    if moment == "nu":
        x = np.square(x)
        if "int" in name:  # below the smallest code there is nothing to round down to
            top = x.reshape(-1, 64).max(axis=-1, keepdims=True).repeat(64, 1).reshape(x.shape)
            x = np.maximum(x, top / 255)
    how = STORAGES[name]
    draw = jax.jit(lambda count: how.load(how.save(x, at(moment, count=count)), at(moment)))
    draws = np.stack([np.asarray(draw(count), np.float64) for count in range(500)])
    error = draws - x
    deviation = np.sqrt(np.sum(np.var(error, axis=0)) / len(draws))
    assert abs(error.mean(axis=0).sum()) <= 4 * deviation
    ups = np.sum(error > 0, axis=0)
    common = (ups >= 50) & (ups <= 450)  # so that the mean of the draws is about normal
    assert common.mean() > 0.2
    z = error.mean(axis=0)[common] / (error.std(axis=0)[common] / np.sqrt(len(draws)))
    assert np.max(np.abs(z)) < 5


def followed(how, steps=5000):
    """The mean of v / v of float32 after gradients that halve on the way, b2 = 0.999."""
    tx = adam_jax.scale_by_moments(None, 0.999, nu_storage=how)
    exact = adam_jax.scale_by_moments(None, 0.999)
    scale = np.exp(0.5 * np.random.default_rng(0).normal(size=SHAPE)).astype(np.float32)

    def step(states, t):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), SHAPE)
        grad = noise * scale * jnp.where(t < steps // 2, 1.0, 0.5)
        kept, states = zip(*(s.update(grad, state) for s, state in zip((tx, exact), states)))  # noqa: B905
        return states, jnp.mean(kept[0].nu) / jnp.mean(kept[1].nu)

    states = (tx.init(jnp.zeros(SHAPE)), exact.init(jnp.zeros(SHAPE)))
    return jax.jit(lambda: jax.lax.scan(step, states, jnp.arange(steps))[1])()


def test_nu_is_followed_only_by_rounding_at_random():
    """bfloat16 rounded to nearest stalls, and so does an 8-bit code."""
    ratio = followed(storage.stochastic(jnp.bfloat16))
    assert np.max(np.abs(ratio - 1)) < 0.01
    assert np.max(np.abs(followed(storage.int8()) - 1)) < 0.01
    assert np.max(np.abs(followed(storage.cast(jnp.bfloat16)) - 1)) > 1.4


@given(
    st.lists(st.floats(2.0**-30, 2.0**30, width=32), min_size=64, max_size=64),
    st.sampled_from([2.0**-30, 1.0, 2.0**30]),
    st.sampled_from(["cast", "stochastic", "int8", "int4", "factored", "block_mean"]),
)
@settings(max_examples=50)
def test_nu_is_never_zero(roots, unit, name):
    """Not for one element that is not zero, however small it is beside its neighbours."""
    x = np.tile(np.square(unit * np.asarray(roots, np.float32)), (128, 1)).astype(np.float32)
    assert np.all(round_trip(STORAGES[name], "nu", x) > 0)


def test_an_affine_code_would_be_zero():
    """So that the test above can fail: the published divergence of 8-bit Adam."""

    def save(moment, leaf):
        return jnp.round(moment / jnp.max(moment) * 255).astype(jnp.uint8), jnp.max(moment)

    affine = Storage(save, load=lambda stored, leaf: stored[0] * stored[1] / np.float32(255))
    with jax.numpy_dtype_promotion("standard"):
        kept = round_trip(affine, "nu", np.square(magnitudes(np.random.default_rng(0))))
    assert np.mean(kept == 0) > 0.5


@each_storage
def test_zeros_stay_zeros_and_bad_numbers_show(how):
    moment = how.only or "mu"
    assert not np.any(round_trip(how, moment, np.zeros(SHAPE, np.float32)))
    for bad in (np.nan, np.inf):
        x = np.ones(SHAPE, np.float32)
        x[3, 5] = bad
        assert not np.isfinite(round_trip(how, moment, x)[3, 5])


# --- Published estimators -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 192), (3, 128, 160), (160, 3, 128)])
def test_factored_is_adafactor(shape):
    """optax's scale_by_factored_rms: the same row and column means, the same update."""
    theirs = optax.scale_by_factored_rms(decay_rate=0.8, epsilon=0.0)
    ours = adam_jax.scale_by_moments(
        None, lambda count: 1 - (count.astype(float) + 1) ** -0.8, nu_storage=storage.factored()
    )
    how, params, rng = storage.factored(), jnp.zeros(shape), np.random.default_rng(0)
    state, their_state = ours.init(params), theirs.init(params)
    for step in range(20):
        grad = jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=shape)), jnp.float32)
        _, state = ours.update(grad, state)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            update, their_state = theirs.update(grad, their_state, params)
        assert_close(state.nu.rows.squeeze(), their_state.v_row.squeeze(), "float32 mean")
        assert_close(state.nu.columns.squeeze(), their_state.v_col.squeeze(), "float32 mean")
        estimate = how.load(state.nu, at("nu", shape, step))
        assert_close(grad / jnp.sqrt(estimate), update, "float32 mean")


def test_factored_forgets_nothing_it_shows():
    """save(load(save(v))) is save(v)."""
    x = np.square(magnitudes(np.random.default_rng(0)))
    once = round_trip(storage.factored(), "nu", x)
    twice = round_trip(storage.factored(), "nu", once.astype(np.float32))
    assert_close(twice, once, "float32 mean")


def adam_mini(grads, block, lr=1e-2, b1=0.9, b2=0.999, eps=1e-8, mean_first=True):
    """A transcription of algorithm 1 to NumPy: blocks of columns (n, k)."""
    n, k = block
    blocks = lambda x: x.reshape(x.shape[0] // n, n, x.shape[1] // k, k)  # noqa: E731
    m, v = np.zeros_like(grads[0]), np.zeros_like(blocks(grads[0])[:, :1, :, :1])
    updates = []
    for t, g in enumerate(grads, start=1):
        m = (1 - b1) * g + b1 * m
        square = blocks(np.square(g))
        mean = square.mean(axis=(1, 3), keepdims=True)
        seen = (1 - b2) * (mean if mean_first else square) + b2 * v
        v = (1 - b2) * mean + b2 * v
        step = blocks(m / (1 - b1**t)) / (np.sqrt(seen / (1 - b2**t)) + eps)
        updates.append(-lr * step.reshape(g.shape))
    return updates, v.squeeze(axis=(1, 3))


@pytest.mark.parametrize("mean_first", [False, True], ids=["squares", "means"])
@pytest.mark.parametrize("block", [(64, 1), (1, 128), (64, 32)], ids=["columns", "rows", "heads"])
def test_block_mean_is_adam_mini(x64, block, mean_first):
    """What is kept always is Adam-mini's; the step, with a rule that averages first, is too."""
    how = storage.block_mean(lambda path, shape: block)

    def averaged(grad, mu, nu, decay):
        return how.load(how.save(adam_jax.squared(grad, mu, nu, decay), at("nu")), at("nu"))

    tx = optax.chain(
        adam_jax.scale_by_moments(second_moment=averaged if mean_first else None, nu_storage=how),
        adam_jax.bias_correct(),
        adam_jax.scale_by_lr(1e-2),
    )
    rng = np.random.default_rng(0)
    grads = [magnitudes(rng).astype(np.float64) for _ in range(10)]
    expected, v = adam_mini(grads, block, mean_first=mean_first)
    state = tx.init(jnp.zeros(SHAPE, "float64"))
    for grad, update in zip(grads, expected, strict=True):
        ours, state = tx.update(jnp.asarray(grad), state)
        assert_close(ours, update, "reference")
    assert_close(state[0].nu, v, "algebra")


def test_default_blocks():
    blocks = storage.transformer_blocks
    assert blocks("embedder/embedding", (100, 64)) == (1, 64)
    assert blocks("wte", (100, 64)) == (1, 64)
    assert blocks("layers/0/attention/key/kernel/value", (64, 4, 16)) == (64, 1, 16)
    assert blocks("layers/0/attention/value/kernel", (64, 4, 16)) == (64, 4, 1)
    assert blocks("layers/0/attention/out/kernel", (4, 16, 64)) == (4, 16, 1)
    assert blocks("conv/kernel", (3, 3, 64, 128)) == (3, 3, 64, 1)
    assert blocks("norm/scale", (5000,)) is None
    state = adam_jax.adam(1e-3, nu_storage=storage.block_mean()).init(
        {"embed": jnp.zeros((100, 64)), "mlp": jnp.zeros((64, 100)), "bias": jnp.zeros(5000)}
    )
    shapes = jax.tree.map(jnp.shape, state[0].nu, is_leaf=lambda x: hasattr(x, "shape"))
    assert shapes == {"embed": (100, 1), "mlp": (1, 100), "bias": (5000,)}


# --- Randomness -----------------------------------------------------------------------------------


def test_random_bits_are_uniform_and_independent():
    shape = (1000, 100)
    draws = [
        np.asarray(storage.uniform(storage.random_bits(seed, at(moment, shape, count, index))))
        for seed, moment, count, index in [
            (0, "mu", 0, 0), (1, "mu", 0, 0), (-1, "mu", 0, 0), (0, "nu", 0, 0), (0, "mu", 1, 0),
            (0, "mu", 2, 0), (0, "mu", 0, 1), (0, "mu", 10**6, 7),
        ]
    ]  # fmt: skip
    n = draws[0].size
    for u in draws:
        assert u.min() >= 0
        assert u.max() < 1
        counts = np.histogram(u, 100, (0, 1))[0]
        assert np.sum((counts - n / 100) ** 2 / (n / 100)) < 160  # chi-square, 99 degrees: p 1e-4
        for neighbour in (u[1:].ravel(), u[:, 1:].ravel()):
            before = u[:-1].ravel() if neighbour.size == u[1:].size else u[:, :-1].ravel()
            assert abs(np.corrcoef(before, neighbour)[0, 1]) < 4 / np.sqrt(neighbour.size)
    correlation = np.corrcoef([u.ravel() for u in draws]) - np.eye(len(draws))
    assert np.max(np.abs(correlation)) < 4.5 / np.sqrt(n)


# --- Nothing else changes -------------------------------------------------------------------------


@each_storage
def test_the_step_uses_the_moment_before_it_is_saved(how):
    """So the first step is float32's."""
    params = tree()
    first = lambda tx: tx.update(params, tx.init(params), params)[0]  # noqa: E731
    with_storage, plain = first(kept_by(how)), first(adam_jax.adamw(1e-2))
    assert_close(with_storage, plain, "float32 mean")


def test_init_leaves_nothing_to_compute_in_compilation():
    """XLA took 50 s to reduce the zeros of a large leaf to its scales before it ran anything."""
    init = jax.jit(kept_by(storage.int8()).init).lower(jnp.ones((256, 256))).compile()
    assert " reduce(" in init.as_text()


@each_storage
def test_jit_scan_and_vmap(how):
    tx, params = kept_by(how), tree()
    jitted, state = trained(tx, params)
    assert_close(jitted, trained(tx, params, update=tx.update)[0], "contracted")
    grads = jax.tree.map(lambda *g: jnp.stack(g), *(tree(step + 1) for step in range(3)))

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned, _ = jax.jit(lambda c: jax.lax.scan(step, c, grads))((params, tx.init(params)))
    assert_close(scanned[0], jitted, "contracted")
    chex.assert_trees_all_equal_shapes_and_dtypes(scanned[1], state)
    both = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    states = jax.vmap(tx.init)(both)
    updates, _ = jax.vmap(tx.update)(both, states, both)
    one, _ = tx.update(params, tx.init(params), params)
    assert_close(jax.tree.map(lambda u: u[0], updates), one, "contracted")


@each_storage
def test_eight_devices(how):
    """Rows or columns on eight devices: the numbers of one, and the state stays in parts."""
    cpus = np.array(jax.devices("cpu"))
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(64, 512)), "float32"), "bias": jnp.ones(512)}
    tx = kept_by(how)
    update = jax.jit(tx.update)

    def three_steps(place):
        now = jax.device_put(params, place)
        state = tx.init(now)
        for step in range(1, 4):
            grads = jax.tree.map(lambda p, s=step: jnp.sin(s * p), now)
            updates, state = update(grads, state, now)
            now = optax.apply_updates(now, updates)
        return now, state

    alone, alone_state = three_steps(cpus[0])
    for spec in (PartitionSpec(None, "data"), PartitionSpec("data")):
        mesh = Mesh(cpus, ("data",))
        place = {
            "kernel": NamedSharding(mesh, spec),
            "bias": NamedSharding(mesh, PartitionSpec("data")),
        }
        together, state = three_steps(place)
        assert_close(jax.device_get(together), jax.device_get(alone), "contracted")
        if how.only is None:
            for part in jax.tree.leaves(state[0].mu["kernel"]):
                assert part.sharding.is_equivalent_to(place["kernel"], part.ndim)
            mu, alone_mu = (
                np.asarray(how.load(jax.device_get(s[0].mu["kernel"]), at("mu", (64, 512))))
                for s in (state, alone_state)
            )
            assert np.mean(mu != alone_mu) < 1e-3  # where a contraction changed the last bit


@each_storage
def test_checkpoint_round_trip(how, tmp_path):
    tx, params = kept_by(how), {k: v for k, v in tree().items() if v is not None}
    _, state = tx.update(params, tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(
        tx.update(params, restored, params), tx.update(params, state, params)
    )


@each_storage
def test_wrappers(how):
    """The same numbers inside optax's wrappers."""
    params = {name: leaf for name, leaf in tree().items() if leaf is not None}
    plain, _ = trained(kept_by(how), params)
    labels = dict.fromkeys(params, "a")
    wrapped = {
        "MultiSteps": optax.MultiSteps(kept_by(how), 1).gradient_transformation(),
        "partition": optax.partition({"a": kept_by(how), "b": optax.sgd(1.0)}, labels),
        "masked": optax.masked(kept_by(how), dict.fromkeys(params, True)),
        "apply_if_finite": optax.apply_if_finite(kept_by(how), 3),
    }
    grads = [{name: tree(step + 1)[name] for name in params} for step in range(3)]
    for name, tx in wrapped.items():
        now, state, update = params, tx.init(params), jax.jit(tx.update)
        with jax.numpy_dtype_promotion("standard"):
            for grad in grads:
                updates, state = update(grad, state, now)
                now = optax.apply_updates(now, updates)
        try:
            assert_close(now, plain, "contracted")
        except AssertionError as error:
            raise AssertionError(name) from error


@each_storage
def test_inject_hyperparams_and_map_params(how):
    mu = {} if how.only else {"mu_storage": how}
    tx = optax.inject_hyperparams(adam_jax.adamw)(1e-2, nu_storage=how, **mu)
    params = tree()
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(params, state, params)
    plain = kept_by(how)
    assert_close(updates, plain.update(params, plain.init(params), params)[0], "float32 rate")
    zeroed = optax.tree.map_params(plain, jnp.zeros_like, plain.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(zeroed, plain.init(params))


TAKING = {
    name: (factory, [moment for moment in ("mu", "nu") if f"{moment}_storage" in names])
    for name, factory in members().items()
    if (names := factory.__code__.co_varnames[: factory.__code__.co_argcount
        + factory.__code__.co_kwonlyargcount])
}  # fmt: skip


@pytest.mark.parametrize("name", TAKING)
def test_every_member_takes_them(name):
    """And keeps nothing of a large leaf in more than 8 bits, except descent with optax.trace."""
    factory, moments = TAKING[name]
    if not moments:
        assert name in ("sgd", "momentum", "nesterov")
        return
    tx = factory(1e-2, **{f"{moment}_storage": storage.int8() for moment in moments})
    params = {"kernel": jnp.ones(SHAPE)}
    state = tx.init(params)
    assert all(leaf.size < 4096 or leaf.dtype.itemsize == 1 for leaf in jax.tree.leaves(state))
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params)
    assert np.all(np.isfinite(updates["kernel"]))


@each_storage
def test_export_for_cpu_cuda_and_tpu(how):
    tx, params = kept_by(how), {"kernel": jnp.ones(SHAPE)}
    arguments, structure = jax.tree.flatten((params, tx.init(params), params))
    step = jax.jit(lambda *leaves: jax.tree.leaves(tx.update(*structure.unflatten(leaves))))
    exported = export.export(step, platforms=["cpu", "cuda", "tpu"])(*arguments)
    assert_close(exported.call(*arguments), step(*arguments), "contracted")


def test_a_storage_of_ones_own():
    """It sees where its moment is, and decides what it is for."""
    seen = []

    def fits(leaf):
        seen.append((leaf.moment, leaf.path, leaf.shape, leaf.index))
        return leaf.path.endswith("kernel")

    half = Storage(
        save=lambda moment, leaf: {"half": moment.astype(jnp.float16)},
        load=lambda stored, leaf: stored["half"].astype(leaf.dtype),
        fits=fits,
    )
    params = {"dense": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}}
    tx = adam_jax.adam(1e-2, mu_storage=half)
    updates, state = tx.update(params, tx.init(params))
    assert state[0].mu["dense"]["kernel"]["half"].dtype == jnp.float16
    assert state[0].mu["dense"]["bias"].dtype == jnp.float32
    assert ("mu", "dense/bias", (3,), 0) in seen
    assert ("mu", "dense/kernel", (2, 3), 1) in seen
    assert_close(updates["dense"]["bias"], -1e-2 * np.ones(3), "contracted")


ADAM8 = adam_jax.adam(1e-3, mu_storage=storage.int8())

WRONG = {
    "the factory": (
        lambda: adam_jax.adam(1e-3, mu_storage=storage.int8),
        TypeError,
        "mu_storage must be a Storage, such as adam_jax.storage.int8",
    ),
    "two ways": (
        lambda: adam_jax.adam(1e-3, nu_dtype="bfloat16", nu_storage=storage.int8()),
        ValueError,
        "nu_storage and nu_dtype both say how to keep the moment: give one",
    ),
    "factored m": (
        lambda: adam_jax.adam(1e-3, mu_storage=storage.factored()),
        ValueError,
        "mu_storage got a storage that is for nu only",
    ),
    "block-mean m": (
        lambda: adam_jax.lion(1e-3, mu_storage=storage.block_mean()),
        ValueError,
        "mu_storage got a storage that is for nu only",
    ),
    "cast to an integer": (lambda: storage.cast("int8"), ValueError, "dtype must be a floating"),
    "stochastic float32": (
        lambda: storage.stochastic("float32"),
        ValueError,
        "dtype must have fewer than 32 bits, got float32: use cast",
    ),
    "a seed of 1.5": (lambda: storage.int8(seed=1.5), TypeError, "seed must be an integer"),
    "a group of 0": (lambda: storage.int8(0), ValueError, "group must be positive, got 0"),
    "an odd block": (lambda: storage.int4(33), ValueError, "block must be positive and even"),
    "a block of 6.4": (lambda: storage.int4(6.4), TypeError, "block must be an integer, got 6.4"),
    "blocks of 64": (lambda: storage.block_mean(64), TypeError, "blocks must be a function"),
    "blocks of another rank": (
        lambda: adam_jax.adam(1e-3, nu_storage=storage.block_mean(lambda p, s: (1,))).init(
            {"w": jnp.ones(SHAPE)}
        ),
        ValueError,
        r"blocks\('w', \(64, 128\)\) must be a shape of 2 axes, got \(1,\)",
    ),
    "a missing gradient": (
        lambda: ADAM8.update({}, ADAM8.init({"w": jnp.ones(SHAPE)})),
        ValueError,
        r"gradients that do not match the parameters of init\(\): the leaf at \['w'\]",
    ),
    "another shape": (
        lambda: ADAM8.update({"w": jnp.ones((32, 256))}, ADAM8.init({"w": jnp.ones(SHAPE)})),
        ValueError,
        r"gradients that do not match the parameters of init\(\): the leaf at \['w'\]",
    ),
    "a state of another storage": (
        lambda: ADAM8.update(jnp.ones(SHAPE), adam_jax.adam(1e-3).init(jnp.ones(SHAPE))),
        ValueError,
        r"do not match the parameters of init\(\)",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_wrong_calls(case):
    call, error, message = case
    with pytest.raises(error, match=message):
        call()
