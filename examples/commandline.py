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


OPTIONS = {
    "steps": (positive, "training steps"),
    "epochs": (positive, "passes over the data"),
    "seeds": (positive, "runs of each method"),
    "seed": (int, "of weights and batches"),
    "plot": (new_file, "the picture"),
    "directory": (directory, "where to write the pictures"),
}


def parser(description: str | None, **defaults: int | str) -> argparse.ArgumentParser:
    """Has those of the OPTIONS that get a default here; a program adds its own."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in defaults.items():
        kind, what = OPTIONS[name]
        told = f"{what} (default: %(default)s)"
        made.add_argument(f"--{name}", type=kind, default=default, help=told)
    return made


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
