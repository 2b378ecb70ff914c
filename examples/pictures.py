"""Pictures of two objects, as in Multi-MNIST: one at the top left of the canvas, one at the bottom right."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def compose(left: NDArray[np.uint8], right: NDArray[np.uint8], canvas: int) -> NDArray[np.uint8]:
    """N x canvas x canvas pictures: `left` at the top left, `right` at the bottom right, combined by maximum.

    Args:
        left, right: N x H x W each, H and W at most `canvas`.
    """
    n, height, width = left.shape
    pictures = np.zeros((n, canvas, canvas), left.dtype)
    pictures[:, :height, :width] = left
    corner = pictures[:, canvas - height :, canvas - width :]
    np.maximum(corner, right, out=corner)
    return pictures


def draw_pairs(
    left: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    right: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    count: int,
    canvas: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """`count` pictures of random pairs.

    Args:
        left, right: (images, labels) to draw from, with replacement.

    Returns:
        uint8 pictures, count x 1 x canvas x canvas, and int64 labels, count x 2 (left, right).
    """
    i = rng.integers(len(left[0]), size=count)
    j = rng.integers(len(right[0]), size=count)
    pictures = compose(left[0][i], right[0][j], canvas)
    labels = np.stack([left[1][i], right[1][j]], axis=1).astype(np.int64)
    return torch.from_numpy(pictures)[:, None], torch.from_numpy(labels)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an idx file of bytes (the format of MNIST and Fashion-MNIST), gzipped or not."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an idx file of bytes")
    dims = data[3]
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", dims, offset=4))
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{path}: {values.size} bytes of data, but its header says {shape}")
    return values.reshape(shape)


def find_idx(folder: Path, *names: str) -> Path:
    """The first of `names` that is in `folder`, with or without `.gz`."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{folder} holds none of: {', '.join(names)} (or with .gz)")
