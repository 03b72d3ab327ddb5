"""Trains the small autoencoder of `assets/tiny` on a CPU, in the latent units of FLUX.1.

    python -m scripts.train_autoencoder --out outputs/autoencoder.safetensors

It sees no photograph: half of its pictures are the recipe's own shapes, the others are gradients, noise with the
spectrum of natural pictures, stripes, and heaps of overlapping leaves filled with all of these. It is good enough for
trials at 64 px, not for training on photographs: that is what FLUX.1's own autoencoder is for.

Two things make its latents easy to generate. They have the mean and the deviation FLUX.1's latents have, so the codec
of every flavor fits. And the decoder learns with noise on its latents, so it forgives what a young model gets wrong.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from flux.autoencoder import Autoencoder, AutoencoderConfig, ResidualBlock
from flux.data.shapes import ShapesSource
from flux.spec import CodecConfig

CONFIG = AutoencoderConfig(channels=32, channel_multipliers=(1, 1, 1, 2), blocks_per_level=1)
SIDE = 64
PHOTOGRAPH_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
POSTERIOR_STD = 0.05  # of the normalized latents: fixed, and small beside the noise the decoder is trained with
MAX_LATENT_NOISE = 0.2  # of the normalized latents, deviation drawn uniformly from zero up to this for each picture
SPREAD_WEIGHT = 0.05  # of the penalty that keeps each latent channel at mean 0 and deviation 1
WARMUP_STEPS = 100
CROP_SIDE = 32  # the first steps see a quarter of each picture: four times cheaper, and most of it is local
CROP_SHARE = 0.7  # of the steps
FOLD_BATCHES = 128  # that the spread of the latents is measured on
EVALUATION_PICTURES = 256


def draw_gradient(rng: np.random.Generator) -> np.ndarray:
    """Two or four colors blended along a line, around a point, or between the corners."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
    colors = rng.random((4, 3))
    kind = rng.integers(3)
    if kind == 0:
        angle = rng.uniform(0, 2 * math.pi)
        ramp = x * math.cos(angle) + y * math.sin(angle)
    elif kind == 1:
        ramp = np.hypot(x - rng.random(), y - rng.random())
    else:
        top = colors[0] * (1 - x[..., None]) + colors[1] * x[..., None]
        bottom = colors[2] * (1 - x[..., None]) + colors[3] * x[..., None]
        return top * (1 - y[..., None]) + bottom * y[..., None]
    ramp = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    return colors[0] + (colors[1] - colors[0]) * ramp[..., None]


