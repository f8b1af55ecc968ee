"""Storages on meshes of eight devices, with automatic and explicit axes, one and two of them.

The numbers are those of one device, the state lies where the parameters lie, and no device keeps or
gathers more of a moment than it would in float32.
"""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from jax.sharding import NamedSharding, PartitionSpec
from support import assert_close, mesh_of, user_jit
from tables import keeping

import adam_jax
from adam_jax import storage

SHAPES = [(1600, 1600), (768, 3072), (3, 3, 64, 64), (768, 12, 64), (50257, 768)]
# Blocks of codes that are not along the second-to-last axis.
THIN = [(4096, 1, 128), (16, 16, 3, 768), (256, 128, 3, 3), (3, 3, 1, 1024), (8, 8, 8, 8)]
MESHES = {"one axis": {"x": 8}, "two axes": {"x": 2, "y": 4}}
KINDS = "auto", "explicit"


def tiles(shape):
    """Half of a length by a quarter of another, where that is possible."""
    *rest, rows, columns = shape
    return (*[1] * len(rest), rows // (2 - rows % 2), columns // 4)


STORAGES = {name: keeping(name) for name in tables.STORAGES if name != "block_mean"} | {
    "block_mean, columns": keeping(storage.block_mean(lambda path, s: (*s[:-1], 1))),
    "block_mean, tiles": keeping(storage.block_mean(lambda path, s: tiles(s))),
}
each_storage = pytest.mark.parametrize("name", STORAGES)
each_mesh = pytest.mark.parametrize("axes", MESHES)


def layouts(shape, mesh):
    """One axis of a leaf on one axis of the mesh, or on all, wherever they divide it."""
    for axis, length in enumerate(shape):
        for names in {*mesh.axis_names, mesh.axis_names}:
            each = names if isinstance(names, tuple) else (names,)
            if length % math.prod(mesh.shape[name] for name in each) == 0:
                spec = PartitionSpec(*[names if a == axis else None for a in range(len(shape))])
                yield NamedSharding(mesh, spec)


def leaves(shapes, mesh):
    """Every layout of every shape, without the arrays; what does not divide is left out."""
    return {
        f"{shape} {sharding.spec}": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        for shape in shapes
        for sharding in layouts(shape, mesh)
    }


def local_bytes(leaf):
    """What one device keeps of a leaf; a placeholder has no sharding in jax 0.7."""
    if leaf.dtype == bool:
        return leaf.size
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def made(init, params, mesh):
    """A state, in one compilation: nothing of it depends on the values, so jit is told the mesh."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return jax.jit(init)(params)


def parts(moment, name):
    """What is kept of one leaf of a tree."""
    trees = moment if isinstance(moment, tuple) else (moment,)
    return [tree[name] for tree in trees if tree[name] is not None]


@each_storage
@each_mesh
def test_every_layout_on_explicit_axes(name, axes):
    """Neither init nor update refuses one, and the codes lie as the parameters do."""
    tx = adam_jax.scale_by_moments(**STORAGES[name])
    mesh = mesh_of("explicit", **MESHES[axes])
    params = leaves(SHAPES + THIN if "int" in name else SHAPES, mesh)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        moments, later = jax.eval_shape(tx.update, params, state)
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)  # noqa: E731
    assert described((state.mu, state.nu)) == described((later.mu, later.nu))
    for leaf, param in params.items():
        assert moments[leaf].mu.value.sharding.spec == param.sharding.spec
        for moment in (state.mu, state.nu):
            # Of a leaf in one vector, codes of 4 bits are sharded as its first axis only.
            if name != "int4" or "(8, 8, 8, 8)" not in leaf:
                assert sum(map(local_bytes, parts(moment, leaf))) <= local_bytes(param), leaf
            for part in parts(moment, leaf):
                if part.shape == param.shape:
                    assert part.sharding.spec == param.sharding.spec, leaf


def gathered(compiled):
    """The bytes of the largest result of a collective, on one device."""
    widths = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "c64": 8}
    found = re.findall(r" = (.*?) (?:all-\w+|collective-\w+|reduce-scatter)\(", compiled.as_text())
    arrays = [array for result in found for array in re.findall(r"(\w+)\[([\d,]*)\]", result)]
    return max(
        (widths.get(kind, 4) * math.prod(map(int, filter(None, lengths.split(","))))
         for kind, lengths in arrays), default=0
    )  # fmt: skip


# Shards of 200 and of 8 rows cut all blocks, those of 96 only blocks of 64.
CUT = {
    "rows of 200": ((1600, 1600), PartitionSpec("x", None)),
    "rows of 96": ((768, 3072), PartitionSpec("x", None)),
    "rows of 8": ((3, 3, 64, 64), PartitionSpec(None, None, "x", None)),
    "columns": ((1600, 1600), PartitionSpec(None, "x")),
}


GATHERING = [
    ("explicit", "int8", "rows of 200"),
    ("explicit", "int8", "rows of 96"),
    ("explicit", "int8", "rows of 8"),
    ("explicit", "int8", "columns"),
    ("explicit", "int4", "rows of 200"),
    ("explicit", "int4", "rows of 96"),
    ("explicit", "factored", "rows of 200"),
    ("auto", "int8", "rows of 200"),
    ("auto", "int8", "rows of 96"),
    ("auto", "int8", "rows of 8"),
    ("auto", "int8", "columns"),
    ("auto", "int4", "rows of 200"),
    ("auto", "factored", "rows of 200"),
]


@pytest.mark.parametrize(("kind", "name", "cut"), GATHERING)
def test_no_device_gathers_a_moment(kind, name, cut):
    """Compiled for eight devices: less is gathered than a device keeps of a moment in float32."""
    shape, spec = CUT[cut]
    mesh = mesh_of(kind, x=8)
    sharding = NamedSharding(mesh, spec)
    tx = adam_jax.scale_by_moments(**STORAGES[name])
    params = jax.device_put(jnp.zeros(shape), sharding)
    if kind == "explicit":
        state = made(tx.init, params, mesh)
    else:
        shardings = adam_jax.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
    compiled = user_jit(tx.update, donate_argnums=1).lower(params, state).compile()
    whole = math.prod(sharding.shard_shape(shape)) * 4
    assert gathered(compiled) <= whole
    if (cut, name) in {("columns", "int8"), ("columns", "int4"), ("rows of 96", "int8")}:
        assert gathered(compiled) == 0
    _, later = compiled.output_shardings
    for moment, kept in ((state.mu, later.mu), (state.nu, later.nu)):
        for part, out in zip(jax.tree.leaves(moment), jax.tree.leaves(kept), strict=True):
            if part.shape == shape:  # where the scales of cut blocks lie, XLA decides
                assert part.sharding.is_equivalent_to(sharding, part.ndim)
                assert out.is_equivalent_to(sharding, part.ndim)
        assert sum(map(local_bytes, jax.tree.leaves(moment))) <= whole


SMALL = {
    "rows, cut": ((400, 24), PartitionSpec(("x", "y"), None)),
    "columns": ((130, 64), PartitionSpec(None, "y")),
    "heads": ((64, 12, 16), PartitionSpec(None, "y", None)),
    "vector": ((4800,), PartitionSpec("x")),
    "bias": ((64,), PartitionSpec("x")),
    "patches": ((4, 3, 5, 80), PartitionSpec("x", None, None, "y")),
    "cube": ((8, 8, 8, 8), PartitionSpec("x", None, "y", None)),
    "one head": ((128, 1, 32), PartitionSpec("y", None, "x")),
}
RNG = np.random.default_rng(0)
START = {name: RNG.normal(size=shape).astype("float32") for name, (shape, _) in SMALL.items()}
GRADS = [
    {name: RNG.normal(size=p.shape).astype("float32") for name, p in START.items()}
    for _ in range(3)
]


def after_steps(tx, place, mesh=None):
    """The moments and the state after three steps on gradients where `place` puts them."""
    state, step = made(tx.init, place(START), mesh), jax.jit(tx.update)
    for grads in GRADS:
        moments, state = step(place(grads), state)
    return {leaf: (m.mu.value, m.nu.value) for leaf, m in moments.items()}, state


def small_stage(name):
    how = dict(STORAGES[name])
    if "int" in name:  # one moment each: both would be compiled in the same way
        del how["nu_storage" if name == "int8" else "mu_storage"]
    if "block_mean" in name:  # vectors have no columns, and no tiles
        blocks = how["nu_storage"]
        how["nu_storage"] = blocks._replace(
            fits=lambda leaf: len(leaf.shape) > 1 and blocks.fits(leaf)
        )
    return adam_jax.scale_by_moments(**how)


@functools.cache
def alone(name):
    return jax.device_get(after_steps(small_stage(name), jax.device_put))


NUMBERS = [("explicit", name) for name in STORAGES if name != "cast"]
NUMBERS += [("auto", name) for name in ("int8", "int4", "factored")]


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_the_numbers_are_those_of_one_device(kind, name):
    """Random bits too: each element makes its own, wherever it lies."""
    mesh = mesh_of(kind, x=2, y=4)
    shardings = {leaf: NamedSharding(mesh, spec) for leaf, (_, spec) in SMALL.items()}
    moments, state = after_steps(
        small_stage(name), lambda tree: jax.device_put(tree, shardings), mesh
    )
    expected, expected_state = alone(name)
    assert_close(jax.device_get(moments), expected, "contracted")
    pairs = zip(
        jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(expected_state), strict=True
    )
    for part, one in pairs:
        if (
            part.dtype.itemsize == 1
        ):  # a contraction changes the last bit of a moment, seldom a code
            assert np.mean(part != one) < 1e-3
        elif part.dtype != jnp.bfloat16:
            assert_close(part, one, "contracted")
    for leaf, sharding in shardings.items():
        assert moments[leaf][0].sharding.is_equivalent_to(sharding, moments[leaf][0].ndim)


def test_random_bits_are_made_where_the_leaf_is():
    """On explicit axes too: an eighth of the operations on each of eight devices."""
    how = storage.stochastic()
    tx = adam_jax.scale_by_moments(mu_storage=how, nu_storage=how)
    flops = {}
    for kind in (*KINDS, None):
        params = jnp.zeros((256, 256))
        if kind is not None:
            sharding = NamedSharding(mesh_of(kind, x=8), PartitionSpec("x"))
            params = jax.device_put(params, sharding)
        compiled = user_jit(tx.update).lower(params, tx.init(params)).compile()
        flops[kind] = compiled.cost_analysis()["flops"]
    assert flops["auto"] < flops[None] / 7
    assert flops["explicit"] < flops[None] / 7
