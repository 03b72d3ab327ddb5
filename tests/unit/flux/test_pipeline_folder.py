"""The files of a pipeline folder, what goes into them, and every way such a folder can be wrong."""

import json
import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.adapter import from_hf, to_hf
from flux.autoencoder import AutoencoderConfig, load_autoencoder
from flux.config import Encoder
from flux.pipeline_folder import (
    is_pipeline,
    make_autoencoder_config,
    make_scheduler_config,
    make_transformer_config,
    save_pipeline_parts,
    use_pipeline,
)
from flux.rules import AUTOENCODER_DIFFUSERS_RULES, FLUX2_DIFFUSERS_RULES
from flux.spec import SPECS, CodecConfig, PositionConfig
from flux.text_folders import TINY_CLIP, TINY_T5

TINY = SPECS["flux-tiny"]
SECTION, CODEC = Encoder(), CodecConfig()
TINY_AUTOENCODER = Path(SECTION.autoencoder_path)
TO_NATIVE = partial(from_hf, rules=AUTOENCODER_DIFFUSERS_RULES)


def write(folder, stem, tensors, rules):
    """The simplest writer: all of it at once."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: tensor.read() for name, tensor in tensors.items()}
    assert {name: (tuple(value.shape), value.dtype) for name, value in values.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()
    }
    named = to_hf(values, rules) if rules else values
    save_file({name: value.contiguous() for name, value in named.items()}, folder / f"{stem}.safetensors")


def save(folder, encoder=SECTION, test_mode=False, spec=TINY):
    save_pipeline_parts(folder, spec, encoder, test_mode, write, TO_NATIVE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    save(folder)
    return folder


def read_json(file):
    return json.loads(file.read_text())


def test_files(folder):
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "tokenizer_2/spiece.model",
        "tokenizer_2/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
        "transformer/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert is_pipeline(folder) and not is_pipeline(folder / "vae")


def test_full_size_configurations_are_the_published_ones():
    schnell = make_transformer_config(SPECS["flux-schnell"])
    sizes = {"attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38}
    widths = {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "patch_size": 1}
    assert sizes | widths | {"guidance_embeds": False, "axes_dims_rope": (16, 56, 56)} == {
        name: value for name, value in schnell.items() if not name.startswith("_")
    }
    assert make_transformer_config(SPECS["flux-dev"]) == schnell | {"guidance_embeds": True}
    scheduler = make_scheduler_config(SPECS["flux-dev"].schedule)
    assert (scheduler["use_dynamic_shifting"], scheduler["base_shift"], scheduler["max_shift"]) == (True, 0.5, 1.15)
    assert make_scheduler_config(SPECS["flux-schnell"].schedule)["use_dynamic_shifting"] is False
    vae = make_autoencoder_config(AutoencoderConfig(), CodecConfig())
    assert (vae["block_out_channels"], vae["layers_per_block"]) == ([128, 256, 512, 512], 2)
    assert (vae["scaling_factor"], vae["shift_factor"], vae["norm_num_groups"]) == (0.3611, 0.1159, 32)


@pytest.mark.parametrize(
    "spec",
    [
        replace(TINY, name="other", transformer=replace(TINY.transformer, swiglu=True)),
        replace(TINY, name="other", transformer=replace(TINY.transformer, pooled_dim=None)),
        replace(TINY, name="other", transformer=replace(TINY.transformer, mlp_ratio=3.0)),
        replace(TINY, name="other", transformer=replace(TINY.transformer, theta=2000.0)),
        replace(TINY, name="other", positions=PositionConfig(centered=True)),
        replace(TINY, name="other", diffusers_rules=FLUX2_DIFFUSERS_RULES),
    ],
)
def test_another_architecture_is_refused(spec, tmp_path):
    with pytest.raises(ValueError, match=r"model.flavor='other' is not of FLUX.1's architecture"):
        save(tmp_path / "pipeline", spec=spec)
    assert not (tmp_path / "pipeline").exists()


def test_weights_keep_values_and_number_format(folder):
    for source, part, prefix in ((TINY_T5, "text_encoder_2", ""), (TINY_CLIP, "text_encoder", "text_model.")):
        before, after = (load_file(home / "model.safetensors") for home in (source.weights, folder / part))
        before = {prefix + name.removeprefix(prefix): tensor for name, tensor in before.items()}
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in after)
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    own = load_file(TINY_AUTOENCODER)
    assert all(torch.equal(own[name], tensor) for name, tensor in TO_NATIVE(vae).items())


def test_of_a_complete_t5_the_encoder_is_kept(tmp_path):
    source = shutil.copytree(TINY_T5.weights, tmp_path / "t5")
    weights = load_file(source / "model.safetensors")
    more = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4), "lm_head.weight": torch.zeros(4, 4)}
    copies = {"encoder.embed_tokens.weight": weights["shared.weight"].clone()}
    save_file(weights | more | copies, source / "model.safetensors")
    save(tmp_path / "pipeline", Encoder(t5_encoder=str(source)))
    assert load_file(tmp_path / "pipeline/text_encoder_2/model.safetensors").keys() == weights.keys()
    config = read_json(tmp_path / "pipeline/text_encoder_2/config.json")
    assert config["architectures"] == ["T5EncoderModel"] and config["dtype"] == "bfloat16"


def test_a_tensor_is_read_when_it_is_written(monkeypatch, tmp_path):
    """What has not been asked for is not in memory: at T5's full size it would not fit."""
    opened = []

    def lazy_write(folder, stem, tensors, rules):
        opened.append((stem, len(tensors)))

    monkeypatch.setattr("flux.text_files._read", lambda path, name: pytest.fail("a tensor was read"))
    save_pipeline_parts(tmp_path, TINY, Encoder(), False, lazy_write, TO_NATIVE)
    assert [stem for stem, _ in opened] == ["diffusion_pytorch_model", "model", "model"]


