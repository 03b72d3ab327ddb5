"""Fewer bits: what comes back of a number, and noise that is even and depends on the place alone."""

import math

import pytest
import torch

from training.config import BLOCK
from training.number_formats import EightBit, make_noise, merge, mix, round_stochastically, split, split_into

CPU = torch.device("cpu")
SPREAD = 5  # standard deviations that a mean may be off


def floats(*patterns: int) -> torch.Tensor:
    return torch.tensor([one - 2**32 if one >= 2**31 else one for one in patterns], dtype=torch.int32).view(
        torch.float32
    )


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def every_pattern(highs: range) -> torch.Tensor:
    """Float32 of these upper and of all lower 16 bits."""
    bits = (torch.tensor(highs)[:, None] << 16) + torch.arange(2**16)
    return bits.int().view(torch.float32).flatten()


def test_a_weight_and_its_remainder_are_the_exact_number():
    # Zeros and denormals, one, the largest numbers up to infinity: each with both signs, and with every lower half.
    for high in (0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3FFF, 0x7F7F):
        for numbers in (every_pattern(range(high, high + 1)), -every_pattern(range(high, high + 1))):
            weight, remainder = split(numbers)
            assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
            assert same_bits(merge(weight, remainder), numbers)
            half = 2.0 ** max(-134, math.frexp(abs(numbers[-1].item()))[1] - 9)  # of a unit of bfloat16
            finite = weight.isfinite()
            assert (weight.double() - numbers.double())[finite].abs().max() <= half
    any_bits = torch.randint(-(2**31), 2**31, (10**6,), generator=torch.Generator().manual_seed(0)).int()
    numbers = any_bits.view(torch.float32)
    numbers = numbers[~numbers.isnan()]
    assert same_bits(merge(*split(numbers)), numbers)


def test_ties_are_rounded_away_from_zero_and_the_largest_to_infinity():
    ties = floats(0x3F808000, 0x3F818000, 0xBF808000, 0x00008000, 0x80008000, 0x7F7F7FFF, 0x7F7F8000, 0xFF7FFFFF)
    bits = split(ties)[0].view(torch.int16).int() & 0xFFFF
    assert bits.tolist() == [0x3F81, 0x3F82, 0xBF81, 0x0001, 0x8001, 0x7F7F, 0x7F80, 0xFF80]
    assert same_bits(merge(*split(ties)), ties)


