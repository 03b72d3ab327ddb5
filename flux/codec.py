"""Pixels to latents in token order and back: the autoencoder, then normalization, then 2 x 2 patches.

Native latents lie on the autoencoder's grid, [B, latent_channels, 2 rows, 2 columns]; tokens are [B, T, C] with
T = rows * columns in reading order and C = 4 * latent_channels, ordered channel, row in the patch, column in the patch,
as in Black Forest Labs' and diffusers' code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.autoencoder import Autoencoder
from flux.spec import CodecConfig

# What diffusers clamps log-variances to; a trained encoder stays far inside.
LOGVAR_RANGE = (-30.0, 20.0)


def to_tokens(x_BCHW: Tensor) -> Tensor:
    """Native grid [B, c, 2 rows, 2 columns] to tokens [B, rows * columns, 4 c]."""
    return F.pixel_unshuffle(x_BCHW, 2).flatten(2).transpose(1, 2)


def to_grid(x_BTC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverse of `to_tokens`; `grid` is (rows, columns) of tokens."""
    return F.pixel_shuffle(x_BTC.transpose(1, 2).unflatten(2, grid), 2)


def draw_noise(generator: torch.Generator, config: CodecConfig, grid: tuple[int, int]) -> Tensor:
    """Standard normal noise of one picture in token order, [T, C] fp32 on the generator's device.

    Drawn on the native grid, so a seed gives the noise that diffusers' FluxPipeline draws from it.
    """
    rows, columns = grid
    shape = (1, config.latent_channels, 2 * rows, 2 * columns)
    return to_tokens(torch.randn(shape, generator=generator, device=generator.device))[0]


class LatentCodec:
    """A frozen autoencoder with the normalization of one flavor.

    Nothing here records a graph, and nothing runs in inference mode: latents enter the graph of the transformer.

    Args:
        autoencoder: frozen, its dtype is the one the pictures are encoded in. None: all moments are stored ones, and
            nothing is drawn.
        config: shift and scale that bring native latents to about mean 0 and deviation 1.
    """

    def __init__(self, autoencoder: Autoencoder | None, config: CodecConfig):
        self.autoencoder = autoencoder
        self.config = config

    def encode(self, pixels_BCHW: Tensor, posterior_noise_BTC: Tensor | None = None) -> Tensor:
        """Pixels in -1..1, sides multiples of 16, to latents_BTC in fp32.

        Args:
            pixels_BCHW: pictures.
            posterior_noise_BTC: standard normal, for a sample of the posterior; None for its mean.
        """
        return self.latents(self.moments(pixels_BCHW), posterior_noise_BTC)

    @torch.no_grad()
    def moments(self, pixels_BCHW: Tensor) -> Tensor:
        """Means and log-variances, [B, 2 * latent_channels, H/8, W/8], in the autoencoder's dtype."""
        assert self.autoencoder is not None
        dtype = self.autoencoder.encoder.conv_in.weight.dtype
        return self.autoencoder.encode(pixels_BCHW.to(dtype))

    @torch.no_grad()
    def latents(self, moments_BCHW: Tensor, posterior_noise_BTC: Tensor | None = None) -> Tensor:
        """Moments to latents_BTC in fp32: the mean, or mean + deviation * noise."""
        mean_BTC, logvar_BTC = (to_tokens(half_BCHW) for half_BCHW in moments_BCHW.float().chunk(2, dim=1))
        if posterior_noise_BTC is not None:
            mean_BTC = mean_BTC + torch.exp(0.5 * logvar_BTC.clamp(*LOGVAR_RANGE)) * posterior_noise_BTC
        return (mean_BTC - self.config.shift) * self.config.scale

    @torch.no_grad()
    def decode(self, latents_BTC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents to pixels_BCHW in fp32, clamped to -1..1; `grid` is (rows, columns) of tokens."""
        assert self.autoencoder is not None
        native_BCHW = to_grid(latents_BTC.float() / self.config.scale + self.config.shift, grid)
        dtype = self.autoencoder.decoder.conv_in.weight.dtype
        return self.autoencoder.decode(native_BCHW.to(dtype)).float().clamp(-1, 1)