def test_test_mode_saves_the_random_encoders(folder, tmp_path):
    save(tmp_path, test_mode=True)
    for part in ("text_encoder", "text_encoder_2"):
        random, trained = (load_file(home / part / "model.safetensors") for home in (tmp_path, folder))
        assert {tensor.dtype for tensor in random.values()} == {torch.bfloat16}
        assert len(random) < len(trained) and random.keys() <= trained.keys()  # one layer
        assert read_json(tmp_path / part / "config.json")["dtype"] == "bfloat16"


def test_the_tokenizer_tells_its_length(tmp_path):
    """FluxPipeline pads CLIP's prompts to it; an old folder may say nothing."""
    source = shutil.copytree(TINY_CLIP.weights, tmp_path / "clip")
    (source / "tokenizer_config.json").unlink()
    save(tmp_path / "pipeline", Encoder(clip_encoder=str(source)))
    config = read_json(tmp_path / "pipeline/tokenizer/tokenizer_config.json")
    assert config == {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}


def test_what_fluxpipeline_does_otherwise_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        save(tmp_path / "a", Encoder(mask_padding=True))
        save(tmp_path / "b", Encoder(max_t5_encoding_len=256))
    assert "hides no padding" in caplog.messages[0] and "max_sequence_length=256" in caplog.messages[1]


def test_using_a_folder(folder, caplog):
    encoder = use_pipeline(folder, TINY, Encoder(max_t5_encoding_len=40))
    assert encoder == Encoder(
        t5_encoder=str(folder / "text_encoder_2"),
        clip_encoder=str(folder / "text_encoder"),
        autoencoder_path=str(folder / "vae"),
        max_t5_encoding_len=40,
    )
    assert caplog.messages == []
    use_pipeline(folder, replace(TINY, schedule=SPECS["flux-schnell"].schedule), Encoder())
    assert "use_dynamic_shifting True instead of False" in caplog.messages[0]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model_index.json", '{"_class_name": "Flux2Pipeline"}', "must be that of a FluxPipeline"),
        ("model_index.json", "[]", "must be a JSON object"),
        ("scheduler/scheduler_config.json", "{", "cannot be read as JSON"),
    ],
)
def test_another_or_a_damaged_folder(folder, tmp_path, file, text, message):
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, tmp_path / name)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        use_pipeline(tmp_path, TINY, Encoder())


def load_vae(folder):
    return load_autoencoder(folder, CODEC, torch.float32, "cpu", TO_NATIVE)


def test_autoencoder_of_a_folder(folder):
    own = load_autoencoder(TINY_AUTOENCODER, CodecConfig(), torch.float32, "cpu")
    for path in (folder / "vae", folder / "vae/diffusion_pytorch_model.safetensors"):
        loaded = load_vae(path)
        assert loaded.config == own.config
        assert all(torch.equal(own.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, weights: config.update(scaling_factor=0.18215), "by 0.18215 and 0.1159, but the flavor by"),
        (lambda config, weights: config.pop("shift_factor"), "must then hold config.json"),
        (lambda config, weights: weights.pop("decoder.conv_out.bias"), "it lacks decoder.conv_out.bias"),
        (lambda config, weights: weights.pop("encoder.mid_block.attentions.0.to_q.bias"), "it lacks encoder.mid.attn"),
        (lambda config, weights: weights.update({"quant_conv.weight": torch.zeros(2)}), "no rule knows: quant_conv"),
        (lambda config, weights: weights.update({"decoder.conv_in.bias": torch.zeros(2)}), "another shape for decoder"),
        (lambda config, weights: weights.update({n: t * 0 for n, t in weights.items()}), "not a trained autoencoder"),
    ],
)
def test_faulty_autoencoder_of_a_folder(folder, tmp_path, change, message):
    config, weights = (
        read_json(folder / "vae/config.json"),
        load_file(folder / "vae/diffusion_pytorch_model.safetensors"),
    )
    change(config, weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_vae(tmp_path)
    assert "\n" not in str(caught.value) and "encoder.autoencoder_path=" in str(caught.value)
