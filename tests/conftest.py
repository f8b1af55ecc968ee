"""Strict promotion, eight host devices, and both float widths for every test that asks."""

import os
import subprocess
import sys

# Nearly all of the suite's time is XLA compiling, and this way it compiles twice as fast. What
# holds only for the code that a user gets is compiled with `support.user_jit`, and
# XLA_FLAGS=--xla_backend_optimization_level=3 compiles everything so, as `.ci/run` does once.
QUICK = "--xla_backend_optimization_level=0"
OF_OLDER_XLA = "--xla_cpu_use_fusion_emitters=false"  # gone with jax 0.12


def known_to_xla(flags):
    """XLA ends a process that gives it a flag of another version."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return (
        subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    )


if "PYTEST_XDIST_WORKER" not in os.environ:  # its two processes inherit what is found here
    flags = os.environ.get("XLA_FLAGS", "")
    if "optimization_level" not in flags:
        flags += f" {QUICK}"
        if known_to_xla(OF_OLDER_XLA):
            flags += f" {OF_OLDER_XLA}"
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

# On a GPU the two processes of pytest share its memory: neither may take three quarters at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow, and the fixtures below only set a switch.
hypothesis.settings.register_profile(
    "adam_jax",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("adam_jax")


@pytest.fixture
def x64():
    """Float64 for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(params=["float32", "float32 under x64", "float64"])
def dtype(request):
    """The dtypes in which results must be bitwise those of optax, with and without x64."""
    jax.config.update("jax_enable_x64", "64" in request.param)
    yield request.param.split()[0]
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def promoting():
    """The arithmetic of optax and of the frameworks is not strict about dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
