"""How moments are kept: what is lost, what is not, and that nothing else changes."""

import functools
import math
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tables
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from support import assert_close, mesh_of, nbytes, refused
from tables import MEMBERS, keeping

import adam_jax
from adam_jax import storage
from adam_jax._random import random_bits, uniform
from adam_jax.storage import Blocks, Leaf, Storage

SHAPE = (70, 65)  # the last block of 32 or 64 rows is a partial one
COLUMNS = storage.block_mean(lambda path, shape: (*shape[:-1], 1))
ROWS = storage.block_mean(lambda path, shape: (*(1 for _ in shape[:-1]), shape[-1]))

STORAGES = tables.STORAGES | {
    "stochastic float16": storage.stochastic(jnp.float16),
    "block_mean": COLUMNS,
}
each_storage = pytest.mark.parametrize("name", STORAGES)

# How m and v are kept in the tests that compile a step: each storage for each moment it is for.
PAIRS = [
    ("int8", "factored"),
    ("int4", "block_mean"),
    ("stochastic", "int8"),
    ("stochastic float16", "int4"),
    ("cast", "stochastic"),
]
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=", ".join)


def at(moment, shape=SHAPE, count=0, index=0, path="w"):
    return Leaf(moment, path, shape, jnp.dtype("float32"), index, jnp.int32(count))


def kept_in(pair, **options):
    return adam_jax.adamw(1e-2, **keeping(*(STORAGES[name] for name in pair)), **options)


def kept_by(how, **options):
    """adamw with both moments in a storage, or with the one that it is for."""
    return adam_jax.adamw(1e-2, **keeping(how), **options)


