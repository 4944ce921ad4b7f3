"""3×3 convolutions on the CPU in a quarter of the multiplications: Winograd's F(4×4, 3×3).

Four neighbouring answers of a convolution with three taps are part of a product of polynomials, read backwards, and a
product of degree 5 is known from its values at six points. In one dimension that is

    y = Aᵀ [(G w) ⊙ (D x)],    A = V₄, G = V₃, D = (V₆⁻¹)ᵀ,

where x are six neighbours, y four answers, and V_k has a row (1, a, …, a^(k−1)) for each point a, (0, …, 0, 1) for
infinity: 6 multiplications in place of 12, and in two dimensions 36 in place of 144. Over images and channels these are
36 products of matrices; what is done before and after them are products with small constant ones.

Sources: Winograd 1980, *Arithmetic Complexity of Computations*; Lavin & Gray 2016, *Fast Algorithms for Convolutional
Neural Networks*.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TAPS, TILE = 6, 4
POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
"""And infinity. With each a there is 1/a, which keeps the powers small: the rounding error is twice that of a plain
convolution, and with the usual 0, ±1, ±2 four times."""
CHUNK_NUMBERS = 2**19
"""Of the values of the images that are worked on at a time: they stay in the cache."""
MIN_CHANNELS, MIN_TILES = 64, 32
"""Below these the products are too small for what is done before and after them."""


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv3x3` is of use: float32 on the CPU, channels last, sides that fall into tiles, enough of both.

    Not under autocast, which has another precision in mind, and not where a graph is recorded: compilers and exports
    are to see a convolution.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    n, _, height, width = x.shape
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and min(weight.shape[:2]) >= MIN_CHANNELS
        and height % TILE == width % TILE == 0
        and n * height * width >= MIN_TILES * TILE**2
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
    )


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1), channels last in memory; it can be differentiated once.

    (N, C, H, W), (O, C, 3, 3), (O,) → (N, O, H, W), H and W being multiples of 4.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias)):
        out: Tensor = _Convolution.apply(x, weight, bias)
        return out
    return _forward(x, weight, bias)


class _Matrices(NamedTuple):
    """Both dimensions at once: D ⊗ D (36, 36), G ⊗ G (36, 9), Aᵀ ⊗ Aᵀ (16, 36)."""

    data: Tensor
    kernel: Tensor
    answer: Tensor


@functools.cache
def _matrices(dtype: torch.dtype) -> _Matrices:
    points = torch.tensor(POINTS, dtype=torch.float64)

    def powers(count: int) -> Tensor:
        infinity = torch.eye(count, dtype=torch.float64)[-1:]
        return torch.cat([points[:, None] ** torch.arange(count), infinity])

    factors = torch.linalg.inv(powers(TAPS)).T, powers(3), powers(TILE).T
    return _Matrices(*(torch.kron(factor, factor).to(dtype).contiguous() for factor in factors))


class _Room:
    """Memory that the chunks of one call use in turn; each name's piece is good until it is asked for again."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.pieces: dict[str, Tensor] = {}

    def piece(self, name: str, *shape: int) -> Tensor:
        """Numbers that anything may be written to; the first piece of a name must be its largest."""
        size = math.prod(shape)
        if name not in self.pieces:
            self.pieces[name] = self.like.new_empty(size)
        return self.pieces[name][:size].view(shape)

    def copy(self, name: str, values: Tensor) -> Tensor:
        """The values, in a row."""
        return self.piece(name, *values.shape).copy_(values)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, of matrices or of as many pairs of them."""
        return torch.matmul(a, b, out=self.piece(name, *a.shape[:-1], b.shape[-1]))


def _padded(x: Tensor) -> Tensor:
    """(N, C, H, W) → (N, H + 2, W + 2, C) in memory."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))


