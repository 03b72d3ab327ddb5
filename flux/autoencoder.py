"""The FLUX.1 autoencoder: pixels to 8 times smaller latents and back, with the names of the original `ae.safetensors`.

A convolutional variational autoencoder (Rombach et al. 2022, arXiv 2112.10752, appendix G) without the two 1 x 1
"quant" convolutions of older ones. It is frozen everywhere but in scripts/train_autoencoder.py.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flux.spec import CodecConfig

NORM_EPS = 1e-6
# The embedded autoencoder brings the smooth picture of `make_smooth_picture` back at 38 dB; a gray picture, the best
# that random weights can do, has 11 dB.
MIN_RECONSTRUCTION_DB = 18.0

VAE_CONFIG, VAE_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # in a diffusers folder
Renaming = Callable[[dict[str, Tensor]], dict[str, Tensor]]
REMEDY = (
    "use the embedded assets/tiny/autoencoder.safetensors, or get FLUX.1's with `python -m scripts.download_assets`"
)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder. Defaults are FLUX.1's (83,819,683 parameters)."""

    channels: int = 128  # at full resolution; a multiple of 32
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # one per level; each level but the last halves the picture
    blocks_per_level: int = 2  # the decoder has one more
    latent_channels: int = 16

    @property
    def widths(self) -> list[int]:
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def norm_groups(self) -> int:
        """32 as in FLUX.1, fewer in a narrow model: a norm over fewer than 4 channels wipes out plain colors."""
        return min(32, self.channels // 4)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a skip, which gets a 1 x 1 convolution when the width changes."""

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return self.nin_shortcut(x_BCHW) + h_BCHW


class AttentionBlock(nn.Module):
    """Single-head attention over all places of the smallest grid."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        q_BTC, k_BTC, v_BTC = (
            project(h_BCHW).flatten(2).transpose(1, 2).contiguous() for project in (self.q, self.k, self.v)
        )
        h_BTC = F.scaled_dot_product_attention(q_BTC[:, None], k_BTC[:, None], v_BTC[:, None])[:, 0]
        return x_BCHW + self.proj_out(h_BTC.transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # NOTE: padded on the right and at the bottom only; symmetric padding would shift the grid by half a pixel.
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Level(nn.Module):
    """The residual blocks of one resolution and, except at a path's end, the change to the next one."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, groups: int, resample: str | None):
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairwise(widths))
        if resample == "downsample":
            self.downsample = Downsample(channels_out)
        elif resample == "upsample":
            self.upsample = Upsample(channels_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for block in self.block:
            x_BCHW = block(x_BCHW)
        if hasattr(self, "downsample"):
            return self.downsample(x_BCHW)
        return self.upsample(x_BCHW) if hasattr(self, "upsample") else x_BCHW


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        groups, widths = config.norm_groups, config.widths
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (above, width) in enumerate(pairwise([config.channels, *widths])):
            resample = "downsample" if i < len(widths) - 1 else None
            self.down.append(Level(above, width, config.blocks_per_level, groups, resample))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(pixels_BCHW)
        for level in self.down:
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        groups, widths = config.norm_groups, config.widths
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()  # up.0 is the full resolution and runs last
        for i, (width, below) in enumerate(pairwise([*widths, widths[-1]])):
            resample = "upsample" if i > 0 else None
            self.up.append(Level(below, width, config.blocks_per_level + 1, groups, resample))
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(latents_BCHW))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class Autoencoder(nn.Module):
    """Latents here are native: not normalized, on the grid of the autoencoder. flux/codec.py makes tokens of them."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels in -1..1, [B, 3, H, W], to moments [B, 2 * latent_channels, H/8, W/8]: means, then log-variances."""
        return self.encoder(pixels_BCHW)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Latents [B, latent_channels, H, W] to pixels [B, 3, 8H, 8W], around -1..1 but not clamped."""
        return self.decoder(latents_BCHW)


class AutoencoderFile(NamedTuple):
    """A file that holds an autoencoder which fits."""

    path: Path
    config: AutoencoderConfig
    to_native: Renaming | None  # gives its tensors our names; None: they have them


def open_autoencoder(path: str | Path, codec: CodecConfig, to_native: Renaming | None = None) -> AutoencoderFile:
    """What `load_autoencoder` would load, from names and shapes: no weight is read. Whether it is trained stays open.

    The arguments are those of `load_autoencoder`.

    Raises:
        ValueError: no such file, not safetensors, damaged, another architecture or channel count.
    """
    file = _find_weights(Path(path), codec)
    shapes = read_shapes(file)
    renaming = to_native if any(key.startswith("encoder.down_blocks.") for key in shapes) else None
    if renaming is not None:
        shapes = _rename_shapes(shapes, renaming, file)
    config = config_from_shapes(shapes, file)
    if config.latent_channels != codec.latent_channels:
        rule = f"has {config.latent_channels} latent channels, but the flavor needs {codec.latent_channels}"
        raise _error(path, rule)
    check_shapes(shapes, config, file)
    return AutoencoderFile(file, config, renaming)


def load_autoencoder(
    path: str | Path,
    codec: CodecConfig,
    dtype: torch.dtype | None,
    device: torch.device | str,
    to_native: Renaming | None = None,
) -> Autoencoder:
    """A frozen autoencoder in eval mode. Its sizes are read from the file, and it has to prove that it is trained.

    Args:
        path: `encoder.autoencoder_path`, a safetensors file or the `vae` folder of a diffusers pipeline.
        codec: of the flavor, whose latents it must make.
        dtype: of weights and computation; None: that of the file.
        device: where it lives.
        to_native: gives tensors with the names of diffusers ours; None: only ours are known.

    Raises:
        ValueError: no such file, not safetensors, damaged, another architecture or channel count, not trained.
    """
    opened = open_autoencoder(path, codec, to_native)
    with torch.device("meta"):
        autoencoder = Autoencoder(opened.config)
    weights = load_file(opened.path, device=str(device))
    if opened.to_native is not None:
        weights = opened.to_native(weights)
    weights = {key: tensor.to(dtype=dtype) for key, tensor in weights.items()}
    autoencoder.load_state_dict(weights, strict=True, assign=True)
    autoencoder.eval().requires_grad_(False)

    psnr = reconstruction_psnr(autoencoder, make_smooth_picture().to(device))
    if not psnr >= MIN_RECONSTRUCTION_DB:  # also true for NaN
        rule = f"a smooth picture must come back at {MIN_RECONSTRUCTION_DB} dB or more and comes back at {psnr:.1f}"
        raise _error(path, f"is not a trained autoencoder ({rule})")
    return autoencoder


def _find_weights(path: Path, codec: CodecConfig) -> Path:
    """The file itself, or that of a folder whose config.json scales latents as the flavor does."""
    if not path.is_dir():
        return path
    try:
        values = json.loads((path / VAE_CONFIG).read_text(encoding="utf-8"))
        scaling = values["scaling_factor"], values["shift_factor"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"is a folder, and must then hold {VAE_CONFIG} and {VAE_WEIGHTS} of diffusers' AutoencoderKL"
        raise _error(path, rule) from error
    if scaling != (codec.scale, codec.shift):
        needed = f"{codec.scale} and {codec.shift}"
        raise _error(path, f"scales and shifts latents by {scaling[0]} and {scaling[1]}, but the flavor by {needed}")
    return path / VAE_WEIGHTS


def _rename_shapes(
    shapes: Mapping[str, tuple[int, ...]], to_native: Renaming, path: Path
) -> dict[str, tuple[int, ...]]:
    try:
        renamed = to_native({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    except ValueError as error:
        raise _error(path, f"is not a FLUX.1 autoencoder: {error}") from None
    return {key: tuple(tensor.shape) for key, tensor in renamed.items()}


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file; the tensors are not read.

    Raises:
        ValueError: no such file, another format, damaged.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise _error(path, "is not a .safetensors file; other formats can run code when opened and are refused")
    if not path.is_file():
        raise _error(path, "is not there" if not path.exists() else "is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _error(path, f"cannot be read, it is damaged, cut off or not safetensors inside ({error})") from error


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], path: str | Path) -> AutoencoderConfig:
    """The sizes that a file's shapes imply; `check_shapes` then tells whether all of it fits.

    Raises:
        ValueError: the names that carry the sizes are not there.
    """
    if any(key.startswith("encoder.down_blocks.") for key in shapes):
        raise _error(path, "has the names of diffusers' AutoencoderKL, but the original names are needed")
    levels = len({match[1] for key in shapes if (match := re.match(r"encoder\.down\.(\d+)\.block\.0\.", key))})
    blocks = len({match[1] for key in shapes if (match := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key))})
    try:
        channels = shapes["encoder.conv_in.weight"][0]
        widths = [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)]
        latent_channels = shapes["decoder.conv_in.weight"][1]
    except (KeyError, IndexError) as error:
        raise _error(path, f"is not a FLUX.1 autoencoder, {error} is missing or has no such dim") from error
    config = AutoencoderConfig(channels, tuple(width // channels for width in widths), blocks, latent_channels)
    if not widths or config.widths != widths or channels < 4 or channels % config.norm_groups:
        raise _error(path, f"is not a FLUX.1 autoencoder, its levels have {[channels, *widths]} channels")
    return config


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: AutoencoderConfig, path: str | Path) -> None:
    """Compares a file's names and shapes with the model's, both ways.

    Raises:
        ValueError: a tensor is missing, foreign or of another shape.
    """
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in Autoencoder(config).state_dict().items()}
    faults = {
        "lacks": [key for key in expected if key not in shapes],
        "has the foreign": [key for key in shapes if key not in expected],
        "has another shape for": [key for key in expected if key in shapes and shapes[key] != expected[key]],
    }
    found = [
        f"{verb} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for verb, keys in faults.items()
        if keys
    ]
    if found:
        raise _error(path, "is not a FLUX.1 autoencoder, it " + ", ".join(found))


def make_smooth_picture(side: int = 64) -> Tensor:
    """Pixels [1, 3, side, side] in -1..1: one color ramp per channel, each in another direction."""
    ramp = torch.linspace(-0.9, 0.9, side)
    down_HW, right_HW = torch.meshgrid(ramp, ramp, indexing="ij")
    return torch.stack((right_HW, down_HW, -(right_HW + down_HW) / 2))[None]


@torch.no_grad()
def reconstruction_psnr(autoencoder: Autoencoder, pixels_BCHW: Tensor) -> float:
    """Decibels between pixels in -1..1 and their reconstruction from the posterior mean."""
    mean_BCHW, _ = autoencoder.encode(pixels_BCHW.to(autoencoder.encoder.conv_in.weight.dtype)).chunk(2, dim=1)
    error_BCHW = autoencoder.decode(mean_BCHW).float().clamp(-1, 1) - pixels_BCHW
    return 10 * math.log10(4 / max(error_BCHW.square().mean().item(), 1e-12))


def _error(path: str | Path, fault: str) -> ValueError:
    return ValueError(f"encoder.autoencoder_path={str(path)!r} {fault}: {REMEDY}")