def tree(seed=0, dtype="float32"):
    """Leaves that fit every storage, and leaves that do not: small, None."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": SHAPE, "stacked": (2, 64, 33), "bias": (128,), "odd": (4099,), "scalar": ()}
    leaves = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    return leaves | {"none": None}


def few(seed=0):
    """A smaller tree, for what is compiled."""
    return {name: tree(seed)[name] for name in ("kernel", "bias", "none")}


@functools.cache
def runner(pair):
    """The optimizer of a pair, with `init` and `update` compiled once for all tests."""
    tx = kept_in(pair)
    return tx, jax.jit(tx.init), jax.jit(tx.update)


def trained(init, update, params, steps=2):
    state = init(params)
    for step in range(steps):
        grads = few(step + 1)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def wide(x):
    return np.asarray(x, np.float64)


def shapes_of(tree):
    return jax.tree.map(lambda leaf: (*leaf.shape, str(leaf.dtype)), tree)


# --- On the host ----------------------------------------------------------------------------------

INNER = {"float32": None, "bfloat16": jnp.bfloat16, "int8": storage.int8()}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("jit", [jax.jit, lambda fn: fn], ids=["jit", "no jit"])
def test_on_the_host_it_is_the_inner_storage(inner, jit):
    """The same weights and state, and a state of one goes on in the other."""
    here = kept_by(inner)
    there = adam_jax.adamw(1e-2, **keeping(storage.on_host(inner)))
    due = trained(jit(here.init), jit(here.update), few())
    found = trained(jit(there.init), jit(there.update), few())
    jax.tree.map(np.testing.assert_array_equal, found, due)
    restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), found[1])  # to the device
    for state, tx in ((due[1], there), (restored, here)):
        updates, _ = jit(tx.update)(few(9), state, due[0])
        jax.tree.map(
            np.testing.assert_array_equal, updates, jit(here.update)(few(9), due[1], due[0])[0]
        )


def test_what_lies_on_the_host():
    """Large leaves, as the type of a state says; small ones stay."""
    tx = adam_jax.adamw(1e-2, **keeping(storage.on_host(storage.int8())))
    params = jax.device_put(few(), NamedSharding(mesh_of(x=1), PartitionSpec()))
    codes, scales, whole = adam_jax.state_shardings(tx, params)[0].mu
    kinds = [each["kernel"].memory_kind for each in (codes, scales)]
    assert kinds == ["pinned_host", "pinned_host"]
    assert whole["bias"].memory_kind != "pinned_host"
    with refused(ValueError, "inner"):
        storage.on_host("codes")


# --- Memory ---------------------------------------------------------------------------------------


def placeholder(shape):
    """In the place of a part that a leaf does not have: for up to 64 devices along each axis."""
    most = max(math.prod(shape) // 64, 64)
    tried = ([math.gcd(length, 2**power) for length in shape] for power in range(6, -1, -1))
    return (*next(lengths for lengths in tried if math.prod(lengths) <= most), "bool")


def test_what_is_kept_of_each_leaf():
    params = tree() | {"complex": jnp.ones(SHAPE, "complex64")}
    state_of = lambda tx: jax.eval_shape(tx.init, params)[0]  # noqa: E731
    nothing = {name: placeholder(p.shape) for name, p in params.items() if p is not None}
    state = state_of(kept_by(storage.int8()))
    for blocks, code in ((state.mu, "int8"), (state.nu, "uint8")):
        assert isinstance(blocks, storage.Blocks)
        for part in blocks:
            assert part.keys() == params.keys()
        assert shapes_of(blocks.codes) == {
            "kernel": (*SHAPE, code),
            "stacked": (2, 64, 33, code),
            "odd": (4099, code),
            "complex": nothing["complex"] if blocks is state.mu else (*SHAPE, code),
            "bias": nothing["bias"], "scalar": nothing["scalar"], "none": None,
        }  # fmt: skip
    assert shapes_of(state.nu.scales) == {
        "kernel": (3, 65, "bfloat16"),
        "stacked": (2, 2, 33, "bfloat16"),
        "odd": (129, "bfloat16"),
        "complex": (3, 65, "bfloat16"),
        "bias": nothing["bias"], "scalar": nothing["scalar"], "none": None,
    }  # fmt: skip
    small = {"bias": (128, "float32"), "scalar": ("float32",), "none": None}
    large = {name: nothing[name] for name in ("kernel", "stacked", "odd", "complex")}
    assert shapes_of(state.nu.whole) == large | small
    assert shapes_of(state.mu.whole) == large | small | {"complex": (*SHAPE, "complex64")}
    state = state_of(kept_by(storage.int4()))
    assert shapes_of(state.mu.codes)["odd"] == (2050, "uint8")
    factors = state_of(kept_by(storage.factored())).nu
    assert shapes_of(factors.rows) == {
        "kernel": (1, 65, "float32"), "stacked": (2, 1, 33, "float32"),
        "complex": (1, 65, "float32"), "odd": nothing["odd"], "bias": nothing["bias"],
        "scalar": nothing["scalar"], "none": None,
    }  # fmt: skip
    assert shapes_of(factors.columns)["kernel"] == (70, 1, "float32")
    assert shapes_of(factors.columns)["stacked"] == (2, 64, 1, "float32")
    assert shapes_of(factors.whole)["odd"] == (4099, "float32")
    assert shapes_of(state_of(kept_by(COLUMNS)).nu)["stacked"] == (1, 1, 33, "float32")
    half = state_of(kept_by(storage.cast("bfloat16"), b1=None)).nu
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}  # small ones too


@pytest.mark.parametrize("how", [storage.int8(), storage.int4()], ids=["int8", "int4"])
def test_large_leaves_keep_codes(how):
    """Whatever their shape is: an embedding of 50,257 rows is a third of GPT-2."""
    large = [
        (50257, 768), (768, 50257), (3, 3, 256, 256), (7, 7, 3, 64), (12, 768, 3072), (4096,),
        (768, 10),
    ]  # fmt: skip
    small = [(4095,), (63, 65), (3, 3, 3, 64), ()]
    for shape in large + small:
        kept = jax.eval_shape(kept_by(how).init, jax.ShapeDtypeStruct(shape, "float32"))[0]
        for blocks in (kept.mu, kept.nu):
            if shape in small:
                nothing = placeholder(shape)
                assert shapes_of(blocks) == storage.Blocks(nothing, nothing, (*shape, "float32"))
                continue
            assert blocks.whole.dtype == bool
            assert blocks.codes.dtype.itemsize == 1
            assert blocks.codes.size <= math.prod(shape)
            assert nbytes(blocks) < 2 * math.prod(shape)


THIN = [
    (3, 3, 1, 1024), (4, 1, 4096), (2048, 1, 128), (4096, 1, 128), (1, 50000), (50000, 1),
    (16, 16, 3, 768), (256, 128, 3, 3), (7, 7, 3, 64), (8, 8, 8, 8), (9, 7, 11, 11), (11, 5000),
    (1, 1, 1, 8, 8, 8, 9), (5000, 11), (11, 11, 11, 1, 11), (4096, 1, 1, 1), (12, 768),
]  # fmt: skip
CODES = {"int8": 1.2, "int4": 0.7}  # bytes for each element, of any large leaf


def bytes_of_codes(how, shape):
    """What each moment keeps of a leaf, for each element."""
    kept = jax.eval_shape(kept_by(how).init, jax.ShapeDtypeStruct(shape, "float32"))[0]
    for blocks in (kept.mu, kept.nu):
        assert blocks.whole.dtype == bool
        assert len(blocks.codes.shape) == len(blocks.scales.shape) == len(shape)
        if blocks.codes.size == math.prod(shape):
            assert blocks.codes.shape == shape
        assert blocks.whole.size <= math.prod(shape) / 64  # a placeholder
    return nbytes((kept.nu.codes, kept.nu.scales)) / math.prod(shape)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("shape", THIN, ids=str)
def test_thin_leaves_keep_few_bytes(shape, name):
    """Short axes, and axes of length 1: blocks of a few elements would be mostly scales."""
    assert bytes_of_codes(STORAGES[name], shape) < CODES[name]


@given(st.lists(st.integers(1, 70), min_size=1, max_size=5), st.integers(0, 4))
@settings(max_examples=60)
def test_every_large_leaf_keeps_few_bytes(lengths, longer):
    """One of the axes is made so long that the leaf is large."""
    axis = longer % len(lengths)
    lengths[axis] *= -(-4096 // math.prod(lengths))
    for name, most in CODES.items():
        assert bytes_of_codes(STORAGES[name], tuple(lengths)) < most


def dense(n, m):
    return [(n, m), (m,)]


def gpt2():
    """124.4 M parameters."""
    width, norm = 768, [(768,), (768,)]
    attention = [*dense(width, 3 * width), *dense(width, width)]
    block = [*norm, *attention, *norm, *dense(width, 4 * width), *dense(4 * width, width)]
    return [(50257, width), (1024, width), *(12 * block), *norm]


def resnet50():
    """25.6 M parameters."""
    convolutions, inputs = [(7, 7, 3, 64)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        convolutions.append((1, 1, inputs, 4 * width))
        for _ in range(blocks):
            convolutions += [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            inputs = 4 * width
    norms = [shape[-1:] for shape in convolutions for _ in ("scale", "bias")]
    return [*convolutions, *norms, *dense(2048, 1000)]


def vit():
    """ViT-B/16 with Flax's shapes: 86.6 M parameters."""
    width, norm, heads = 768, [(768,), (768,)], (12, 64)
    attention = [*(3 * [(width, *heads), heads]), (*heads, width), (width,)]
    block = [*norm, *attention, *norm, *dense(width, 3072), *dense(3072, width)]
    patches = [(16, 16, 3, width), (width,), (1, 197, width), (1, 1, width)]
    return [*patches, *(12 * block), *norm, *dense(width, 1000)]


def llama():
    """LLaMA 7B: 6.7 G parameters."""
    width, hidden = 4096, 11008
    block = [*(4 * [(width, width)]), *(2 * [(width, hidden)]), (hidden, width), *(2 * [(width,)])]
    return [(32000, width), *(32 * block), (width,), (width, 32000)]


LEAST = {gpt2: 124e6, resnet50: 25.5e6, vit: 86.5e6, llama: 6.7e9}  # parameters


@pytest.mark.parametrize("model", LEAST, ids=lambda model: model.__name__)
def test_little_of_a_model_stays_whole(model):
    """Less than half a percent of the parameters, though most of the leaves of some models."""
    shapes = Counter(model())
    params = {str(shape): jax.ShapeDtypeStruct(shape, "float32") for shape in shapes}
    whole = jax.eval_shape(kept_by(storage.int8()).init, params)[0].nu.whole
    alone = sum(math.prod(s) * n for s, n in shapes.items() if whole[str(s)].dtype != bool)
    everything = sum(math.prod(shape) * n for shape, n in shapes.items())
    assert LEAST[model] < everything
    assert alone / everything < 0.005


