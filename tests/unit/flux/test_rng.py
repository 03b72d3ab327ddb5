"""A key names its numbers: nothing else does."""

import torch

from flux.rng import keyed_generator


def numbers(*key) -> torch.Tensor:
    return torch.rand(8, generator=keyed_generator(*key))


def test_the_same_key_gives_the_same_numbers_whatever_was_drawn_before():
    first = numbers(3, "noise", 17)
    numbers(3, "noise", 18)
    torch.manual_seed(99)
    assert torch.equal(first, numbers(3, "noise", 17))


def test_every_part_of_the_key_matters():
    keys = [
        (3, "noise", 17),
        (4, "noise", 17),
        (3, "timestep", 17),
        (3, "noise", 18),
        (3, "noise", "17.weight"),
        (31, "noise", 7),
    ]
    drawn = {tuple(numbers(*key).tolist()) for key in keys}
    assert len(drawn) == len(keys)


def test_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    numbers(0, "crop", 0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_far_positions_and_large_seeds():
    assert numbers(2**63 - 1, "noise", 10**12).shape == (8,)