def draw_clouds(rng: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude falls with the frequency as in photographs, mostly shared by the three colors."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :])
    frequency[0, 0] = 1.0
    fall = frequency ** -rng.uniform(0.8, 2.0)
    fall[0, 0] = 0.0
    noise = rng.standard_normal((4, SIDE, SIDE))
    waves = np.fft.irfft2(np.fft.rfft2(noise) * fall, s=(SIDE, SIDE))
    waves /= waves.std(axis=(1, 2), keepdims=True)
    waves = waves[0] * rng.uniform(0.4, 1.0) + waves[1:] * rng.uniform(0.0, 0.5)
    return np.clip(rng.random(3) + rng.uniform(0.05, 0.3) * np.moveaxis(waves, 0, -1), 0, 1)


def draw_stripes(rng: np.random.Generator) -> np.ndarray:
    """A wave or a checkerboard between two colors, soft or hard."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    angle, period = rng.uniform(0, math.pi), rng.uniform(5, 40)
    wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period + rng.uniform(0, 6.3))
    if rng.random() < 0.3:
        wave = wave * np.sin((y * math.cos(angle) - x * math.sin(angle)) * 2 * math.pi / period)
    share = 0.5 + 0.5 * np.clip(wave * rng.uniform(1, 6), -1, 1)
    colors = rng.random((2, 3))
    return colors[0] + (colors[1] - colors[0]) * share[..., None]


def draw_leaves(rng: np.random.Generator) -> np.ndarray:
    """Discs, boxes, triangles and lines heaped on each other (Lee, Mumford and Huang 2001): edges at all scales."""
    picture = FILLS[rng.integers(len(FILLS))](rng)
    for _ in range(rng.integers(1, 14)):
        mask = Image.new("L", (2 * SIDE, 2 * SIDE))
        pen = ImageDraw.Draw(mask)
        x, y = rng.uniform(0, 2 * SIDE, 2)
        radius = min(6 / rng.uniform(0.07, 1.0), SIDE)
        kind = rng.integers(4)
        if kind == 0:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        elif kind == 3:
            pen.line((x, y, *rng.uniform(0, 2 * SIDE, 2)), fill=255, width=int(rng.integers(2, 8)))
        else:
            angles = rng.uniform(0, 2 * math.pi) + np.arange(5 - kind) * 2 * math.pi / (5 - kind)
            pen.polygon([(x + radius * math.sin(a), y + radius * math.cos(a)) for a in angles], fill=255)
        cover = np.asarray(mask.reduce(2), dtype=np.float64)[..., None] / 255
        fill = FILLS[rng.integers(len(FILLS))](rng) if rng.random() < 0.3 else rng.random(3)
        picture = picture * (1 - cover) + fill * cover
    return picture


def draw_flat(rng: np.random.Generator) -> np.ndarray:
    return np.broadcast_to(rng.random(3), (SIDE, SIDE, 3))


FILLS: tuple[Callable[[np.random.Generator], np.ndarray], ...] = (draw_flat, draw_gradient, draw_clouds, draw_stripes)


def draw_texture(rng: np.random.Generator) -> np.ndarray:
    """One procedural picture, [SIDE, SIDE, 3] in 0..1."""
    draw = draw_leaves if rng.random() < 0.6 else FILLS[rng.integers(len(FILLS))]
    return draw(rng)


def to_pixels_CHW(picture: np.ndarray | Image.Image) -> Tensor:
    """A PIL picture, or an array in 0..1, to pixels in -1..1."""
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) * 2 - 1


def make_batches(seed: int, batch_size: int, crops: int) -> Iterator[Tensor]:
    """Endless batches of training pixels: half shapes, half textures; the first `crops` batches are cut small."""
    shapes = ShapesSource(split="train", img_size=SIDE)
    for step in range(2**31):
        rng = np.random.default_rng((seed, step))
        drawn: list[Image.Image | np.ndarray] = [
            shapes.draw(int(i))[1] for i in rng.integers(len(shapes), size=batch_size // 2)
        ]
        drawn += [draw_texture(rng) for _ in range(batch_size - len(drawn))]
        pixels_BCHW = torch.stack([to_pixels_CHW(picture) for picture in drawn])
        if step < crops:
            top, left = rng.integers(SIDE - CROP_SIDE + 1, size=2)
            pixels_BCHW = pixels_BCHW[..., top : top + CROP_SIDE, left : left + CROP_SIDE]
        yield pixels_BCHW


def make_held_out_shapes(count: int) -> Tensor:
    shapes = ShapesSource(split="validation", img_size=SIDE)
    return torch.stack([to_pixels_CHW(shapes.draw(i)[1]) for i in range(count)])


def make_held_out_textures(seed: int, count: int) -> Tensor:
    return torch.stack([to_pixels_CHW(draw_texture(np.random.default_rng((seed, i, 1)))) for i in range(count)])


def load_photographs(folder: Path, side: int) -> Tensor:
    """Every photograph in the folder, its middle square resized to `side` pixels."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTOGRAPH_SUFFIXES)
    if not paths:
        raise ValueError(f"--photographs={folder} holds no .jpg, .png or .webp file: name a folder of photographs")
    size = (side, side)
    return torch.stack(
        [
            to_pixels_CHW(
                ImageOps.fit(
                    Image.open(p, formats=("JPEG", "PNG", "WEBP")).convert("RGB"), size, Image.Resampling.LANCZOS
                )
            )
            for p in paths
        ]
    )


@torch.no_grad()
def measure_psnr(autoencoder: Autoencoder, pixels_BCHW: Tensor, sampled: bool = False) -> Tensor:
    """Decibels of each picture's reconstruction, from the posterior mean or from a sample with fixed noise."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for chunk_BCHW in pixels_BCHW.split(16):
        latents_BCHW, logvar_BCHW = autoencoder.encode(chunk_BCHW).chunk(2, dim=1)
        if sampled:
            noise_BCHW = torch.randn(latents_BCHW.shape, generator=generator)
            latents_BCHW = latents_BCHW + torch.exp(0.5 * logvar_BCHW) * noise_BCHW
        errors.append((autoencoder.decode(latents_BCHW).clamp(-1, 1) - chunk_BCHW).square().mean(dim=(1, 2, 3)))
    return 10 * torch.log10(4 / torch.cat(errors))


def reconstruction_loss(autoencoder: Autoencoder, pixels_BCHW: Tensor, codec: CodecConfig, generator) -> Tensor:
    """Absolute plus squared error behind noisy latents, and the penalty that keeps the latents' spread."""
    latents_BCHW = autoencoder.encode(pixels_BCHW)[:, : codec.latent_channels]
    std_C, mean_C = torch.std_mean((latents_BCHW - codec.shift) * codec.scale, dim=(0, 2, 3))
    spread = (mean_C.square() + (std_C - 1).square()).mean()
    amount_B = torch.rand(len(pixels_BCHW), generator=generator) * MAX_LATENT_NOISE
    noise_BCHW = torch.randn(latents_BCHW.shape, generator=generator) * amount_B[:, None, None, None]
    error_BCHW = autoencoder.decode(latents_BCHW + noise_BCHW / codec.scale) - pixels_BCHW
    return error_BCHW.abs().mean() + error_BCHW.square().mean() + SPREAD_WEIGHT * spread


@torch.no_grad()
def fold_latent_units(autoencoder: Autoencoder, pixels_BCHW: Tensor, codec: CodecConfig) -> None:
    """Rewrites the last encoder and the first decoder convolution, so that each latent channel has FLUX.1's mean and
    deviation over the pictures, and the log-variance is a constant."""
    channels = codec.latent_channels
    means_BCHW = torch.cat([autoencoder.encode(chunk)[:, :channels] for chunk in pixels_BCHW.split(64)])
    std_C, mean_C = torch.std_mean(means_BCHW, dim=(0, 2, 3))
    gain_C = 1 / (codec.scale * std_C)
    offset_C = codec.shift - gain_C * mean_C

    head, entry = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
    assert head.bias is not None and entry.bias is not None
    head.weight[:channels] *= gain_C[:, None, None, None]
    head.bias[:channels] = head.bias[:channels] * gain_C + offset_C
    head.weight[channels:] = 0
    head.bias[channels:] = 2 * math.log(POSTERIOR_STD / codec.scale)
    # The inverse. Gain and offset are near 1 and 0, so the zeros that pad the border keep their meaning.
    entry.weight /= gain_C[None, :, None, None]
    entry.bias -= (entry.weight * offset_C[None, :, None, None]).sum(dim=(1, 2, 3))


class MatrixOptimizer:
    """Muon for the inner convolutions, as matrices of one row per output channel, and AdamW for all else.

    Muon orthogonalizes each step (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). With AdamW alone, the
    latents carry little but the mean color of their patch for thousands of steps.
    """

    def __init__(self, autoencoder: Autoencoder, matrix_lr: float, other_lr: float, steps: int):
        ends = {id(autoencoder.encoder.conv_in.weight), id(autoencoder.decoder.conv_out.weight)}
        self.kernels = [p for p in autoencoder.parameters() if p.dim() == 4 and id(p) not in ends]
        inner = {id(kernel) for kernel in self.kernels}
        # They share the kernels' memory, because Muon takes matrices only.
        self.matrices = [nn.Parameter(kernel.detach().flatten(1)) for kernel in self.kernels]
        others = [p for p in autoencoder.parameters() if id(p) not in inner]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(self.matrices, lr=matrix_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.99), weight_decay=0.0),
        ]
        factor = lambda step: min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))  # noqa: E731
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in self.optimizers]

    def step(self) -> None:
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            assert kernel.grad is not None
            matrix.grad = kernel.grad.flatten(1)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()