def test_report():
    """The bytes are those of the state; nothing is allocated."""
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")  # noqa: E731
    layer = {"ln_1": {"scale": leaf(768)}, "mlp": leaf(768, 3072)}
    params = {"wte": leaf(50257, 768), "h": {"0": layer}, "none": None}
    for how in (None, "bfloat16", storage.int8(), storage.factored(), storage.block_mean()):
        text = storage.report(how, params)
        state = jax.eval_shape(adam_jax.scale_by_moments(nu_storage=how).init, params)
        *lines, last = text.splitlines()
        assert len(lines) == len(jax.tree.leaves(params))
        kept = nbytes([leaf for leaf in jax.tree.leaves(state.nu) if leaf.dtype != bool])
        total = f"40,957,440 parameters in {kept:,} bytes: "
        assert last.startswith(total)
        each = [int(line.split(" bytes")[0].split()[-1].replace(",", "")) for line in lines]
        assert sum(each) == kept
    by_path = {
        line.split()[0]: line for line in storage.report(storage.int8(), params).splitlines()
    }
    assert "[50257,768]  codes uint8[50257,768] + scales bfloat16[1571,768]" in by_path["wte"]
    assert by_path["wte"].endswith("41,010,432 bytes  1.06 per element")
    assert "whole float32[768] " in by_path["h/0/ln_1/scale"]
    assert "codes int8[" in storage.report(storage.int8(), params, "mu")
    assert storage.report("bfloat16", params).endswith("2.00 per parameter, 0.00% whole")
    assert storage.report(None, params).endswith("4.00 per parameter, 100.00% whole")
    alone = storage.report(storage.int4(), jnp.ones(4096))
    assert alone.startswith("[4096]  codes uint8[2048] + scales bfloat16[64]  2,176 bytes")
    assert storage.report(storage.int8(), {}).startswith("0 parameters in 0 bytes")
    with refused(ValueError, "mu_storage nu"):
        storage.report(storage.factored(), params, "mu")
    with refused(TypeError, "['i'] int32"):
        storage.report(storage.int8(), {"i": jnp.arange(3)})


@each_pair
def test_shapes_and_dtypes_never_change(pair):
    """And a state of scalars, of no elements, of small leaves only or of none at all is one."""
    tx = kept_in(pair)
    empty = {"rows": jnp.zeros((0, 3)), "columns": jnp.zeros((4096, 0))}
    small = {"bias": jnp.ones(3), "kernel": jnp.ones((2, 2))}
    for params in (tree(), tree(dtype="bfloat16"), empty, small, {}, {"none": None}, jnp.ones(())):
        state = jax.eval_shape(tx.init, params)
        _, later = jax.eval_shape(tx.update, params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(later, state)
    state = jax.eval_shape(tx.init, tree(dtype="bfloat16"))
    _, later = jax.eval_shape(tx.update, tree(), state, tree(dtype="bfloat16"))
    chex.assert_trees_all_equal_shapes_and_dtypes(later, state)


# --- What is lost ---------------------------------------------------------------------------------


def magnitudes(rng, shape=SHAPE):
    """Numbers whose sizes differ by a few powers of ten between blocks and within them."""
    columns = np.exp(2 * rng.normal(size=shape[-1]))
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape)) * columns).astype(np.float32)


@functools.cache
def saved_and_loaded(how, moment, shape):
    def both(x, count):
        leaf = at(moment, shape, count)
        return how.load(how.save(x, leaf), leaf)

    return jax.jit(both)


def round_trip(how, moment, x, count=0):
    return np.asarray(saved_and_loaded(how, moment, x.shape)(x, count), np.float64)


def in_blocks(x):
    """An array along whose second-to-last axis the blocks lie, or along its only one."""
    axis = AXES.get(x.shape, max(x.ndim - 2, 0))
    if axis is None:
        return x.reshape(-1)
    return x if x.ndim == 1 else np.moveaxis(x, axis, -2)


def largest_of_block(x, block):
    """For every element the largest magnitude in its block."""
    moved = in_blocks(np.abs(x.astype(np.float64)))
    axis = max(moved.ndim - 2, 0)
    starts = np.arange(0, moved.shape[axis], block)
    largest = np.maximum.reduceat(moved, starts, axis)
    largest = largest.repeat(block, axis).take(range(moved.shape[axis]), axis)
    if moved.ndim == 1:
        return largest.reshape(x.shape)
    return np.moveaxis(largest, -2, AXES.get(x.shape, -2))


# The largest error of one round trip, as a share of the largest magnitude in the block: half a
# step rounded to nearest, a whole one rounded at random. For a root of k steps a step is 2/k wide.
WORST = {
    ("cast", "mu"): 2**-8,
    ("cast", "nu"): 2**-8,
    ("stochastic", "mu"): 2**-7,
    ("stochastic", "nu"): 2**-7,
    ("stochastic float16", "mu"): 2**-10,
    ("int8", "mu"): 2 / 127 * 1.01,
    ("int8", "nu"): 2 / 256 * 1.01,
    ("int4", "mu"): 2 / 7 * 1.01,
    ("int4", "nu"): 2 / 16 * 1.01,
}
LOSSY = [(*which, SHAPE) for which in WORST]
# The axis of the blocks is the only one, one beside an axis of length 1, the longest one, or all.
OTHERS = [(4099,), (101, 64), (101, 1, 64), (6, 7, 101), (101, 5, 9), (9, 7, 9, 9)]
PARTIAL = [(name, m, s) for name, m in WORST if "int" in name for s in OTHERS]
AXES = {(6, 7, 101): 2, (101, 5, 9): 0, (101, 1, 64): 0, (9, 7, 9, 9): None}


