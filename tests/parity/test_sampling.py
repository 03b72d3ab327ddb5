"""Schedule and whole sampling runs against diffusers' scheduler and FluxPipeline. No downloads."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoint.adapter import from_hf
from flux.batch import TextCond
from flux.flow import make_schedule, resolution_mu
from flux.model import FluxTransformer
from flux.sampling import denoise, make_initial_noise
from flux.spec import SPECS, ModelSpec, ScheduleConfig, TransformerConfig

diffusers = pytest.importorskip("diffusers")

SCHEDULE_TOLERANCE = 1e-6  # diffusers computes the shift in fp32, we in fp64
LATENT_TOLERANCE = 1e-4  # fp32 rounding of a few forward passes, grown by the Euler steps
STEPS, HEIGHT, WIDTH, LENGTH = 5, 64, 96, 6
GUIDANCE = 3.5


def build_scheduler(shifted: bool = True):
    return diffusers.FlowMatchEulerDiscreteScheduler(
        shift=1.0 if not shifted else 3.0,
        use_dynamic_shifting=shifted,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def diffusers_times(steps: int, image_tokens: int, shifted: bool) -> torch.Tensor:
    scheduler = build_scheduler(shifted)
    mu = resolution_mu(ScheduleConfig(), image_tokens) if shifted else None
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("steps, image_tokens", [(4, 256), (50, 4096), (28, 1024), (1, 16)])
def test_schedule(steps, image_tokens, shifted):
    times = make_schedule(ScheduleConfig(shifted=shifted), steps, image_tokens)
    torch.testing.assert_close(times, diffusers_times(steps, image_tokens, shifted), atol=SCHEDULE_TOLERANCE, rtol=0)


def test_schedule_control_latent_instead_of_packed_token_count():
    """Counting latents instead of packed tokens is a fault of other trainers; the check must see it."""
    times = make_schedule(ScheduleConfig(), 28, 4 * 1024)
    assert (times - diffusers_times(28, 1024, shifted=True)).abs().max() > 100 * SCHEDULE_TOLERANCE


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def pipeline_and_spec(request):
    guided = request.param
    sizes = {"in_channels": 64, "num_layers": 2, "num_single_layers": 2, "guidance_embeds": guided}
    other = diffusers.FluxTransformer2DModel(
        **sizes,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=48,
        pooled_projection_dim=24,
        axes_dims_rope=(8, 12, 12),
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            fan_in = parameter.shape[-1]
            parameter.normal_(0, 0.6 / fan_in**0.5, generator=generator)
    config = TransformerConfig(
        context_dim=48,
        pooled_dim=24,
        hidden_size=128,
        num_heads=4,
        depth=2,
        depth_single=2,
        axes_dim=(8, 12, 12),
        guidance_embed=guided,
    )
    spec = replace(SPECS["flux-dev"], name="parity", transformer=config, schedule=ScheduleConfig())
    model = FluxTransformer(config).eval()
    model.load_state_dict(from_hf(other.state_dict(), spec.diffusers_rules))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    pipeline = diffusers.FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=other,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, spec, model


def make_text(spec: ModelSpec, batch: int) -> TextCond:
    generator = torch.Generator().manual_seed(1)
    return TextCond(
        txt_BLE=torch.randn(batch, LENGTH, spec.transformer.context_dim, generator=generator),
        pooled_BV=torch.randn(batch, spec.transformer.pooled_dim, generator=generator),
    )


def draw_with_diffusers(pipeline, text: TextCond, seeds: list[int]) -> torch.Tensor:
    return pipeline(
        prompt_embeds=text.txt_BLE,
        pooled_prompt_embeds=text.pooled_BV,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images


def draw(spec, model, text, seeds, **arguments) -> torch.Tensor:
    noise_BTC = make_initial_noise(seeds, spec, HEIGHT, WIDTH)
    grid = (HEIGHT // 16, WIDTH // 16)
    return denoise(model, spec, noise_BTC, grid, text, **{"steps": STEPS, "guidance": GUIDANCE, **arguments})


def test_sampling_run_from_seeds(pipeline_and_spec):
    pipeline, spec, model = pipeline_and_spec
    text = make_text(spec, 2)
    theirs = draw_with_diffusers(pipeline, text, [7, 8])
    torch.testing.assert_close(draw(spec, model, text, [7, 8]), theirs, atol=LATENT_TOLERANCE, rtol=0)
    for control in (
        draw(spec, model, text, [7, 9]),
        draw(replace(spec, schedule=ScheduleConfig(shifted=False)), model, text, [7, 8]),
        draw(spec, model, TextCond(text.txt_BLE.flip(0), text.pooled_BV), [7, 8]),
    ):
        assert (control - theirs).abs().max() > 10 * LATENT_TOLERANCE


@pytest.mark.parametrize("pipeline_and_spec", [False], ids=["schnell"], indirect=True)
def test_classifier_free_guidance_run(pipeline_and_spec):
    pipeline, spec, model = pipeline_and_spec
    text, empty = make_text(spec, 2), make_text(spec, 4)
    empty = TextCond(empty.txt_BLE[2:], empty.pooled_BV[2:])
    theirs = pipeline(
        prompt_embeds=text.txt_BLE,
        pooled_prompt_embeds=text.pooled_BV,
        negative_prompt_embeds=empty.txt_BLE,
        negative_pooled_prompt_embeds=empty.pooled_BV,
        true_cfg_scale=2.5,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        output_type="latent",
    ).images
    ours = draw(spec, model, text, [7, 8], cfg_scale=2.5, empty_text=empty)
    torch.testing.assert_close(ours, theirs, atol=LATENT_TOLERANCE, rtol=0)
    assert (draw(spec, model, text, [7, 8]) - theirs).abs().max() > 10 * LATENT_TOLERANCE


def test_a_picture_does_not_depend_on_its_batch(pipeline_and_spec):
    _, spec, model = pipeline_and_spec
    text = make_text(spec, 3)
    together = draw(spec, model, text, [1, 2, 3])
    alone = draw(spec, model, TextCond(text.txt_BLE[1:2], text.pooled_BV[1:2]), [2])
    torch.testing.assert_close(together[1:2], alone, atol=LATENT_TOLERANCE, rtol=0)


def test_progress_is_told(pipeline_and_spec):
    _, spec, model = pipeline_and_spec
    told = []
    draw(spec, model, make_text(spec, 1), [0], on_step=told.append)
    assert told == list(range(1, STEPS + 1))
