"""Strict promotion, eight host devices, and both float widths for every test that asks."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# On a GPU the two processes of pytest share its memory: neither may take three quarters at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax
import pytest

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
