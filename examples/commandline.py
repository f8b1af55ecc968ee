"""What the command lines of several examples have in common."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

import jax


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def directory(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {text}")
    return Path(text)


def new_file(text: str) -> Path:
    """A file to write, whose directory is there: told before any work is done."""
    directory(str(Path(text).absolute().parent))
    return Path(text)


def hardware(*others: str) -> str:
    """The machine and the versions of jax, optax and those of `others` that are installed."""
    there = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    names = [name for name in ("jax", "optax", *others) if name in there]
    versions = ", ".join(f"{name} {there[name]}" for name in names)
    device = jax.devices()[0]
    return (
        f"{device.device_kind} ({device.platform}), {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {versions}"
    )
