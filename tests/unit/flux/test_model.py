"""The transformer: symmetries, precision, seams, initialization, and every way in which it will be run."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flux.initialization import init_weights
from flux.model import (
    Attention,
    FluxTransformer,
    SingleBlock,
    rotary_table,
    rotate,
    time_features,
)
from flux.positions import image_ids
from flux.spec import PositionConfig, TransformerConfig

TOLERANCE = 1e-5  # fp32 rounding when the same sums run in another order
BF16_TOLERANCE = 0.05  # relative; bf16 keeps 8 bits, and the rounding of some ten layers adds up
BATCH, ROWS, COLUMNS, LENGTH = 2, 3, 4, 5
CONFIG = TransformerConfig(
    in_channels=16,
    context_dim=24,
    pooled_dim=20,
    hidden_size=64,
    num_heads=4,
    depth=2,
    depth_single=2,
    axes_dim=(4, 6, 6),
)
SWITCHED = replace(
    CONFIG,
    pooled_dim=None,
    guidance_embed=True,
    bias=False,
    swiglu=True,
    shared_modulation=True,
    context_norm=True,
)


def build(config: TransformerConfig = CONFIG) -> FluxTransformer:
    """Weights large enough that no branch hides: fresh ones have closed gates."""
    model = FluxTransformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6 / parameter.shape[-1] ** 0.5, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(1.5)
    return model


def make_inputs(config: TransformerConfig = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    inputs = {
        "img_BTC": normal(ROWS * COLUMNS, config.in_channels),
        "img_ids_BTA": image_ids(PositionConfig(), ROWS, COLUMNS).expand(BATCH, -1, -1),
        "txt_BLE": normal(LENGTH, config.context_dim),
        "txt_ids_BLA": torch.zeros(BATCH, LENGTH, 3, dtype=torch.int64),
        "t_B": torch.tensor([0.3, 0.8]),
    }
    if config.pooled_dim:
        inputs["pooled_BV"] = normal(config.pooled_dim)
    if config.guidance_embed:
        inputs["guidance_B"] = torch.tensor([1.0, 4.0])
    return inputs


def gradients(model: nn.Module, velocity_BTC: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    velocity_BTC.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# --- what it computes


def test_order_of_tokens_is_known_through_positions_alone():
    """What context parallelism rests on: a rank may hold any share of the image and any of the text."""
    model, inputs = build(), make_inputs()
    expected = model(**inputs)
    img, txt = torch.randperm(ROWS * COLUMNS), torch.randperm(LENGTH)
    shuffled = dict(inputs)
    shuffled.update(img_BTC=inputs["img_BTC"][:, img], img_ids_BTA=inputs["img_ids_BTA"][:, img])
    shuffled.update(txt_BLE=inputs["txt_BLE"][:, txt], txt_ids_BLA=inputs["txt_ids_BLA"][:, txt])
    torch.testing.assert_close(model(**shuffled), expected[:, img], atol=TOLERANCE, rtol=TOLERANCE)
    shuffled["img_ids_BTA"] = inputs["img_ids_BTA"]  # control: positions that do not follow their tokens
    assert distance(model(**shuffled), expected[:, img]) > 100 * TOLERANCE


def test_samples_do_not_see_each_other():
    model, inputs = build(), make_inputs()
    alone = model(**{name: value[1:] for name, value in inputs.items()})
    torch.testing.assert_close(alone, model(**inputs)[1:], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["img_BTC", "txt_BLE", "t_B", "pooled_BV", "guidance_B"])
def test_every_input_matters(name):
    config = replace(CONFIG, guidance_embed=True)
    model, inputs = build(config), make_inputs(config)
    before = model(**inputs)
    inputs[name] = inputs[name] + 0.5
    assert distance(model(**inputs), before) > 100 * TOLERANCE


def test_masked_text_is_as_if_it_were_not_there():
    model, inputs = build(), make_inputs()
    kept = LENGTH - 2
    cut = {**inputs, "txt_BLE": inputs["txt_BLE"][:, :kept], "txt_ids_BLA": inputs["txt_ids_BLA"][:, :kept]}
    mask = (torch.arange(LENGTH) < kept).expand(BATCH, -1)
    torch.testing.assert_close(model(**inputs, txt_mask_BL=mask), model(**cut), atol=TOLERANCE, rtol=TOLERANCE)
    assert distance(model(**inputs), model(**cut)) > 100 * TOLERANCE  # without the mask padding is attended


@pytest.mark.parametrize("config", [CONFIG, SWITCHED], ids=["flux1", "switched"])
@pytest.mark.parametrize("name", ["pooled_BV", "guidance_B"])
def test_conditions_that_do_not_fit_the_flavor(config, name):
    inputs = make_inputs(config)
    if name in inputs:
        del inputs[name]
    else:
        inputs[name] = torch.ones(BATCH)
    with pytest.raises(ValueError, match=name):
        FluxTransformer(config)(**inputs)


@pytest.mark.parametrize("change", [{"axes_dim": (4, 6, 8)}, {"num_heads": 3}])
def test_sizes_that_do_not_fit_together(change):
    with pytest.raises(ValueError, match="axes_dim"):
        FluxTransformer(replace(CONFIG, **change))


# --- positions and times


def test_rotary_table_is_exact_to_fp32():
    ids = torch.tensor([[[0, 3, 4095], [1, 2047, 0]]])
    table = rotary_table(ids, (16, 56, 56), 10_000.0)
    assert table.dtype == torch.float32 and table.shape == (1, 2, 1, 64, 2)
    rounding = 2**-24
    for token in range(2):
        position, plane = ids[0, token, 2].item(), 5
        angle = position * 10_000 ** (-2 * plane / 56)
        cosine, sine = table[0, token, 0, 8 + 28 + plane].tolist()
        assert abs(cosine - math.cos(angle)) <= rounding and abs(sine - math.sin(angle)) <= rounding


def test_rotation_depends_on_relative_position():
    q, k = torch.randn(2, 1, 1, 1, 16)

    def logit(position_q: int, position_k: int) -> float:
        tables = (rotary_table(torch.tensor([[[p]]]), (16,), 100.0) for p in (position_q, position_k))
        turned_q, turned_k = (rotate(x, table) for x, table in zip((q, k), tables, strict=True))
        return (turned_q * turned_k).sum().item()

    assert math.isclose(logit(7, 4), logit(13, 10), rel_tol=1e-4)
    assert not math.isclose(logit(7, 4), logit(13, 11), rel_tol=1e-2)


def test_compiled_rotation_is_the_same(monkeypatch):
    x, table = torch.randn(2, 5, 3, 16), rotary_table(torch.arange(5).reshape(1, 5, 1), (16,), 100.0)
    eager = rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, table), eager, atol=TOLERANCE, rtol=TOLERANCE)


def test_rotary_table_stays_fp32_in_a_bf16_model(monkeypatch):
    seen = []
    monkeypatch.setattr("flux.model.rotate", lambda x, table: seen.append(table.dtype) or rotate(x, table))
    build().to(torch.bfloat16)(**make_inputs())
    assert set(seen) == {torch.float32} and len(seen) == 2 * (CONFIG.depth + CONFIG.depth_single)


def test_time_features():
    """fp32 and cosines first; in bf16 the angle of t = 0.501 would be that of t = 0.5."""
    features = time_features(torch.tensor([0.501, 0.5]))
    assert features.dtype == torch.float32 and features.shape == (2, 256)
    assert math.isclose(features[0, 0].item(), math.cos(501), abs_tol=1e-4)
    assert math.isclose(features[0, 128 + 64].item(), math.sin(501 / 100), abs_tol=1e-4)
    assert distance(features[0], features[1]) > 0.1


def test_times_stay_fp32_in_a_bf16_model():
    model, inputs = build().to(torch.bfloat16), make_inputs()
    rounded = {**inputs, "t_B": inputs["t_B"].bfloat16()}
    assert not torch.equal(model(**inputs), model(**rounded))


# --- number formats and devices


@pytest.mark.parametrize("config", [CONFIG, SWITCHED], ids=["flux1", "switched"])
def test_bf16(config):
    model, inputs = build(config), make_inputs(config)
    expected = model(**inputs)
    exact = gradients(model, expected)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**inputs)
    mixed_gradients = gradients(model, mixed)
    model.to(torch.bfloat16)
    rounded = model(**inputs)
    rounded_gradients = gradients(model, rounded)
    assert mixed.dtype == rounded.dtype == torch.bfloat16
    for velocity, grads in ((mixed, mixed_gradients), (rounded, rounded_gradients)):
        assert 0 < distance(velocity, expected) < BF16_TOLERANCE
        whole = torch.cat([exact[name].flatten() for name in exact])
        assert distance(torch.cat([grads[name].float().flatten() for name in exact]), whole) < 2 * BF16_TOLERANCE


def test_meta():
    with torch.device("meta"):
        model = FluxTransformer(CONFIG)
    velocity = model(**{name: value.to("meta") for name, value in make_inputs().items()})
    assert velocity.shape == (BATCH, ROWS * COLUMNS, CONFIG.in_channels)


@pytest.mark.parametrize("length", [100, 200], ids=["short", "long"])
def test_bf16_attention_on_cpu(length):
    """Short sequences take a detour through fp32; both ways are right to bf16's precision."""
    q, k, v = (torch.randn(1, length, 2, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    logits = torch.einsum("bqnk,bsnk->bnqs", q.float(), k.float()) / 4
    expected = torch.einsum("bnqs,bsnk->bqnk", logits.softmax(-1), v.float())
    attended = Attention()(q, k, v)
    assert attended.dtype == torch.bfloat16
    torch.testing.assert_close(attended.float(), expected, atol=2**-7, rtol=2**-7)


# --- what is applied from outside


@pytest.mark.parametrize("config", [CONFIG, SWITCHED], ids=["flux1", "switched"])
def test_blocks_compile_without_graph_breaks(config):
    model, inputs = build(config), make_inputs(config)
    expected = model(**inputs)
    exact, names = gradients(model, expected), list(model.state_dict())
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(fullgraph=True, backend="aot_eager")
    velocity = model(**inputs)
    torch.testing.assert_close(velocity, expected, atol=TOLERANCE, rtol=TOLERANCE)
    compiled = gradients(model, velocity)
    assert list(model.state_dict()) == names
    assert all(distance(compiled[name], exact[name]) < TOLERANCE for name in exact)


@pytest.mark.parametrize("config", [CONFIG, SWITCHED], ids=["flux1", "switched"])
def test_blocks_recompute(config):
    model, inputs = build(config), make_inputs(config)
    expected = model(**inputs)
    exact = gradients(model, expected)
    for block in (*model.double_blocks, *model.single_blocks):
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    velocity = model(**inputs)
    assert torch.equal(velocity, expected)
    recomputed = gradients(model, velocity)
    assert all(torch.equal(recomputed[name], exact[name]) for name in exact)


def test_attention_can_be_replaced():
    class Recording(nn.Module):
        def forward(self, q_BSNK, k_BSNK, v_BSNK, mask_BS=None):
            shapes.append((q_BSNK.shape, k_BSNK.shape, v_BSNK.shape))
            return v_BSNK

    shapes: list = []
    model, inputs = build(), make_inputs()
    assert not list(model.double_blocks[0].attention.parameters())
    expected = model(**inputs)
    for block in (*model.double_blocks, *model.single_blocks):
        block.attention = Recording()
    assert distance(model(**inputs), expected) > 100 * TOLERANCE
    shape = (BATCH, LENGTH + ROWS * COLUMNS, CONFIG.num_heads, CONFIG.head_dim)
    assert shapes == [(shape, shape, shape)] * (CONFIG.depth + CONFIG.depth_single)


def test_the_last_block_leaves_out_what_nobody_reads():
    """Text is attended to and gets its gradient; only its own way through the last layer is missing."""
    block, (x_BSD, vec_BD) = SingleBlock(CONFIG), (torch.randn(2, 9, 64), torch.randn(2, 64))
    rotary = rotary_table(torch.zeros(2, 9, 3, dtype=torch.int64), CONFIG.axes_dim, CONFIG.theta)
    outcomes = []
    for unread in (4, 0):
        x_BSD = x_BSD.detach().requires_grad_()
        y_BSD = block(x_BSD, vec_BD, rotary, None, unread)[:, -5:]
        outcomes.append((y_BSD, *torch.autograd.grad(y_BSD.square().sum(), (x_BSD, *block.parameters()))))
    for short, whole in zip(*outcomes, strict=True):
        assert torch.allclose(short, whole, rtol=0, atol=TOLERANCE * whole.abs().max().item())
    assert outcomes[0][1][:, :4].abs().max() > 0


def test_modulation_can_be_handed_in():
    """One value for all tokens, or one for each, in the place of the vector that it is made of."""
    model = build()
    double, single = model.double_blocks[0], model.single_blocks[0]
    img_BTD, txt_BLD, vec_BD = torch.randn(2, 6, 64), torch.randn(2, 4, 64), torch.randn(2, 64)
    table = rotary_table(torch.zeros(2, 10, 3, dtype=torch.int64), CONFIG.axes_dim, CONFIG.theta)
    expected_img, expected_txt = double(img_BTD, txt_BLD, vec_BD, table)
    expected_x = single(torch.cat((txt_BLD, img_BTD), dim=1), vec_BD, table)

    img_mod, txt_mod, (single_mod,) = double.img_mod(vec_BD), double.txt_mod(vec_BD), single.modulation(vec_BD)
    by_token = tuple(type(mod)(*(chunk.expand(-1, 6, -1) for chunk in mod)) for mod in img_mod)
    for handed in (img_mod, by_token):
        img, txt = double(img_BTD, txt_BLD, (handed, txt_mod), table)
        torch.testing.assert_close(img, expected_img, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(txt, expected_txt, atol=TOLERANCE, rtol=TOLERANCE)
    x = single(torch.cat((txt_BLD, img_BTD), dim=1), single_mod, table)
    torch.testing.assert_close(x, expected_x, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("fault", ["", "another block's"])
def test_modulation_of_all_blocks_at_once_is_each_blocks_own(fault):
    model, inputs = build(), make_inputs()
    velocity = model(**inputs)
    at_once = gradients(model, velocity)
    own = FluxTransformer.modulate_blocks

    def by_block(vec_BD: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [vec_BD] * CONFIG.depth, [vec_BD] * CONFIG.depth_single

    def mixed_up(vec_BD: Tensor) -> tuple[list, list]:
        double, single = own(model, vec_BD)
        return double[::-1], single

    model.modulate_blocks = mixed_up if fault else by_block
    expected = model(**inputs)
    exact = gradients(model, expected)
    largest = max(distance(velocity, expected), *(distance(at_once[name], exact[name]) for name in exact))
    assert largest > 100 * TOLERANCE if fault else largest < TOLERANCE


@pytest.mark.parametrize("config", [CONFIG, SWITCHED], ids=["flux1", "switched"])
def test_a_rank_may_hold_half_of_the_heads(config):
    """Tensor parallelism without an edit: two blocks with half of the rows and columns each add up to the whole."""
    block, config = build(config).single_blocks[0], replace(config, bias=False)
    x_BSD, vec_BD = torch.randn(2, 7, 64), torch.randn(2, 64)
    table = rotary_table(torch.randint(0, 9, (2, 7, 3)), config.axes_dim, config.theta)
    if block.linear2.bias is not None:
        block.linear2.bias.data.zero_()
    modulation = build().single_blocks[0].modulation(vec_BD)[0]
    expected = block(x_BSD, modulation, table) - x_BSD

    parts = 5 if config.swiglu else 4  # q, k, v and the MLP, or its gate and value
    inner = int(config.hidden_size * config.mlp_ratio)
    sizes = [config.hidden_size] * 3 + [inner] * (parts - 3)
    total = torch.zeros_like(expected)
    for rank in range(2):
        share = SingleBlock(config)
        share.norm.load_state_dict(block.norm.state_dict())
        rows = [part.chunk(2)[rank] for part in block.linear1.weight.split(sizes)]
        columns = [part.chunk(2, dim=1)[rank] for part in block.linear2.weight.split([64, inner], dim=1)]
        share.linear1.weight, share.linear2.weight = nn.Parameter(torch.cat(rows)), nn.Parameter(torch.cat(columns, 1))
        if block.linear1.bias is not None:
            biases = [part.chunk(2)[rank] for part in block.linear1.bias.split(sizes)]
            share.linear1.bias = nn.Parameter(torch.cat(biases))
        total += share(x_BSD, modulation, table) - x_BSD
    torch.testing.assert_close(total, expected, atol=TOLERANCE, rtol=TOLERANCE)


# --- initialization


def test_every_parameter_learns():
    for config in (CONFIG, SWITCHED):
        model = build(config)
        grads = gradients(model, model(**make_inputs(config)))
        assert not [name for name, grad in grads.items() if not grad.any()]


@pytest.mark.parametrize("config", [CONFIG, SWITCHED], ids=["flux1", "switched"])
def test_init_table(config):
    model = FluxTransformer(config)
    init_weights(model, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif any(part in name for part in ("bias", "img_mod", "txt_mod", "modulation", "final_layer")):
            assert not parameter.any(), name
        elif name.startswith(("time_in", "vector_in", "guidance_in")):
            assert math.isclose(parameter.std().item(), 0.02, rel_tol=0.05), name
            assert parameter.abs().max() > 0.05, name  # normal, not uniform
        else:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.95 * bound < parameter.abs().max() <= bound, name
            assert math.isclose(parameter.std().item(), bound / math.sqrt(3), rel_tol=0.1), name


def test_fresh_model_predicts_zero():
    model = FluxTransformer(CONFIG)
    init_weights(model, seed=0)
    assert not model(**make_inputs()).any()


def test_init_depends_on_seed_and_name_alone():
    def initial(config: TransformerConfig, seed: int) -> dict[str, Tensor]:
        with torch.device("meta"):
            model = FluxTransformer(config)
        model.to_empty(device="cpu")
        init_weights(model, seed)
        return model.state_dict()

    torch.manual_seed(1)
    weights = initial(CONFIG, seed=3)
    torch.manual_seed(2)
    deeper = initial(replace(CONFIG, depth=3, guidance_embed=True), seed=3)
    assert all(torch.equal(weights[name], deeper[name]) for name in weights)
    other_seed = initial(CONFIG, seed=4)
    name = "double_blocks.0.img_attn.qkv.weight"
    assert not torch.equal(weights[name], other_seed[name])
    assert not torch.equal(weights[name], weights[name.replace("img", "txt")])
    assert not torch.equal(weights[name], weights[name.replace("0", "1")])
