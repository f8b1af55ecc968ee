"""Storages on meshes: eight devices, automatic and explicit axes, one and two of them.

The numbers are those of one device, the state lies where the parameters lie, and no device keeps or
gathers more of a moment than it would in float32.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import TOLERANCES

import adam_jax
from adam_jax import storage

SHAPES = [(1600, 1600), (768, 3072), (3, 3, 64, 64), (768, 12, 64), (50257, 768)]
MESHES = {"one axis": (8,), "two axes": (2, 4)}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
STORAGES = {
    "cast": (storage.cast(jnp.bfloat16), storage.cast(jnp.bfloat16)),
    "stochastic": (storage.stochastic(), storage.stochastic()),
    "int8": (storage.int8(), storage.int8()),
    "int4": (storage.int4(), storage.int4()),
    "factored": (None, storage.factored()),
    "block_mean": (None, storage.block_mean(lambda path, shape: (*shape[:-1], 1))),
    "block_mean, rows": (None, storage.block_mean(lambda path, shape: (1, *shape[1:]))),
}


def layouts(shape, mesh):
    """One axis of a leaf on one axis of the mesh, wherever it divides."""
    for axis, length in enumerate(shape):
        for name, size in mesh.shape.items():
            if length % size == 0:
                yield PartitionSpec(*[name if a == axis else None for a in range(len(shape))])


def mesh_of(kind, axes):
    names = ("x", "y")[: len(MESHES[axes])]
    kinds = (KINDS[kind],) * len(names)
    return jax.make_mesh(MESHES[axes], names, axis_types=kinds)


@functools.cache
def optimizer(name):
    mu, nu = STORAGES[name]
    return adam_jax.scale_by_moments(mu_storage=mu, nu_storage=nu)


def kept_bytes(state):
    """On the first device, of everything that is not a scalar."""
    return sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim
    )


def gathered_bytes(compiled):
    """The largest result of a collective, on one device."""
    results = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* (?:all-|collective|reduce-scatter)", compiled)
    sizes = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "c64": 8}
    return max(
        (
            sizes.get(kind, 4) * math.prod(map(int, filter(None, lengths.split(","))))
            for kind, lengths in results
        ),
        default=0,
    )


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STORAGES)
def test_every_layout_is_compiled_without_gathering_a_moment(name, kind, axes):
    tx, mesh = optimizer(name), mesh_of(kind, axes)
    for shape in SHAPES:
        for spec in layouts(shape, mesh):
            sharding = NamedSharding(mesh, spec)
            ...