@pytest.mark.parametrize(("name", "moment", "shape"), LOSSY + PARTIAL, ids=str)
def test_round_trip_error(name, moment, shape):
    """In the last block too, which is a partial one, for int4 of an odd number of rows."""
    x = magnitudes(np.random.default_rng(0), shape)
    x = np.clip(x, -100, 100) if "float16" in name else x
    x = np.square(x) if moment == "nu" else x
    block = 64 if name == "int4" else 32
    error = np.abs(round_trip(STORAGES[name], moment, x) - x) / largest_of_block(x, block)
    error = in_blocks(error)
    assert error.max() <= WORST[name, moment]
    assert error.max() > WORST[name, moment] / 4  # the bound is not a loose one
    axis = max(error.ndim - 2, 0)
    last = error.take(range(error.shape[axis] // block * block, error.shape[axis]), axis)
    assert 0 < last.size < error.size
    assert last.max() > 0


RANDOM = [(*which, SHAPE) for which in WORST if "cast" not in which]


@pytest.mark.parametrize(
    ("name", "moment", "shape"),
    [*RANDOM, ("int4", "nu", (101, 5, 9)), ("int8", "nu", (9, 7, 9, 9))],
    ids=str,
)
def test_rounding_at_random_is_unbiased(name, moment, shape):
    """Over all elements and 500 draws each, and for every element alone."""
    x = magnitudes(np.random.default_rng(0), shape)
    if "float16" in name:
        x = np.clip(x, -100, 100)
    if moment == "nu":
        x = np.square(x)
        if "int" in name:  # below the smallest code there is nothing to round down to
            top = largest_of_block(x, 32 if name == "int8" else 64)
            x = np.maximum(x, top / 255).astype(np.float32)
    draws = np.stack([round_trip(STORAGES[name], moment, x, count) for count in range(500)])
    error = draws - x
    deviation = np.sqrt(np.sum(np.var(error, axis=0)) / len(draws))
    assert abs(error.mean(axis=0).sum()) <= 4 * deviation
    ups = np.sum(error > 0, axis=0)
    common = (ups >= 50) & (ups <= 450)  # so that the mean is about normal
    assert common.mean() > 0.2
    variance = (draws.max(axis=0) - x) * (x - draws.min(axis=0))  # of a choice between the two
    z = error.mean(axis=0)[common] / np.sqrt(variance[common] / len(draws))
    assert np.max(np.abs(z)) < 5


def test_nu_is_followed_only_by_rounding_at_random():
    """bfloat16 rounded to nearest stalls, and so would an 8-bit code.

    The mean of v / v of float32 after gradients that halve on the way, b2 = 0.999.
    """
    steps, shape = 4000, (64, 128)
    ways = {
        "exact": None,
        "stochastic": storage.stochastic(jnp.bfloat16)._replace(fits=lambda leaf: True),
        "int8": storage.int8()._replace(fits=lambda leaf: True),
        "cast": storage.cast(jnp.bfloat16),
    }
    stages = {n: adam_jax.scale_by_moments(None, 0.999, nu_storage=how) for n, how in ways.items()}
    scale = jnp.exp(0.5 * jax.random.normal(jax.random.key(0), shape))

    def step(states, t):
        draw = uniform(random_bits(9, "grad", 0, t, scale))
        grad = (2 * draw - 1) * scale * jnp.where(t < steps // 3, 1.0, 0.5)
        new = {name: stages[name].update(grad, states[name]) for name in stages}
        nu = {name: moments.nu.value for name, (moments, _) in new.items()}
        ratios = {name: jnp.mean(nu[name] / nu["exact"]) for name in nu}
        return {name: state for name, (_, state) in new.items()}, ratios

    states = {name: stage.init(jnp.zeros(shape)) for name, stage in stages.items()}
    ratios = jax.jit(lambda: jax.lax.scan(step, states, jnp.arange(steps))[1])()
    off = {name: np.max(np.abs(ratio - 1)) for name, ratio in ratios.items()}
    assert off["stochastic"] < 0.01
    assert off["int8"] < 0.01
    assert off["cast"] > 1.4


@given(
    st.lists(st.floats(2.0**-30, 2.0**30, width=32), min_size=70, max_size=70),
    st.sampled_from([2.0**-30, 1.0, 2.0**30]),
    st.sampled_from(["cast", "stochastic", "int8", "int4", "factored", "block_mean"]),
)
@settings(max_examples=50)
def test_nu_is_never_zero(roots, unit, name):
    """Not for one element that is not zero, however small it is beside its neighbours."""
    x = np.square(unit * np.asarray(roots, np.float32)).astype(np.float32)
    assert np.all(round_trip(STORAGES[name], "nu", np.tile(x[:, None], (1, 65))) > 0)


def test_an_affine_code_would_be_zero():
    """So that the test above can fail: the published divergence of 8-bit Adam."""

    def save(moment, leaf):
        return jnp.round(moment / jnp.max(moment) * 255).astype(jnp.uint8), jnp.max(moment)

    def load(stored, leaf):
        return stored[0].astype(jnp.float32) * stored[1] / 255

    kept = round_trip(Storage(save, load), "nu", np.square(magnitudes(np.random.default_rng(0))))
    assert np.mean(kept == 0) > 0.5


@each_storage
def test_zeros_stay_zeros_and_bad_numbers_show(name):
    how = STORAGES[name]
    moment = how.only or "mu"
    assert not np.any(round_trip(how, moment, np.zeros(SHAPE, np.float32)))
    for bad in (np.nan, np.inf):
        x = np.ones(SHAPE, np.float32)
        x[3, 5] = bad
        assert not np.isfinite(round_trip(how, moment, x)[3, 5])


def test_factored_survives_an_infinite_square():
    """The square of 1e30 is infinite in float32, which stops its row. A NaN stays one."""
    tx = adam_jax.adam(1e-2, nu_storage=storage.factored())
    update = jax.jit(tx.update)
    grad = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), "float32")
    state = tx.init(grad)
    for g in (grad, grad.at[3, 5].set(1e30), grad, grad):
        updates, state = update(g, state)
        assert np.all(np.abs(updates) < 0.08)  # 7.27 learning rates
    stopped = updates == 0
    assert stopped[3, 5]
    assert np.sum(stopped) == max(SHAPE)
    for g in (grad.at[3, 5].set(np.nan), grad):
        updates, state = update(g, state)
        assert np.isnan(updates[3, 5])


@pytest.mark.parametrize("bad", [1e20, np.inf, np.nan])
def test_factored_loses_one_row(bad):
    """Where float32 loses one element: the others go on, from zeros too."""
    tx = adam_jax.adam(1e-2, nu_storage=storage.factored())
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(SHAPE))
    row = np.arange(SHAPE[1]) == 5  # of the means along the longest axis
    for g in (jnp.zeros(SHAPE).at[3, 5].set(bad), jnp.ones(SHAPE), jnp.ones(SHAPE)):
        updates, state = update(g, state)
    updates = np.asarray(updates)
    expected = adam_jax.adam(1e-2)
    due = expected.init(jnp.zeros(()))
    for g in (0.0, 1.0, 1.0):
        without, due = expected.update(jnp.float32(g), due)
    assert_close(updates[:, ~row], np.full((70, 64), without), "float32 mean")
    assert np.all((updates[:, row] == 0) | np.isnan(updates[:, row]))
    assert np.isnan(updates[3, 5]) == (bad != 1e20)  # as in float32, of m
    assert np.sum(np.isnan(updates)) == (bad != 1e20)


