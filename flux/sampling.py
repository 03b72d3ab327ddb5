"""From prompts to pictures: Euler steps along the learned flow."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flux.batch import TextCond
from flux.codec import draw_noise
from flux.encoders import Encoders
from flux.flow import make_schedule
from flux.inputs import make_model_inputs
from flux.spec import PIXELS_PER_TOKEN, ModelSpec


def make_initial_noise(seeds: list[int], spec: ModelSpec, height: int, width: int) -> Tensor:
    """noise_BTC for pictures of height x width pixels, one seed each, so that no picture depends on its batch.

    A seed gives the noise that diffusers' FluxPipeline gets from `torch.Generator().manual_seed(seed)` in fp32.
    """
    grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
    return torch.stack([draw_noise(torch.Generator().manual_seed(seed), spec.codec, grid) for seed in seeds])


def _concat(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


@torch.no_grad()
def denoise(
    predict: Callable[..., Tensor],
    spec: ModelSpec,
    noise_BTC: Tensor,
    grid: tuple[int, int],
    text: TextCond,
    *,
    steps: int,
    guidance: float = 1.0,
    cfg_scale: float = 1.0,
    empty_text: TextCond | None = None,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrates the flow from noise (t = 1) to latents (t = 0) in `steps` Euler steps.

    Args:
        predict: the transformer, or anything called like it.
        spec: its flavor.
        noise_BTC: initial noise, fp32, on the model's device; x is kept in fp32.
        grid: (rows, columns) of image tokens.
        text: features of the prompts.
        steps: number of Euler steps, at least 1.
        guidance: value fed to models that embed it.
        cfg_scale: classifier-free guidance; 1 is off. Otherwise v = v_empty + scale * (v_prompt - v_empty)
            (Ho & Salimans 2022, arXiv 2207.12598), both in one forward pass.
        empty_text: features of the empty prompt for every sample; needed when cfg_scale is not 1.
        dtype: dtype of the transformer's inputs.
        on_step: called with the number of finished steps.

    Returns:
        latents_BTC in fp32.
    """
    guided = cfg_scale != 1.0
    if guided:
        assert empty_text is not None, "classifier-free guidance needs the features of the empty prompt"
        text = TextCond(
            txt_BLE=torch.cat([text.txt_BLE, empty_text.txt_BLE]),
            pooled_BV=_concat(text.pooled_BV, empty_text.pooled_BV),
            mask_BL=_concat(text.mask_BL, empty_text.mask_BL),
        )
    times = make_schedule(spec.schedule, steps, grid[0] * grid[1]).to(noise_BTC.device)
    x_BTC = noise_BTC
    for step in range(steps):
        model_x_BTC = torch.cat([x_BTC, x_BTC]) if guided else x_BTC
        t_B = times[step].expand(model_x_BTC.shape[0])
        velocity_BTC = predict(**make_model_inputs(model_x_BTC, t_B, text, grid, spec, guidance, dtype)).float()
        if guided:
            prompted_BTC, empty_BTC = velocity_BTC.chunk(2)
            velocity_BTC = empty_BTC + cfg_scale * (prompted_BTC - empty_BTC)
        x_BTC = x_BTC + (times[step + 1] - times[step]) * velocity_BTC
        if on_step:
            on_step(step + 1)
    return x_BTC


@torch.no_grad()
def draw_pictures(
    predict: Callable[..., Tensor],
    spec: ModelSpec,
    encoders: Encoders,
    prompts: list[str],
    seeds: list[int],
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    cfg_scale: float,
    batch_size: int,
    dtype: torch.dtype,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """pixels_BCHW on the CPU, one picture per prompt and seed; the other arguments are those of `denoise`.

    Args:
        batch_size: pictures drawn at a time; it does not change them beyond rounding.
        on_step: called after every Euler step of every batch with the number of finished ones.
    """
    grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
    empty_text = encoders.encode_prompts([""]) if cfg_scale != 1.0 else None
    pictures = []
    for start in range(0, len(prompts), batch_size):
        batch_prompts = prompts[start : start + batch_size]
        noise_BTC = make_initial_noise(seeds[start : start + batch_size], spec, height, width)
        latents_BTC = denoise(
            predict,
            spec,
            noise_BTC.to(encoders.device),
            grid,
            encoders.encode_prompts(batch_prompts),
            steps=steps,
            guidance=guidance,
            cfg_scale=cfg_scale,
            empty_text=empty_text and _repeat(empty_text, len(batch_prompts)),
            dtype=dtype,
            on_step=partial(_count, on_step, start // batch_size * steps) if on_step else None,
        )
        pictures.append(encoders.codec.decode(latents_BTC, grid).float().cpu())
    return torch.cat(pictures)


def _count(on_step: Callable[[int], None], before: int, step: int) -> None:
    on_step(before + step)


def _repeat(text: TextCond, batch: int) -> TextCond:
    """The features of one prompt for a whole batch."""

    def repeat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.expand(batch, *tensor.shape[1:])

    return TextCond(text.txt_BLE.expand(batch, -1, -1), repeat(text.pooled_BV), repeat(text.mask_BL))
