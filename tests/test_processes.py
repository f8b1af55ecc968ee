"""Two real processes on loopback with four devices each: the numbers of one process with eight."""

import functools
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import assert_close, user_jit

import adam_jax
from adam_jax import storage

OPTIMIZERS = {
    "adamw": adam_jax.adamw(1e-2),
    "8-bit": adam_jax.adamw(1e-2, mu_storage=storage.int8(), nu_storage=storage.int8()),
    "4-bit, factored": adam_jax.adamw(
        1e-2, mu_storage=storage.int4(), nu_storage=storage.factored()
    ),
    "clipped, rounded": optax.chain(
        optax.clip_by_global_norm(1.0), adam_jax.adamw(1e-2), adam_jax.compensate("int8")
    ),
}


def dtype_of(name):
    return jnp.bfloat16 if "rounded" in name else np.float32


def train():
    """Five steps: the batch in eight parts, the kernel's rows in eight parts, the bias in one.

    The batch holds small integers, so that its gradients are the same in whatever order the
    processes add them. All optimizers take a step in one compiled function.
    """
    mesh = Mesh(np.array(jax.devices("cpu")), ("data",))
    rng = np.random.default_rng(0)

    def place(x, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    kernel = rng.normal(size=(64, 512))
    params = {
        name: {
            "kernel": place(kernel.astype(dtype_of(name)), "data"),
            "bias": place(np.zeros(512, dtype_of(name))),
        }
        for name in OPTIMIZERS
    }

    def loss(params, batch, weights):
        batch, weights = (x.astype(params["bias"].dtype) for x in (batch, weights))
        return jnp.sum((batch @ params["kernel"] + params["bias"][None]) * weights)

    def one_step(tx, params, state, batch, weights):
        updates, state = tx.update(jax.grad(loss)(params, batch, weights), state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    shardings = {
        name: adam_jax.state_shardings(tx, params[name], zero="data")
        for name, tx in OPTIMIZERS.items()
    }
    places = {
        name: (jax.tree.map(lambda p: p.sharding, params[name]), shardings[name])
        for name in OPTIMIZERS
    }

    @functools.partial(user_jit, out_shardings=places)
    def step(now, batch, weights):
        return {name: one_step(tx, *now[name], batch, weights) for name, tx in OPTIMIZERS.items()}

    @functools.partial(user_jit, out_shardings=shardings)
    def start(params):
        return {name: tx.init(params[name]) for name, tx in OPTIMIZERS.items()}

    # In one compiled function. Call by call, each process starts the collectives in an order of
    # its own, and the two may wait for each other forever (jaxlib 0.7.1, one run in five).
    state = start(params)
    now = {name: (params[name], state[name]) for name in OPTIMIZERS}
    for _ in range(5):
        batch = place(rng.integers(-2, 3, (16, 64)).astype(np.float32), "data")
        weights = place(rng.integers(-2, 3, (16, 512)).astype(np.float32), "data")
        now = step(now, batch, weights)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda now: now, out_shardings=everywhere)(now)


def results():
    """Everything that the training leaves, by optimizer and place in the tree, on the host."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).astype(np.float32)
        for path, leaf in jax.tree_util.tree_leaves_with_path(train())
    }


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    paths = [folder / f"{rank}.npz" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(rank), str(path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, path in enumerate(paths)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [dict(np.load(path)) for path in paths]


def test_two_processes(two_processes):
    alone = results()
    first, second = two_processes
    assert alone.keys() == first.keys() == second.keys()
    np.testing.assert_equal(first, second)
    assert_close(first, alone, "contracted")


if __name__ == "__main__":
    address, rank, path = sys.argv[1:]
    jax.distributed.initialize(address, num_processes=2, process_id=int(rank))
    assert (jax.process_count(), len(jax.local_devices()), len(jax.devices())) == (2, 4, 8)
    np.savez(path, **results())
