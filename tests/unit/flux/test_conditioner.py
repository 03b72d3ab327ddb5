"""The text encoders: loading them, what they give, and every way a folder can be wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flux.conditioner import T5ClipConditioner, build_conditioner, check_tokenizer, load_clip, load_t5
from flux.config import Encoder
from flux.data.shapes import SCENES
from flux.data.tokenizers import FluxTokenizer, build_tokenizer
from flux.spec import SPECS
from flux.text_folders import TINY_CLIP, TINY_T5

TINY = SPECS["flux-tiny"].transformer
LENGTH = 24
SECTION = Encoder(dtype="float32", max_t5_encoding_len=LENGTH)
PROMPTS = [scene.caption for scene in SCENES[:: len(SCENES) // 7]]
SAME = 1e-5  # fp32, other batch or length: sums in another order
DIFFERENT = 1e-2  # features have unit size


@pytest.fixture(scope="module")
def tokenizer() -> FluxTokenizer:
    return build_tokenizer(SECTION, test_mode=False)


@pytest.fixture(scope="module")
def conditioner() -> T5ClipConditioner:
    return build_conditioner(SECTION, TINY, test_mode=False, device="cpu")


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_features_have_the_widths_of_the_model(conditioner, tokenizer):
    cond = conditioner.encode(tokenizer(PROMPTS))
    assert cond.txt_BLE.shape == (len(PROMPTS), LENGTH, TINY.context_dim)
    assert cond.pooled_BV.shape == (len(PROMPTS), TINY.pooled_dim)
    assert cond.mask_BL is None


def test_encoders_are_frozen_and_evaluated(conditioner):
    for model in (conditioner.t5, conditioner.clip):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(part.training for part in model.modules())


def test_encoders_handed_in_are_frozen_and_evaluated():
    t5, clip = (load(folder.weights, TINY, torch.float32, "cpu") for load, folder in LOADERS)
    t5.train(), clip.train()
    T5ClipConditioner(t5, clip, mask_padding=False)
    assert not t5.training and not clip.training and not next(t5.parameters()).requires_grad


def test_features_carry_no_graph_and_can_be_trained_upon(conditioner, tokenizer):
    with torch.enable_grad():
        cond = conditioner.encode(tokenizer(PROMPTS))
    assert cond.txt_BLE.grad_fn is None and cond.pooled_BV.grad_fn is None
    reader = nn.Linear(TINY.context_dim, 1)
    reader(cond.txt_BLE).sum().backward()
    assert reader.weight.grad.abs().sum() > 0


def test_a_prompt_does_not_depend_on_its_batch(conditioner, tokenizer):
    tokens = tokenizer(PROMPTS)
    whole = conditioner.encode(tokens)
    alone = conditioner.encode({key: ids[3:4] for key, ids in tokens.items()})
    assert gap(whole.txt_BLE[3], alone.txt_BLE[0]) <= SAME and gap(whole.pooled_BV[3], alone.pooled_BV[0]) <= SAME


def test_pooling_is_at_the_first_end_token(conditioner, tokenizer):
    ids = tokenizer(["a red circle"])["clip"]
    end = conditioner.clip.config.eos_token_id
    assert end != 2, "the library would take the highest id for the end"
    place = int((ids[0] == end).nonzero()[0])
    assert place == 4  # start, three words
    with torch.no_grad():
        states = conditioner.clip(input_ids=ids).last_hidden_state
    pooled = encode_clip(conditioner, ids)
    assert torch.equal(pooled[0], states[0, place])
    assert gap(pooled[0], states[0, -1]) > DIFFERENT  # the last position is another state

    after, before = ids.clone(), ids.clone()
    after[0, place + 1 :] = 7
    before[0, place - 1] = 7
    assert gap(encode_clip(conditioner, after), pooled) <= SAME
    assert gap(encode_clip(conditioner, before), pooled) > DIFFERENT


def encode_clip(conditioner: T5ClipConditioner, ids: torch.Tensor) -> torch.Tensor:
    return conditioner.encode({"t5": torch.zeros(1, 1, dtype=torch.int64), "clip": ids}).pooled_BV


def test_padding_is_hidden_only_when_asked_for(conditioner, tokenizer):
    """With the mask, words do not feel how much padding follows; without it, as FLUX was trained, they do."""
    longer = FluxTokenizer(TINY_T5.tokenizer, TINY_CLIP.tokenizer, 2 * LENGTH)
    masked = T5ClipConditioner(conditioner.t5, conditioner.clip, mask_padding=True)
    short, long = tokenizer(PROMPTS), longer(PROMPTS)

    mask_BL = masked.encode(short).mask_BL
    assert mask_BL.dtype == torch.bool and torch.equal(mask_BL, short["t5"] != 0)
    words = short["t5"] != 0
    few, many = (masked.encode(tokens).txt_BLE[:, :LENGTH][words] for tokens in (short, long))
    assert gap(few, many) <= SAME
    few, many = (conditioner.encode(tokens).txt_BLE[:, :LENGTH][words] for tokens in (short, long))
    assert gap(few, many) > DIFFERENT


def test_the_section_chooses_masking(tokenizer):
    section = replace(SECTION, mask_padding=True)
    assert (
        build_conditioner(section, TINY, test_mode=False, device="cpu").encode(tokenizer(PROMPTS)).mask_BL is not None
    )


@pytest.mark.parametrize("test_mode", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_section_chooses_the_dtype(tokenizer, dtype, test_mode):
    built = build_conditioner(replace(SECTION, dtype=dtype), TINY, test_mode, "cpu")
    parameters = [*built.t5.parameters(), *built.clip.parameters()]
    assert {parameter.dtype for parameter in parameters} == {getattr(torch, dtype)}
    assert built.encode(tokenizer(PROMPTS)).txt_BLE.dtype == getattr(torch, dtype)


def test_building_is_silent(capfd):
    build_conditioner(SECTION, TINY, test_mode=False, device="cpu")
    build_conditioner(SECTION, TINY, test_mode=True, device="cpu")
    assert capfd.readouterr() == ("", "")


# Test mode


def test_test_mode_builds_one_layer_of_the_real_widths():
    section = replace(SECTION, t5_encoder="nowhere", clip_encoder="nowhere")
    built = build_conditioner(section, SPECS["flux-debug"].transformer, test_mode=True, device="cpu")
    cond = built.encode(build_tokenizer(section, test_mode=True)(PROMPTS))
    assert cond.txt_BLE.shape[-1] == 4096 and cond.pooled_BV.shape[-1] == 768
    assert built.t5.config.num_layers == built.clip.config.num_hidden_layers == 1
    assert cond.txt_BLE.std(dim=0).mean() > DIFFERENT and cond.pooled_BV.std(dim=0).mean() > DIFFERENT


def test_test_mode_is_the_same_each_time_and_leaves_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_conditioner(SECTION, TINY, test_mode=True, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = build_conditioner(SECTION, TINY, test_mode=True, device="cpu")
    for a, b in ((first.t5, second.t5), (first.clip, second.clip)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# Loading: what is accepted

LOADERS = ((load_t5, TINY_T5), (load_clip, TINY_CLIP))
KEYS = {load_t5: "encoder.t5_encoder", load_clip: "encoder.clip_encoder"}
both = pytest.mark.parametrize(("load", "tiny"), LOADERS, ids=["t5", "clip"])


def copied(tiny, folder: Path) -> Path:
    shutil.copytree(tiny.weights, folder)
    return folder


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors")


def same_weights(load, folder: Path, tiny) -> bool:
    a, b = (load(path, TINY, torch.float32, "cpu") for path in (folder, tiny.weights))
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


@both
def test_loading_keeps_the_weights_of_the_file(load, tiny):
    tensors = load_file(tiny.weights / "model.safetensors")
    model = load(tiny.weights, TINY, torch.bfloat16, "cpu")
    loaded = {name.removeprefix("text_model."): value for name, value in model.named_parameters()}
    assert all(torch.equal(loaded[name.removeprefix("text_model.")], value) for name, value in tensors.items())
    assert len(loaded) == len(tensors)


def test_clip_counts_its_positions_though_no_file_does():
    model = load_clip(TINY_CLIP.weights, TINY, torch.bfloat16, "cpu")
    (positions,) = (buffer for name, buffer in model.named_buffers() if name.endswith("position_ids"))
    assert positions.flatten().tolist() == list(range(77)) and positions.dtype == torch.int64


def test_t5_has_one_embedding():
    model = load_t5(TINY_T5.weights, TINY, torch.float32, "cpu")
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_the_word_in_the_path_does_not_matter(tmp_path):
    assert same_weights(load_t5, copied(TINY_T5, tmp_path / "clips" / "clip-model"), TINY_T5)
    assert same_weights(load_clip, copied(TINY_CLIP, tmp_path / "t5"), TINY_CLIP)


@pytest.mark.parametrize("shared", [True, False])
def test_t5_embedding_under_its_other_name(tmp_path, shared):
    folder = copied(TINY_T5, tmp_path / "t5")

    def rename(tensors):
        embedding = tensors["shared.weight"] if shared else tensors.pop("shared.weight")
        tensors["encoder.embed_tokens.weight"] = embedding.clone()

    rewrite(folder, rename)
    assert same_weights(load_t5, folder, TINY_T5)


def test_the_decoder_of_a_complete_t5_is_left_out(tmp_path):
    folder = copied(TINY_T5, tmp_path / "t5")
    rewrite(
        folder, lambda tensors: tensors.update({"decoder.block.0.x": torch.ones(3), "lm_head.weight": torch.ones(2)})
    )
    assert same_weights(load_t5, folder, TINY_T5)


def test_the_vision_tower_of_a_complete_clip_is_left_out(tmp_path):
    folder = copied(TINY_CLIP, tmp_path / "clip")
    names = ("vision_model.post_layernorm.bias", "visual_projection.weight", "text_projection.weight", "logit_scale")
    extra = {name: torch.ones(2) for name in names}
    extra["text_model.embeddings.position_ids"] = torch.arange(77)
    rewrite(folder, lambda tensors: tensors.update(extra))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": config, "vision_config": {}}))
    assert same_weights(load_clip, folder, TINY_CLIP)


def test_clip_names_without_their_prefix(tmp_path):
    """The library itself has written them in both ways."""
    folder = copied(TINY_CLIP, tmp_path / "clip")
    rewrite(folder, lambda tensors: {name.removeprefix("text_model."): value for name, value in tensors.items()})
    assert same_weights(load_clip, folder, TINY_CLIP)


def shard(folder: Path) -> list[Path]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in names[number::2]}, folder / file)
    weight_map = {name: files[place % 2] for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / file for file in files]


@both
def test_sharded_weights(tmp_path, load, tiny):
    folder = copied(tiny, tmp_path / "encoder")
    shard(folder)
    assert same_weights(load, folder, tiny)


# Loading: what is refused. Every message names the key, the folder or file, and a remedy.


def refusal(load, folder: Path, transformer=TINY) -> str:
    with pytest.raises(ValueError) as error:
        load(folder, transformer, torch.float32, "cpu")
    message = str(error.value)
    assert message.startswith(f"{KEYS[load]}: ") and str(folder) in message
    assert "\n" not in message and ": " in message.removeprefix(f"{KEYS[load]}: "), message
    return message


@both
def test_no_configuration(tmp_path, load, tiny):
    assert "has no config.json" in refusal(load, tmp_path)


def test_another_architecture():
    assert "says 'clip_text_model'" in refusal(load_t5, TINY_CLIP.weights)
    assert "says 't5'" in refusal(load_clip, TINY_T5.weights)


@both
@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": 3}', "\xff"])
def test_a_configuration_that_is_none(tmp_path, load, tiny, text):
    folder = copied(tiny, tmp_path / "encoder")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(load, folder)


@both
@pytest.mark.parametrize("value", [{"vocab_size": "many"}, {"hidden_act": "magic", "dense_act_fn": "magic"}])
def test_a_configuration_with_a_wrong_value(tmp_path, load, tiny, value):
    folder = copied(tiny, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | value))
    assert "has a value that does not work" in refusal(load, folder)


@both
def test_no_weights(tmp_path, load, tiny):
    folder = copied(tiny, tmp_path / "encoder")
    (folder / "model.safetensors").unlink()
    assert "must hold model.safetensors and does not: fetch" in refusal(load, folder)


@both
def test_pickled_weights_are_not_opened(tmp_path, load, tiny, monkeypatch):
    folder = copied(tiny, tmp_path / "encoder")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")

    def refuse(*arguments, **options):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    assert same_weights(load, folder, tiny)  # beside safetensors it is passed by
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin is not read, since only safetensors files are safe to open" in refusal(load, folder)


@both
def test_a_missing_shard(tmp_path, load, tiny):
    folder = copied(tiny, tmp_path / "encoder")
    shard(folder)[1].unlink()
    assert "must hold model-00002-of-00002.safetensors and does not" in refusal(load, folder)


@both
def test_an_index_that_is_none(tmp_path, load, tiny):
    folder = copied(tiny, tmp_path / "encoder")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text("[1]")
    assert "model.safetensors.index.json must be a JSON object" in refusal(load, folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "must hold model.safetensors" in refusal(load, folder)


@both
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, load, tiny):
    folder = copied(tiny, tmp_path / "encoder")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    assert "must hold outside.safetensors and does not" in refusal(load, folder)


@both
@pytest.mark.parametrize("size", [0, 7, 100, -1000])
def test_truncated_weights(tmp_path, load, tiny, size):
    folder = copied(tiny, tmp_path / "encoder")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    assert "must be a complete safetensors file" in refusal(load, folder)


@both
def test_missing_keys(tmp_path, load, tiny):
    folder = copied(tiny, tmp_path / "encoder")
    rewrite(folder, lambda tensors: {name: value for name, value in tensors.items() if "final_layer_norm" not in name})
    message = refusal(load, folder)
    assert " lack " in message and "final_layer_norm.weight" in message


@both
def test_foreign_keys(tmp_path, load, tiny):
    folder = copied(tiny, tmp_path / "encoder")
    rewrite(folder, lambda tensors: tensors.update({f"encoder.adapter.{place}": torch.ones(2) for place in range(5)}))
    message = refusal(load, folder)
    assert "hold also encoder.adapter.0, encoder.adapter.1, encoder.adapter.2 and 2 more" in message


@both
def test_a_wrong_shape(tmp_path, load, tiny):
    folder = copied(tiny, tmp_path / "encoder")

    def cut(tensors):
        name = next(name for name in tensors if name.endswith(("shared.weight", "token_embedding.weight")))
        tensors[name] = tensors[name][:-1].clone()

    rewrite(folder, cut)
    assert "has shape" in refusal(load, folder)


def test_a_width_that_does_not_fit_the_model():
    message = refusal(load_t5, TINY_T5.weights, SPECS["flux-schnell"].transformer)
    assert "d_model 128, which must equal the model's context_dim 4096: use an encoder of width 4096" in message
    message = refusal(load_clip, TINY_CLIP.weights, SPECS["flux-schnell"].transformer)
    assert "hidden_size 128, which must equal the model's pooled_dim 768: use an encoder of width 768" in message


def test_clip_with_another_number_of_positions(tmp_path):
    folder = copied(TINY_CLIP, tmp_path / "clip")

    def cut(tensors):
        name = "text_model.embeddings.position_embedding.weight"
        tensors[name] = tensors[name][:64].clone()

    rewrite(folder, cut)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert "64 positions and must have 77" in refusal(load_clip, folder)


def check(section: Encoder) -> None:
    conditioner = build_conditioner(section, TINY, test_mode=False, device="cpu")
    check_tokenizer(build_tokenizer(section, test_mode=False), conditioner)


def test_a_tokenizer_of_another_clip(tmp_path):
    """Its end token would not be found, and every prompt pooled at its start."""
    folder = copied(TINY_CLIP, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    section = replace(SECTION, clip_encoder=str(folder))
    for end, wrong in ((7, True), (2, False)):  # 2 is the known fault of old files, which the library handles
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
        if wrong:
            with pytest.raises(ValueError, match=r"encoder\.clip_encoder: the tokenizer ends prompts with id 1113"):
                check(section)
        else:
            check(section)
            tokens = build_tokenizer(section, test_mode=False)(PROMPTS)
            old = build_conditioner(section, TINY, test_mode=False, device="cpu").encode(tokens)
            new = build_conditioner(SECTION, TINY, test_mode=False, device="cpu").encode(tokens)
            assert torch.equal(old.pooled_BV, new.pooled_BV)


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    folder = copied(TINY_T5, tmp_path / "t5")

    def cut(tensors):
        tensors["shared.weight"] = tensors["shared.weight"][:-1].clone()

    rewrite(folder, cut)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 999}))
    with pytest.raises(ValueError, match=r"encoder\.t5_encoder: the tokenizer has 1000 tokens .* embeds only 999"):
        check(replace(SECTION, t5_encoder=str(folder)))


def test_nothing_of_the_hub_is_asked_for(monkeypatch):
    """Loading works with a hub that must not be touched."""
    import huggingface_hub

    def refuse(*arguments, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    build_conditioner(SECTION, TINY, test_mode=False, device="cpu")
