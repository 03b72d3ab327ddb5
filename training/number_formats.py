"""Numbers of fewer bits in which an optimizer keeps weights and running means between its steps.

Everything is elementwise or along a row, of plain tensors, without random state and without waiting for the device.
"""

from collections.abc import Sequence
from math import inf, nan

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from training.config import BLOCK

# Of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), as signed numbers.
_STEP, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_LANES = 4  # 16-bit numbers in a hash


def split(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 -> the nearest bfloat16 and, as int16, what its bits lack of those of the number.

    Half of a unit is rounded away from zero: where it is rounded to even, 16 bits do not tell which way it went. NaN
    stays NaN, though not of the same bits: those that GPUs make would be rounded up into a zero.
    """
    bits = _bits(exact)
    return _upper_half(bits + 0x8000), bits.to(torch.int16)


def merge(weight: Tensor, remainder: Tensor) -> Tensor:
    """What `split` was given, to the bit."""
    return weight.view(torch.int16).int().bitwise_left_shift_(16).add_(remainder).view(torch.float32)


def split_into(weight: Tensor, remainder: Tensor, first: Sequence[int], exact: Tensor) -> None:
    """Puts float32 numbers, of a box that begins at `first`, into weights and their remainders."""
    box = tuple(slice(start, start + size) for start, size in zip(first, exact.shape, strict=True))
    weight[box], remainder[box] = split(exact)


def round_stochastically(exact: Tensor, noise: Tensor) -> Tensor:
    """Float32 -> one of the two bfloat16 next to it, the nearer the likelier, so that the mean is exact.

    Args:
        noise: evenly distributed int32 from 0 to 65535, of the same shape.
    """
    return _upper_half(_bits(exact).add_(noise))


def make_noise(key: Tensor, width: int, first: tuple[int, int], shape: tuple[int, int], device: torch.device) -> Tensor:
    """Int32 from 0 to 65535, evenly distributed: a function of the key and of the element's place in a matrix.

    Args:
        key: int64 [], on any device; a small difference shifts the noise, so take what looks random.
        width: columns of the whole matrix.
        first: row and column at which the part of it begins that the noise is for.
        shape: of that part.
        device: of the noise.
    """
    (row, column), (rows, columns) = first, shape
    begin, end, per_row = column // _LANES, -(-(column + columns) // _LANES), -(-width // _LANES)
    places = torch.arange(row, row + rows, device=device)[:, None] * per_row
    hashes = mix((places + torch.arange(begin, end, device=device)).add_(key))
    return hashes.view(torch.int16).narrow(1, column - begin * _LANES, columns).int().bitwise_and_(0xFFFF)


def mix(numbers: Tensor) -> Tensor:
    """Int64 -> int64 whose bits look random, another one for each number."""
    mixed = numbers * _STEP
    mixed.bitwise_xor_(_shift(mixed, 30)).mul_(_FIRST)
    mixed.bitwise_xor_(_shift(mixed, 27)).mul_(_SECOND)
    return mixed.bitwise_xor_(_shift(mixed, 31))


def _shift(numbers: Tensor, by: int) -> Tensor:
    """To the right, filled up with zeros."""
    return (numbers >> by).bitwise_and_(2 ** (64 - by) - 1)


def _bits(exact: Tensor) -> Tensor:
    return exact.nan_to_num(nan=nan, posinf=inf, neginf=-inf).view(torch.int32)


def _upper_half(bits: Tensor) -> Tensor:
    return bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


class EightBit:
    """Numbers of 8 bits with a scale for each BLOCK of neighbors (arXiv 2110.02861, section 2).

    Args:
        signed: whether numbers may be negative; others have a bit more, and only zeros become zero: a mean of squares
            that was rounded to zero would make its update too large by orders of magnitude.
        device: of the numbers.
    """

    def __init__(self, signed: bool, device: torch.device):
        from torchao.optim.quant_utils import create_dynamic_map

        with _disable_current_modes():  # a dry run has tensors without content
            table = create_dynamic_map(signed)
        self.values = torch.tensor(table, device=device)  # of the codes 0 to 255, rising
        self.limits = (self.values[1:] + self.values[:-1]) / 2
        self.lowest = 0 if signed else 1

    def pack(self, exact: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 -> uint8 codes of the same shape [..., n * BLOCK], and the float32 scales of all blocks, [..., n]."""
        blocks = exact.unflatten(-1, (-1, BLOCK))
        scales = blocks.abs().amax(dim=-1)
        # torchao searches in 16 passes over 64-bit numbers what this finds in one.
        codes = torch.bucketize(blocks / scales.clamp(min=1e-30)[..., None], self.limits, out_int32=True, right=True)
        return codes.clamp_(min=self.lowest).to(torch.uint8).flatten(-2), scales

    def unpack(self, codes: Tensor, scales: Tensor) -> Tensor:
        values = self.values.index_select(0, codes.int().flatten()).view(codes.shape)
        return values.unflatten(-1, (-1, BLOCK)).mul_(scales[..., None]).flatten(-2)
