"""What the command lines of several examples have in common."""

import argparse
import importlib.metadata
import platform

import jax


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def hardware() -> str:
    """The machine and the versions that numbers were measured with."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax"))
    device = jax.devices()[0]
    return (
        f"{device.device_kind} ({device.platform}), {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}"
    )