@pytest.mark.parametrize("bad", [np.inf, np.nan, 3e38])
def test_a_row_that_factored_stops_does_not_change_the_others(bad):
    """Not even where squares that are finite have a sum that is not."""
    x = np.square(magnitudes(np.random.default_rng(0)))
    rows = np.isin(np.arange(SHAPE[1]), (5, 6))
    x[3:5, rows] = bad
    due = x[:, ~rows].mean(axis=0, dtype=np.float64)
    for _ in range(3):
        x = round_trip(storage.factored(), "nu", x).astype(np.float32)
        assert np.all(x[:, rows] == np.inf)
        assert_close(x[:, ~rows].mean(axis=0), due, "float32 mean")
    assert np.all(x[:, ~rows] > 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_bad_number_stays_alone_in_its_block(name, bad):
    """Not a number where it is not one in float32; an infinite square stops its block."""
    how = STORAGES[name]
    size = 32 if name == "int8" else 64
    grad = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), "float32")
    for kept in (None, how):
        tx = adam_jax.adam(1e-2, mu_storage=kept, nu_storage=kept)
        update, state = jax.jit(tx.update), tx.init(grad)
        for g in (grad, grad.at[3, 5].set(bad), grad, grad):
            updates, state = update(g, state)
        if kept is None:
            expected = np.isnan(updates)
    np.testing.assert_array_equal(np.isnan(updates), expected)
    assert np.sum(expected) == (bad != 1e30)
    stopped = np.sum(np.asarray(updates)[:size, 5] == 0)
    assert stopped == {1e30: size}.get(bad, 0 if np.isnan(bad) else size - 1)
    assert np.sum(updates == 0) == stopped


# --- Other dtypes ---------------------------------------------------------------------------------

NARROW = ["float16", "float8_e4m3fn", "float8_e5m2"]  # less range than bfloat16
EACH_WAY = {"dtype": jnp.dtype, "cast": storage.cast, "stochastic": storage.stochastic}


@pytest.mark.parametrize("way", EACH_WAY.values(), ids=EACH_WAY.keys())
def test_dtypes_of_little_range(way):
    """They underflow for squares, so v is refused; for m they work."""
    grads = {"kernel": jnp.full(SHAPE, -0.25), "bias": jnp.full(3, 0.25)}
    for dtype in NARROW:
        with refused(ValueError, "int8() adam_jax.storage bfloat16"):
            adam_jax.scale_by_moments(nu_storage=way(dtype))
        tx = adam_jax.scale_by_moments(0.5, None, mu_storage=way(dtype))
        _, state = tx.update(grads, tx.init(grads))
        assert state.mu["kernel"].dtype == dtype
        moments, _ = tx.update(grads, state)
        for name, grad in grads.items():  # all of these are numbers of the dtype
            np.testing.assert_array_equal(moments[name].mu.value, 0.75 * grad)
    for moment in ("mu", "nu"):  # a dtype without 0 keeps no moment
        with refused((TypeError, ValueError), "float8_e8m0fnu"):
            adam_jax.scale_by_moments(**{f"{moment}_storage": way("float8_e8m0fnu")})


def test_cast_of_the_wrong_kind():
    for param, dtype in (("complex64", "bfloat16"), ("float32", "complex64")):
        with refused(TypeError, f"mu 'a/w' {param} {dtype}"):
            adam_jax.adam(1e-3, mu_storage=dtype).init({"a": {"w": jnp.ones(3, param)}})
    with refused(TypeError, "nu_storage Storage 'complex64'"):
        adam_jax.adam(1e-3, nu_storage="complex64")
    params = {"w": jnp.ones(SHAPE, "complex64")}
    for how in (storage.stochastic(), storage.int8()):  # they leave a complex moment whole
        state = jax.eval_shape(adam_jax.adam(1e-3, mu_storage=how).init, params)
        assert jax.tree.leaves(state[0].mu)[-1].dtype == "complex64"


# --- Published estimators -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 192), (3, 128, 160), (160, 3, 128)])
def test_factored_is_adafactor(shape):
    """optax's scale_by_factored_rms: the same row and column means, the same update."""
    theirs = optax.scale_by_factored_rms(decay_rate=0.8, epsilon=0.0)
    ours = adam_jax.scale_by_moments(
        None, lambda count: 1 - (count.astype(float) + 1) ** -0.8, nu_storage=storage.factored()
    )
    how, params, rng = storage.factored(), jnp.zeros(shape), np.random.default_rng(0)

    @jax.jit
    def step(grad, state, their_state, count):
        _, state = ours.update(grad, state)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            update, their_state = theirs.update(grad, their_state, params)
        estimate = how.load(state.nu, at("nu", shape, count))
        return state, their_state, grad / jnp.sqrt(estimate), update

    state, their_state = ours.init(params), theirs.init(params)
    for count in range(10):
        grad = jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=shape)), jnp.float32)
        state, their_state, update, their_update = step(grad, state, their_state, count)
        assert_close(state.nu.rows.squeeze(), their_state.v_row.squeeze(), "float32 mean")
        assert_close(state.nu.columns.squeeze(), their_state.v_col.squeeze(), "float32 mean")
        assert_close(update, their_update, "float32 mean")


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
@pytest.mark.parametrize("block", [(64, 1), (1, 72), (64, 24)], ids=["columns", "rows", "heads"])
def test_block_mean_is_adam_mini(x64, block, mean_first):
    """What is kept always is Adam-mini's; the step, with a rule that averages first, is too."""
    shape = (64, 72)
    how = storage.block_mean(lambda path, shape: block)

    def averaged(grad, mu, nu, decay):
        leaf = at("nu", shape)
        return how.load(how.save(adam_jax.squared(grad, mu, nu, decay), leaf), leaf)

    tx = optax.chain(
        adam_jax.scale_by_moments(second_moment=averaged if mean_first else None, nu_storage=how),
        adam_jax.bias_correct(),
        adam_jax.scale_by_lr(1e-2),
    )
    rng = np.random.default_rng(0)
    grads = [magnitudes(rng, shape).astype(np.float64) for _ in range(10)]
    expected, v = adam_mini(grads, block, mean_first=mean_first)
    state, step = tx.init(jnp.zeros(shape, "float64")), jax.jit(tx.update)
    for grad, update in zip(grads, expected, strict=True):
        ours, state = step(jnp.asarray(grad), state)
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
    params = {"embed": jnp.zeros((100, 64)), "mlp": jnp.zeros((64, 100)), "bias": jnp.zeros(5000)}
    state = jax.eval_shape(adam_jax.adam(1e-3, nu_storage=storage.block_mean()).init, params)
    shapes = jax.tree.map(lambda leaf: leaf.shape, state[0].nu)
    assert shapes == {"embed": (100, 1), "mlp": (1, 100), "bias": (5000,)}


