"""Random gradients for tests, and the kernels' definitions in float64 numpy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(5,), (3, 4), (), (0,), (2, 3, 4, 5), (2100,)]


def random_row(seed: int, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def random_rows(tasks: int, seed: int = 0, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[list[Tensor]]:
    return [random_row(1000 * seed + i, dtype, shapes) for i in range(tasks)]


def flat(rows: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for row in rows for tensor in row]


def vector(row: list[Tensor]) -> np.ndarray:
    """A row as one float64 vector, in the logical order of its elements."""
    return np.concatenate([np.zeros(0), *(t.detach().cpu().to(torch.float64).numpy().ravel() for t in row)])


def matrix(rows: list[list[Tensor]]) -> np.ndarray:
    return np.stack([vector(row) for row in rows])


def differences(loss_rows: list[list[Tensor]], perturbed_rows: list[list[Tensor]]) -> np.ndarray:
    """f = s - g, rounded to float32 for narrow rows."""
    f = matrix(perturbed_rows) - matrix(loss_rows)
    return f if loss_rows[0][0].dtype == torch.float64 else f.astype(np.float32).astype(np.float64)


def gramian(x: np.ndarray) -> np.ndarray:
    """x x' with exact products summed in extended precision."""
    wide = x.astype(np.longdouble)
    return (wide @ wide.T).astype(np.float64)


def assert_gramian(actual: Tensor, x: np.ndarray, tolerance: float = 1e-13) -> None:
    """|G_ij - <x_i, x_j>| <= tolerance ||x_i|| ||x_j||."""
    expected = gramian(x)
    norms = np.sqrt(expected.diagonal())
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float64
    error = np.abs(actual.cpu().numpy() - expected)
    assert np.all(error <= tolerance * np.outer(norms, norms)), error.max()


def rounded(values: np.ndarray, row: list[Tensor]) -> list[Tensor]:
    """A float64 vector cut like a row, each number rounded once to its dtype."""
    out, begin = [], 0
    for tensor in row:
        piece = values[begin : begin + tensor.numel()]
        out.append(torch.from_numpy(piece.copy()).reshape(tensor.shape).to(tensor.dtype))
        begin += tensor.numel()
    return out


def assert_row(actual: list[Tensor], values: np.ndarray, row: list[Tensor]) -> None:
    """`values` rounded to the dtype: equal but for ties that the last bit of the sum decides."""
    for got, want in zip(actual, rounded(values, row), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        torch.testing.assert_close(got.cpu(), want, rtol=1.5 * torch.finfo(want.dtype).eps, atol=1e-12)
