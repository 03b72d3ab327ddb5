"""Randomness keyed by what it is for, never by who draws it.

Every random draw of training comes from `(seed, stream, position)`, position being the sample's place in the endless
global order. So batch size, worker count, accumulation, layout and resume cannot change a draw, and nothing about
random state has to be saved.
"""

import hashlib

import torch


def keyed_generator(seed: int, stream: str, position: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one draw.

    Args:
        seed: `debug.seed` of the run.
        stream: what the draw is for ("timestep", "noise", ...); different streams are independent.
        position: the sample's place in the endless global order, or a parameter's name for initialization.
        device: where the numbers are drawn; training draws stay on the CPU.
    """
    # 63 bits: manual_seed takes a signed 64-bit integer.
    return torch.Generator(device=device).manual_seed(keyed_bits(seed, stream, position) >> 1)


def keyed_bits(seed: int, stream: str, position: int | str) -> int:
    """64 random bits for one draw, under the same key as a `keyed_generator`."""
    key = hashlib.blake2b(f"{seed}|{stream}|{position}".encode(), digest_size=8).digest()
    return int.from_bytes(key, "big")