def test_blocks_of_stacked_layers():
    """Every layer has blocks of its own."""
    blocks = partial(storage.transformer_blocks, stacked=1)
    assert blocks("layers/mlp/kernel", (12, 768, 3072)) == (1, 768, 1)
    assert blocks("layers/attention/query/kernel", (12, 768, 12, 64)) == (1, 768, 1, 64)
    assert blocks("layers/attention/key/kernel", (12, 768, 12, 64)) == (1, 768, 1, 64)
    assert blocks("layers/attention/value/kernel", (12, 768, 12, 64)) == (1, 768, 12, 1)
    assert blocks("layers/attention/out/kernel", (12, 12, 64, 768)) == (1, 12, 64, 1)
    assert blocks("embed/embedding", (2, 50257, 768)) == (1, 1, 768)
    assert blocks("layers/norm/scale", (12, 768)) is None
    assert blocks("scale", ()) is None
    assert storage.transformer_blocks("w", (2, 3, 768, 3072), stacked=2) == (1, 1, 768, 1)

    rng = np.random.default_rng(0)
    shapes = {"mlp": (3, 64, 32), "query": (3, 64, 4, 8), "norm": (3, 2000)}
    grads = {name: jnp.asarray(rng.normal(size=s), "float32") for name, s in shapes.items()}
    tx = adam_jax.scale_by_moments(None, 0.75, nu_storage=storage.block_mean(blocks))
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    axes = {"mlp": 1, "query": (1, 3), "norm": ()}
    expected = {
        name: 0.25 * np.square(wide(g)).mean(axes[name], keepdims=True) for name, g in grads.items()
    }
    assert_close(state.nu, expected, "float32 mean")


# --- Randomness -----------------------------------------------------------------------------------


def test_random_bits_are_uniform_and_independent():
    shape = (1000, 100)
    like = jnp.zeros(shape)
    draws = [
        np.asarray(uniform(at(moment, shape, count, index).random_bits(seed, like)))
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


def test_random_bits_do_not_depend_on_the_block():
    """Where the scales are equal, so are the codes."""
    x = np.random.default_rng(0).uniform(size=(64, 64)).astype(np.float32)
    x[::8] = 1
    for moment in ("mu", "nu"):
        save = lambda x, block, m=moment: storage.int8(block).save(x, at(m, x.shape)).codes  # noqa: E731
        codes = [jax.jit(partial(save, block=block))(x) for block in (8, 32, 64)]
        np.testing.assert_array_equal(codes[0], codes[1])
        np.testing.assert_array_equal(codes[0], codes[2])
        assert len(np.unique(codes[0])) > 100


# --- Nothing else changes -------------------------------------------------------------------------


@each_pair
def test_the_step_uses_the_moment_before_it_is_saved(pair):
    """So the first step is float32's."""
    _, init, update = runner(pair)
    params, plain = few(), adam_jax.adamw(1e-2)
    updates, _ = update(params, init(params), params)
    assert_close(updates, plain.update(params, plain.init(params), params)[0], "contracted")


def test_init_leaves_nothing_to_compute_in_compilation():
    """XLA took 50 s to reduce the zeros of a large leaf to its scales before it ran anything."""
    init = jax.jit(kept_by(storage.int8()).init).lower(jnp.ones(SHAPE)).compile()
    assert " reduce(" in init.as_text()


@each_pair
def test_scan_and_vmap(pair):
    """Two models side by side, one of them with the numbers of one alone."""
    tx, init, update = runner(pair)
    expected, _ = trained(init, update, few())
    both = lambda tree: jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree)  # noqa: E731
    grads = jax.tree.map(lambda *g: jnp.stack(g), *(both(few(step + 1)) for step in range(2)))

    @jax.jit
    def train(params):
        def step(carry, grads):
            params, state = carry
            updates, state = jax.vmap(tx.update)(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, jax.vmap(tx.init)(params)), grads)[0]

    params, _ = train(both(few()))
    assert_close(jax.tree.map(lambda p: p[0], params), expected, "contracted")
    assert np.any(params["kernel"][1] != params["kernel"][0])