def train(steps: int, batch_size: int, lr: float, seed: int) -> Autoencoder:
    """A trained autoencoder in the latent units of FLUX.1, the same for the same arguments and machine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    codec = CodecConfig()
    autoencoder = Autoencoder(CONFIG)
    for block in autoencoder.modules():
        if isinstance(block, ResidualBlock):
            nn.init.zeros_(block.conv2.weight)  # starts as the plain skip, which carries colors
    optimizer = MatrixOptimizer(autoencoder, matrix_lr=lr, other_lr=lr / 10, steps=steps)
    batches = make_batches(seed, batch_size, crops=int(CROP_SHARE * steps))
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        loss = reconstruction_loss(autoencoder, next(batches), codec, generator)
        autoencoder.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    autoencoder.eval()
    fold_latent_units(autoencoder, torch.cat([next(batches) for _ in range(FOLD_BATCHES)]), codec)
    return autoencoder


def measure(autoencoder: Autoencoder, held_out: dict[str, Tensor]) -> Iterator[str]:
    """One line for each set of pictures: how well they come back."""
    for name, pixels_BCHW in held_out.items():
        mean_B, sampled_B = measure_psnr(autoencoder, pixels_BCHW), measure_psnr(autoencoder, pixels_BCHW, sampled=True)
        yield (
            f"held-out {name}: PSNR {mean_B.mean():.2f} dB (worst {mean_B.min():.2f}),"
            f" from posterior samples {sampled_B.mean():.2f} dB, {len(pixels_BCHW)} pictures"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps (5000, about 15 minutes)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures in a step, half of them shapes (16)")
    parser.add_argument(
        "--lr", type=float, default=0.02, help="highest learning rate of Muon; AdamW's is a tenth (0.02)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the pictures and the noise (0)")
    parser.add_argument("--out", type=Path, default=Path("outputs/autoencoder.safetensors"), help="file to write")
    parser.add_argument("--photographs", type=Path, help="folder of photographs to measure PSNR on; never trained on")
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.steps < 1 or args.batch_size < 2:
        parser.error(f"--steps={args.steps} must be 1 or more and --batch-size={args.batch_size} 2 or more")
    held_out = {
        "shapes": make_held_out_shapes(EVALUATION_PICTURES),
        "textures": make_held_out_textures(args.seed, EVALUATION_PICTURES),
    }
    if args.photographs is not None:
        try:
            for side in (SIDE, 4 * SIDE):
                held_out[f"photographs at {side} px"] = load_photographs(args.photographs, side)
        except ValueError as error:
            parser.error(str(error))

    autoencoder = train(args.steps, args.batch_size, args.lr, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in autoencoder.state_dict().items()}, args.out)
    parameters = sum(parameter.numel() for parameter in autoencoder.parameters())
    print(f"{args.out}: {parameters:,} parameters, {args.out.stat().st_size:,} bytes")
    for line in measure(autoencoder, held_out):
        print(line)


if __name__ == "__main__":
    main()