def _tiles(padded: Tensor) -> Tensor:
    """The overlapping tiles of `_padded` images, in place: (6, 6, N, H/4, W/4, C)."""
    n, height, width, c = padded.shape
    image, row, pixel, channel = padded.stride()
    shape = (TAPS, TAPS, n, (height - 2) // TILE, (width - 2) // TILE, c)
    return padded.as_strided(
        shape, (row, pixel, image, TILE * row, TILE * pixel, channel), storage_offset=padded.storage_offset()
    )


def _chunks(count: int, numbers: int) -> list[slice]:
    """Batches of `count` images, `numbers` being the values of one."""
    size = max(1, CHUNK_NUMBERS // numbers)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _values(tiles: Tensor, room: _Room) -> Tensor:
    """Tiles (6, 6, …, C) at the 36 pairs of points: (36, tiles, C)."""
    rows = room.copy("tiles", tiles).view(TAPS**2, -1)
    return room.product("values", _matrices(tiles.dtype).data, rows).view(TAPS**2, -1, tiles.shape[-1])


def _kernel_values(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) at the 36 pairs of points: (36, O, C)."""
    o, c, _, _ = weight.shape
    return (_matrices(weight.dtype).kernel @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(TAPS**2, o, c)


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    n, c, height, width = x.shape
    o, rows, columns = len(weight), height // TILE, width // TILE
    padded, kernel = _padded(x), _kernel_values(weight).transpose(1, 2)
    out, room = x.new_empty(n, rows, TILE, columns, TILE, o), _Room(x)
    for part in _chunks(n, TAPS**2 * rows * columns * max(c, o)):
        products = room.product("products", _values(_tiles(padded[part]), room), kernel)
        y = room.product("answers", _matrices(x.dtype).answer, products.view(TAPS**2, -1))
        torch.add(y.view(TILE, TILE, -1, rows, columns, o).permute(2, 3, 0, 4, 1, 5), bias, out=out[part])
    return out.view(n, height, width, o).permute(0, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    """`_forward`, and its adjoint: every matrix transposed, in the opposite order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        n, c, height, width = x.shape
        o, rows, columns = len(weight), height // TILE, width // TILE
        matrices, room = _matrices(x.dtype), _Room(x)
        grad_out = grad_out.permute(0, 2, 3, 1).contiguous()
        answers = grad_out.view(n, rows, TILE, columns, TILE, o).permute(2, 4, 0, 1, 3, 5)
        kernel, padded = _kernel_values(weight), _padded(x)
        grad_kernel, grad_padded = torch.zeros_like(kernel), torch.zeros_like(padded)
        for part in _chunks(n, TAPS**2 * rows * columns * max(c, o)):
            y = room.copy("answers", answers[:, :, part]).view(TILE**2, -1)
            products = room.product("products", matrices.answer.T, y).view(TAPS**2, -1, o)
            if of_weight:
                grad_kernel.baddbmm_(products.transpose(1, 2), _values(_tiles(padded[part]), room))
            if of_x:
                values = room.product("values", products, kernel)
                tiles = room.product("tiles", matrices.data.T, values.view(TAPS**2, -1))
                _add_tiles(_tiles(grad_padded[part]), tiles.view(TAPS, TAPS, -1, rows, columns, c))
        grad_x = grad_padded[:, 1:-1, 1:-1].contiguous().permute(0, 3, 1, 2) if of_x else None
        grad_weight = (matrices.kernel.T @ grad_kernel.view(TAPS**2, -1)).view(3, 3, o, c).permute(2, 3, 0, 1)
        return grad_x, grad_weight if of_weight else None, grad_out.sum((0, 1, 2)) if of_bias else None


def _add_tiles(places: Tensor, tiles: Tensor) -> None:
    """Add overlapping tiles where they belong, in four parts that do not overlap in themselves."""
    for i in (slice(TILE), slice(TILE, None)):
        for j in (slice(TILE), slice(TILE, None)):
            places[i, j] += tiles[i, j]