@pytest.mark.parametrize("pair", PAIRS[:2], ids=", ".join)
def test_checkpoint_round_trip(pair, tmp_path):
    _, init, update = runner(pair)
    params = few()
    _, state = update(params, init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", init(params))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(update(params, restored, params), update(params, state, params))


def test_wrappers():
    """The same numbers inside optax's wrappers, and states that their branches agree on."""
    tx, init, update = runner(PAIRS[0])
    mu, nu = (STORAGES[name] for name in PAIRS[0])
    params = few()
    labels = {name: None if leaf is None else "a" for name, leaf in params.items()}
    masked = optax.masked(tx, dict.fromkeys(params, True))
    wrapped = [
        masked,
        optax.partition({"a": tx, "b": optax.sgd(1.0)}, labels),
        optax.MultiSteps(tx, 2).gradient_transformation(),
        optax.apply_if_finite(tx, 3),
        optax.inject_hyperparams(adam_jax.adamw)(1e-2, mu_storage=mu, nu_storage=nu),
    ]
    with jax.numpy_dtype_promotion("standard"):
        for wrapper in wrapped:
            state = jax.eval_shape(wrapper.init, params)
            updates, later = jax.eval_shape(wrapper.update, params, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes((updates, later), (params, state))
    plain, _ = trained(init, update, params)
    inside, _ = trained(masked.init, jax.jit(masked.update), params)
    assert_close(inside, plain, "contracted")


@each_pair
def test_map_params(pair):
    """Every part of a kept moment is a tree shaped like the parameters, to optax too."""
    tx, params = kept_in(pair), tree()
    state = jax.eval_shape(tx.init, params)
    mapped = optax.tree.map_params(tx, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    assert shapes_of(mapped) == shapes_of(state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(mapped[0].mu))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(mapped[0].nu))


TAKING = {
    name: (factory, [moment for moment in ("mu", "nu") if f"{moment}_storage" in names])
    for name, factory in MEMBERS.items()
    if (names := factory.__code__.co_varnames[: factory.__code__.co_argcount
        + factory.__code__.co_kwonlyargcount])
}  # fmt: skip


@pytest.mark.parametrize("name", TAKING)
def test_every_member_takes_them(name):
    """And keeps nothing of a large leaf in more than 8 bits, except descent with optax.trace."""
    factory, moments = TAKING[name]
    if not moments:
        assert name in ("sgd", "momentum", "nesterov_momentum")
        return
    options = {"centered": True} if name == "rmsprop" and "mu" in moments else {}
    how = storage.int8()
    tx = factory(1e-2, **{f"{moment}_storage": how for moment in moments}, **options)
    params = {"kernel": jnp.ones(SHAPE)}
    state = tx.init(params)
    assert all(leaf.size < 4096 or leaf.dtype.itemsize == 1 for leaf in jax.tree.leaves(state))
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    assert np.all(np.isfinite(updates["kernel"]))


@pytest.mark.parametrize("pair", PAIRS[:3], ids=", ".join)
def test_export_for_cpu_cuda_and_tpu(pair):
    tx, init, update = runner(pair)
    params = few()
    arguments, structure = jax.tree.flatten((params, init(params), params))
    step = jax.jit(lambda *leaves: jax.tree.leaves(tx.update(*structure.unflatten(leaves))))
    exported = export.export(step, platforms=["cpu", "cuda", "tpu"])(*arguments)
    expected = jax.tree.leaves(update(params, init(params), params))
    assert_close(exported.call(*arguments), expected, "contracted")


@pytest.mark.parametrize("pair", [("int8", "int4"), ("int4", "int8")], ids=", ".join)
def test_finite_numbers_pass_the_debug_switches(pair):
    """Rows of zeros too, whose scales are zero: no infinity or NaN on the way."""
    tx = kept_in(pair)
    params = {"kernel": jnp.asarray(magnitudes(np.random.default_rng(0))).at[:32, :9].set(0)}
    with jax.debug_infs(True), jax.debug_nans(True):
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(params, state, params)
    assert np.all(np.isfinite(updates["kernel"]))


@pytest.mark.parametrize(
    ("pair", "kind"), [(("int8", "int4"), "explicit"), (("cast", "block_mean"), "auto")], ids=str
)
def test_shards_smaller_than_a_large_leaf(pair, kind):
    """A state made globally, stepped inside shard_map, where a leaf has 1,024 elements.

    There a random bit is that of the position in the shard, so a code may be the next one; scales
    are the same, and so is all that is not rounded at random.
    """
    mesh = mesh_of(kind, x=8)
    columns = PartitionSpec(None, "x")
    grad = jnp.asarray(magnitudes(np.random.default_rng(0), (128, 64)))
    tx = kept_in(pair, weight_decay=0.0)

    def two_steps(update, grad, state):
        first, between = update(grad, state, grad)
        return jax.device_get((first, between[0], *update(grad, between, grad)))

    alone = two_steps(jax.jit(tx.update), grad, jax.jit(tx.init)(grad))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(grad, NamedSharding(mesh, columns))
        state = jax.jit(tx.init)(sharded)
        divides = lambda x: x.ndim and x.dtype != bool and x.shape[-1] % 8 == 0  # noqa: E731
        specs = jax.tree.map(lambda leaf: columns if divides(leaf) else PartitionSpec(), state)
        arguments, results = (columns, specs, columns), (columns, specs)
        update = jax.shard_map(tx.update, mesh=mesh, in_specs=arguments, out_specs=results)
        together = two_steps(jax.jit(update), sharded, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(together, alone)
    if "int8" not in pair:
        return assert_close(together, alone, "contracted")
    assert_close(together[0], alone[0], "contracted")
    for moment, name, top, block in (("mu", "int8", 127, 32), ("nu", "int4", 16, 64)):
        kept = [getattr(side[1], moment) for side in (together, alone)]
        np.testing.assert_array_equal(kept[0].scales, kept[1].scales)
        leaf = at(moment, (128, 64))
        ours, theirs = (
            wide(STORAGES[name].load(Blocks(*map(jnp.asarray, k[:2])), leaf)) for k in kept
        )
        scale = largest_of_block(theirs, block)
        ours, theirs = (np.sign(x) * np.sqrt(np.abs(x) / scale) for x in (ours, theirs))
        assert np.all(np.abs(ours - theirs) <= 2 / top)


@pytest.mark.parametrize("shape", [(256, 8, 64), (128, 1, 64)], ids=str)
def test_shards_whose_shape_says_another_axis(shape):
    """Inside shard_map a shard of (32, 8, 64) has blocks along its first axis, as the leaf has."""
    devices = 8 if shape[1] > 1 else 4
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("x")
    grad = jnp.asarray(magnitudes(np.random.default_rng(0), shape))
    how = storage.int8(16)
    tx = adam_jax.scale_by_moments(mu_storage=how, nu_storage=how)
    state = jax.jit(tx.init)(grad)
    fits = lambda x: x.ndim and x.dtype != bool and x.shape[0] % mesh.size == 0  # noqa: E731
    specs = jax.tree.map(lambda x: rows if fits(x) else PartitionSpec(), state)
    specs = specs._replace(count=PartitionSpec(), weights=PartitionSpec())
    assert specs.mu.scales == rows

    def keep(grad, state):
        return tx.update(grad, state)[1]

    parts = jax.shard_map(keep, mesh=mesh, in_specs=(rows, specs), out_specs=specs)
    kept, due = jax.jit(parts)(grad, state), jax.jit(keep)(grad, state)
    np.testing.assert_array_equal(kept.nu.scales, due.nu.scales)


# --- Your own, and what is refused ----------------------------------------------------------------


class Halves(NamedTuple):
    high: Any
    low: Any
    whole: Any = None


def halves(parts=Halves):
    """A float32 as two bfloat16: 16 of its 24 bits."""
    high = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    return Storage(
        save=lambda moment, leaf: Halves(
            high(moment), high(moment - high(moment).astype(moment.dtype))
        ),
        load=lambda kept, leaf: kept.high.astype(leaf.dtype) + kept.low.astype(leaf.dtype),
        parts=parts,
    )


def test_a_storage_of_ones_own():
    """It sees where its moment is, and decides what it is for."""
    seen = []

    def fits(leaf):
        seen.append((leaf.moment, leaf.path, leaf.shape, leaf.index))
        return leaf.path.endswith("kernel")

    half = Storage(
        save=lambda moment, leaf: moment.astype(jnp.float16),
        load=lambda stored, leaf: stored.astype(leaf.dtype),
        fits=fits,
    )
    params = {"dense": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}}
    tx = adam_jax.adam(1e-2, mu_storage=half)
    updates, state = tx.update(params, tx.init(params))
    assert state[0].mu["dense"]["kernel"].dtype == jnp.float16
    assert state[0].mu["dense"]["bias"].dtype == jnp.float32
    assert ("mu", "dense/bias", (3,), 0) in seen
    assert ("mu", "dense/kernel", (2, 3), 1) in seen
    assert_close(updates["dense"]["bias"], -1e-2 * np.ones(3), "contracted")


def test_a_storage_of_ones_own_with_parts():
    params = {"kernel": jnp.full(SHAPE, 1 / 3), "bias": jnp.full(3, 1 / 3)}
    tx = adam_jax.scale_by_moments(0.5, None, mu_storage=halves())
    _, state = tx.update(params, tx.init(params))
    assert isinstance(state.mu, Halves)
    nothing = state.mu.whole["kernel"], state.mu.high["bias"], state.mu.low["bias"]
    assert [part.dtype == bool and not part.any() for part in nothing] == [True] * 3
    moments, _ = tx.update(params, state)
    assert_close(moments["kernel"].mu.value, 0.25 * np.ones(SHAPE), "contracted")


def test_a_storage_of_ones_own_in_integers():
    """Of the leaf's own shape."""
    integers = Storage(
        save=lambda moment, leaf: jnp.round(moment * 64).astype(jnp.int8),
        load=lambda stored, leaf: stored.astype(leaf.dtype) / 64,
    )
    grads = {"kernel": jnp.full(SHAPE, -0.5), "bias": jnp.full(3, 0.5)}
    tx = adam_jax.scale_by_moments(0.5, None, mu_storage=integers)
    _, state = tx.update(grads, tx.init(grads))
    assert state.mu["kernel"].dtype == jnp.int8
    moments, _ = tx.update(grads, state)
    np.testing.assert_array_equal(moments["kernel"].mu.value, jnp.full(SHAPE, -0.375))


ADAM8 = adam_jax.adam(1e-3, mu_storage=storage.int8())


def init(**options):
    return lambda: adam_jax.adam(1e-3, **options).init({"a": {"w": jnp.ones(SHAPE)}})


WRONG = {
    "the factory": (
        init(mu_storage=storage.int8),
        TypeError,
        "mu_storage Storage adam_jax.storage.int8",
    ),
    "two ways": (
        init(mu_dtype="bfloat16", mu_storage=storage.int8()),
        ValueError,
        "mu_dtype mu_storage",
    ),
    "factored m": (init(mu_storage=storage.factored()), ValueError, "mu_storage nu"),
    "block-mean m": (
        lambda: adam_jax.lion(1e-3, mu_storage=storage.block_mean()),
        ValueError,
        "mu_storage nu",
    ),
    "cast to an integer": (lambda: storage.cast("int8"), ValueError, "dtype floating-point int8"),
    "stochastic float32": (
        lambda: storage.stochastic("float32"),
        ValueError,
        "dtype 32 float32 cast",
    ),
    "a seed of 1.5": (lambda: storage.int8(seed=1.5), TypeError, "seed integer 1.5"),
    "a seed of True": (lambda: storage.stochastic(seed=True), TypeError, "seed integer True"),
    "a seed of '3'": (lambda: storage.int4(seed="3"), TypeError, "seed integer '3'"),
    "a block of 0": (lambda: storage.int8(0), ValueError, "block 0"),
    "a block of True": (lambda: storage.int8(True), TypeError, "block integer True"),
    "an odd block": (lambda: storage.int4(33), ValueError, "block even 33"),
    "a block of 6.4": (lambda: storage.int4(6.4), TypeError, "block integer 6.4"),
    "blocks of 64": (lambda: storage.block_mean(64), TypeError, "blocks function 64"),
    "blocks of another rank": (
        init(nu_storage=storage.block_mean(lambda path, shape: (1,))),
        ValueError,
        "blocks('a/w', (70, 65)) 2 axes (1,)",
    ),
    "blocks that do not divide": (
        init(nu_storage=storage.block_mean(lambda path, shape: (60, 1))),
        ValueError,
        "blocks('a/w', (70, 65)) divide (60, 1)",
    ),
    "parts that do not end in whole": (
        init(mu_storage=halves(NamedTuple("Bad", [("whole", Any), ("low", Any)]))),
        ValueError,
        "storage parts whole",
    ),
    "parts that are no NamedTuple": (
        init(mu_storage=halves(tuple)),
        ValueError,
        "storage parts whole",
    ),
    "parts that are not named": (init(mu_storage=halves(None)), TypeError, "'a/w' parts"),
    "a missing gradient": (
        lambda: ADAM8.update({}, ADAM8.init({"w": jnp.ones(SHAPE)})),
        ValueError,
        "gradients init() ['w']",
    ),
    "another shape": (
        lambda: ADAM8.update({"w": jnp.ones((32, 256))}, ADAM8.init({"w": jnp.ones(SHAPE)})),
        ValueError,
        "scale_by_moments 'w' (32, 256)",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_wrong_calls(case):
    call, error, names = case
    with refused(error, names):
        call()


def test_integers_of_numpy_are_integers():
    tx = adam_jax.adam(1e-3, nu_storage=storage.int8(np.int64(16), seed=np.uint8(3)))
    state = jax.eval_shape(tx.init, jnp.ones(4096))
    assert state[0].nu.scales.shape == (256,)


HOW = STORAGES | {"plain": None, "rows": ROWS, "int8 in 64": storage.int8(64)}


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("plain", "int8"),
        ("int8", "plain"),
        ("int8", "factored"),
        ("factored", "int8"),
        ("int8", "int4"),
        ("int4", "int8"),
        ("int8", "int8 in 64"),
        ("block_mean", "rows"),
        ("block_mean", "factored"),
    ],
)
def test_a_state_of_another_storage(was, now):
    """The error says so, and does not blame the gradients alone."""
    params = {"w": jnp.ones(SHAPE)}
    before, after = (adam_jax.adam(1e-3, nu_storage=HOW[name]) for name in (was, now))
    state = jax.eval_shape(before.init, params)
    with refused(ValueError, "scale_by_moments nu_storage init()"):
        jax.eval_shape(after.update, params, state)
