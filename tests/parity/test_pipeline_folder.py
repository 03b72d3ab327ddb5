"""A pipeline folder that this recipe writes, against what diffusers' FluxPipeline draws from it. No downloads."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from build import build_encoders, save_pipeline
from checkpoint.adapter import from_hf, from_native
from checkpoint.lazy import lazy_all
from config.job_config import JobConfig
from flux.config import Encoder, Training
from flux.data.tokenizers import build_tokenizer
from flux.model import FluxTransformer
from flux.pipeline_folder import use_pipeline
from flux.sampling import denoise, make_initial_noise
from flux.spec import SPECS, ModelSpec, ScheduleConfig
from parallel.degrees import Degrees
from parallel.mesh import Layout

TOLERANCE = 1e-5  # of latents of unit size and of pixels in -1..1: fp32 rounding of a few forward passes
DIFFERENT = 100  # a fault moves the latents by more than so many tolerances
STEPS, SIDE, GUIDANCE, LENGTH, SEEDS = 3, 64, 3.5, 40, [7, 8]
PROMPTS = ["a large yellow triangle at the bottom right on an orange background", "a red circle"]
TINY = SPECS["flux-tiny"]
FLAVORS = {
    "without guidance, constant schedule": replace(TINY, schedule=ScheduleConfig(shifted=False)),
    "with guidance": replace(TINY, transformer=replace(TINY.transformer, guidance_embed=True)),
}


def build_transformer(spec: ModelSpec) -> FluxTransformer:
    """Weights that are large enough for every branch to matter."""
    model = FluxTransformer(spec.transformer).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.6 / parameter.shape[-1] ** 0.5, generator=generator)
        for name, parameter in model.named_parameters():
            if "_norm." in name:  # of queries and keys: as they are drawn, all tokens would get the same attention
                parameter.fill_(1.5)
    return model


def write(folder, spec, model, encoder: Encoder, test_mode=False) -> None:
    save_pipeline(folder, spec, encoder, test_mode, from_native(lazy_all(model.state_dict()), spec.diffusers_rules))


def draw_theirs(folder) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents in token order, and pixels in -1..1."""
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "max_sequence_length": LENGTH}
    latents_BTC, pixels_BCHW = (
        pipeline(
            PROMPTS,
            height=SIDE,
            width=SIDE,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type=kind,
            **options,
        ).images
        for kind in ("latent", "pt")
    )
    return latents_BTC, pixels_BCHW * 2 - 1


def draw_ours(spec, model, encoder: Encoder, test_mode=False) -> tuple[torch.Tensor, torch.Tensor]:
    config = JobConfig(encoder=encoder, training=Training(test_mode=test_mode))
    encoders = build_encoders(config, spec, build_tokenizer(encoder, test_mode), Layout(Degrees(), torch.device("cpu")))
    grid = (SIDE // 16, SIDE // 16)
    noise_BTC = make_initial_noise(SEEDS, spec, SIDE, SIDE)
    text = encoders.encode_prompts(PROMPTS)
    latents_BTC = denoise(model, spec, noise_BTC, grid, text, steps=STEPS, guidance=GUIDANCE)
    return latents_BTC, encoders.codec.decode(latents_BTC, grid)


def gap(one, other) -> float:
    return float((one - other).abs().max())


@pytest.fixture(scope="module", params=FLAVORS)
def flavor(request) -> ModelSpec:
    return FLAVORS[request.param]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(dtype="float32", max_t5_encoding_len=LENGTH)


@pytest.fixture(scope="module")
def exported(flavor, encoder, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("pipeline"), build_transformer(flavor)
    write(folder, flavor, model, encoder)
    return folder, model, draw_theirs(folder)


def test_draws_what_this_recipe_draws(flavor, encoder, exported):
    _, model, (their_latents, their_pixels) = exported
    latents_BTC, pixels_BCHW = draw_ours(flavor, model, encoder)
    assert their_latents.std() > 0.5  # of unit size, as the tolerance takes for granted
    assert gap(latents_BTC, their_latents) <= TOLERANCE
    assert gap(pixels_BCHW, their_pixels) <= TOLERANCE


def test_draws_from_the_folder_what_diffusers_draws(flavor, exported):
    """The way back: nothing but the folder is used."""
    folder, _, (their_latents, their_pixels) = exported
    model = FluxTransformer(flavor.transformer).eval()
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    model.load_state_dict(from_hf(load_file(file), flavor.diffusers_rules))
    encoder = use_pipeline(folder, flavor, Encoder(dtype="float32", max_t5_encoding_len=LENGTH))
    latents_BTC, pixels_BCHW = draw_ours(flavor, model, encoder)
    assert gap(latents_BTC, their_latents) <= TOLERANCE
    assert gap(pixels_BCHW, their_pixels) <= TOLERANCE


@pytest.mark.parametrize("flavor", ["with guidance"], indirect=True)
@pytest.mark.parametrize(
    ("part", "one", "other"),
    [
        ("transformer", "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"),
        (
            "text_encoder_2",
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.block.0.layer.0.SelfAttention.k.weight",
        ),
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight", "text_model.encoder.layers.1.mlp.fc1.weight"),
    ],
)
def test_control_exchanged_weights(exported, tmp_path, part, one, other):
    """Of the same shape, so that they load without a word."""
    folder, _, (their_latents, _) = exported
    copy = tmp_path / "pipeline"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / part).unlink()
    (copy / part).mkdir()
    (copy / part / "config.json").symlink_to(folder / part / "config.json")
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    weights[one], weights[other] = weights[other].clone(), weights[one].clone()
    save_file(weights, copy / part / file.name, {"format": "pt"})
    latents_BTC, _ = draw_theirs(copy)
    assert gap(latents_BTC, their_latents) > DIFFERENT * TOLERANCE


def test_control_the_other_schedule(flavor, encoder, exported):
    _, model, (their_latents, _) = exported
    other = replace(flavor, schedule=ScheduleConfig(shifted=not flavor.schedule.shifted))
    assert gap(draw_ours(other, model, encoder)[0], their_latents) > DIFFERENT * TOLERANCE


def test_encoders_of_test_mode(encoder, tmp_path):
    model = build_transformer(TINY)
    write(tmp_path, TINY, model, encoder, test_mode=True)
    latents_BTC, _ = draw_ours(TINY, model, encoder, test_mode=True)
    their_latents, _ = draw_theirs(tmp_path)
    assert gap(latents_BTC, their_latents) <= TOLERANCE
    assert gap(draw_ours(TINY, model, encoder)[0], their_latents) > DIFFERENT * TOLERANCE