def test_infinity_and_nan_stay_what_they_are():
    infinite = floats(0x7F800000, 0xFF800000)
    assert torch.equal(split(infinite)[0].float(), infinite) and same_bits(merge(*split(infinite)), infinite)
    nans = floats(0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001)  # the second one is what GPUs make
    noise = torch.full((4,), 0xFFFF, dtype=torch.int32)
    assert split(nans)[0].isnan().all() and merge(*split(nans)).isnan().all()
    assert round_stochastically(nans, noise).isnan().all()
    upper = ((nans.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    assert not upper.isnan().all(), "control: rounded as numbers, a diverged run would go on from zeros"


def test_control_a_tie_that_is_rounded_to_even_does_not_come_back():
    ties = floats(0x3F808000, 0x3F818000)  # down to 3F80 and up to 3F82, with the same lower half
    remainder = split(ties)[1]
    assert same_bits(merge(split(ties)[0], remainder), ties)
    assert not same_bits(merge(ties.bfloat16(), remainder), ties)


def test_a_box_is_split_into_its_place():
    weight, remainder = torch.zeros(4, 6, dtype=torch.bfloat16), torch.zeros(4, 6, dtype=torch.int16)
    box = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    split_into(weight, remainder, (1, 2), box)
    whole = torch.zeros(4, 6)
    whole[1:3, 2:5] = box
    assert torch.equal(merge(weight, remainder), whole)


def noise_of(seed: int, shape: tuple[int, int] = (64, 250)) -> torch.Tensor:
    return make_noise(mix(torch.tensor(seed)), shape[1], (0, 0), shape, CPU)


def test_noise_is_even_and_independent():
    noise = torch.stack([noise_of(seed) for seed in range(20)])
    assert noise.dtype == torch.int32 and noise.min() >= 0 and noise.max() < 2**16
    count = noise.numel()
    deviation = 2**16 / math.sqrt(12)
    assert abs(noise.double().mean() - (2**16 - 1) / 2) < SPREAD * deviation / math.sqrt(count)
    for bit in range(16):
        ones = (noise >> bit & 1).double().mean()
        assert abs(ones - 0.5) < SPREAD * 0.5 / math.sqrt(count), bit
    centered = noise.double() - noise.double().mean()

    def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
        return ((one * other).mean() / deviation**2).item()

    # Of neighbors in a row, which share a hash, in a column, and of other keys.
    for distance in range(1, 6):
        assert abs(correlation(centered[..., distance:], centered[..., :-distance])) < 2 * SPREAD / math.sqrt(count)
    assert abs(correlation(centered[:, 1:], centered[:, :-1])) < 2 * SPREAD / math.sqrt(count)
    assert abs(correlation(centered[1:], centered[:-1])) < 2 * SPREAD / math.sqrt(count)
    assert correlation(centered, centered) == pytest.approx(1, abs=0.02)  # control
    assert len(mix(torch.arange(10**5)).unique()) == 10**5


@pytest.mark.parametrize("width", [7, 8, 250])
def test_noise_depends_on_the_place_and_not_on_the_part(width):
    whole = make_noise(torch.tensor(5), width, (0, 0), (9, width), CPU)
    for (row, column), (rows, columns) in (((0, 0), (9, 3)), ((4, 1), (2, 5)), ((8, 5), (1, 2)), ((3, 4), (3, 2))):
        part = make_noise(torch.tensor(5), width, (row, column), (rows, columns), CPU)
        assert torch.equal(part, whole[row : row + rows, column : column + columns])


def test_stochastic_rounding_is_right_in_the_mean():
    numbers = torch.randn(200, generator=torch.Generator().manual_seed(1))
    unit = (split(numbers.abs())[0].float() * 2**-7).double()  # at least that of bfloat16
    repeats = 4000
    noise = torch.cat([noise_of(seed, (1, 200)) for seed in range(repeats)])
    rounded = round_stochastically(numbers.expand(repeats, -1).contiguous(), noise)
    assert len(rounded[:, 0].unique()) == 2
    error = (rounded.double().mean(0) - numbers.double()).abs() / unit
    assert error.max() < SPREAD * 0.5 / math.sqrt(repeats)
    nearest = (numbers.bfloat16().double() - numbers.double()).abs() / unit
    assert nearest.max() > 5 * SPREAD * 0.5 / math.sqrt(repeats), "control: nearest rounding is not"


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.optim.quant_utils")


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_are_torchaos(torchao, signed):
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randn(64 * BLOCK, generator=generator) * torch.logspace(-6, 0, 64 * BLOCK)
    numbers = numbers if signed else numbers.square()
    form = EightBit(signed, CPU)
    codes, scales = form.pack(numbers)
    scaled, its_scales = torchao.scale_tensor(numbers, BLOCK)
    its_codes = torchao.quantize_8bit_with_qmap(scaled, form.values)
    assert torch.equal(codes, its_codes.clamp(min=form.lowest)) and torch.equal(scales, its_scales)
    assert torch.equal(form.unpack(codes, scales), torchao.dequant_with_qmap(codes, form.values, scales))


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_of_zeros_and_of_what_is_not_finite(torchao, signed):
    form = EightBit(signed, CPU)
    assert not form.unpack(*form.pack(torch.zeros(BLOCK))).any()
    assert not form.unpack(torch.zeros(BLOCK, dtype=torch.uint8), torch.zeros(1)).any(), "as a state begins"
    broken = torch.ones(BLOCK)
    broken[3] = math.nan
    assert form.unpack(*form.pack(broken))[3].isnan()


def test_a_small_mean_of_squares_does_not_become_zero(torchao):
    """Beside one that is 10^8 times as large. Divided by its root, a zero would make an update that explodes."""
    squares = torch.full((BLOCK,), 1e-12)
    squares[0] = 1e-4
    form = EightBit(False, CPU)
    codes, scales = form.pack(squares)
    assert (form.unpack(codes, scales) >= squares * 0.9).all()
    form.lowest = 0
    assert not form.unpack(*form.pack(squares))[1:].any()  # control
