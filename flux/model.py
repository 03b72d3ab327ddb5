"""The transformer that predicts the velocity: FLUX.1, FLUX.2 and Qwen-Image in one class.

FLUX.1: https://github.com/black-forest-labs/flux; FLUX.2: https://github.com/black-forest-labs/flux2. Module names are
theirs; the families differ in the switches of `TransformerConfig`. This is plain single-device code: sharding,
recomputation, compilation and quantization are applied from outside, by module name. Two seams without parameters
serve them and may be replaced: `attention` in each block, and `block_modulation`, which applies the modulation layers
of all blocks before the first of them runs.

Names end in their dims (legend: flux/batch.py). Inside a block heads stay where the linear layer put them,
`[B, S, N, K]`, and are always unfolded by the head dim, never by their number, so that a rank may hold a part of them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.spec import TransformerConfig

_EPS = 1e-6  # of every normalization, in all families
TIME_FEATURES = 256
SHORT_FOR_CPU = (
    128  # tokens; up to here torch's attention for CPUs is faster in fp32 than in bf16, its backward up to 8 times
)


class Modulation(NamedTuple):
    """What the conditioning does to one branch of a block; each `[B, 1, D]`, or `[B, T, D]` to differ by token."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


DoubleModulation = tuple[tuple[Modulation, ...], tuple[Modulation, ...]]  # (image, text), each (attention, MLP)


class FluxTransformer(nn.Module):
    """Predicts the velocity `noise - latents` of every image token."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        D, bias = config.hidden_size, config.bias
        if D % config.num_heads or sum(config.axes_dim) != config.head_dim:
            raise ValueError(
                f"axes_dim={config.axes_dim} must add up to hidden_size={D} divided by num_heads={config.num_heads}"
            )
        self.config = config
        self.img_in = nn.Linear(config.in_channels, D, bias=bias)
        self.txt_norm = nn.RMSNorm(config.context_dim, eps=_EPS) if config.context_norm else nn.Identity()
        self.txt_in = nn.Linear(config.context_dim, D, bias=bias)
        self.time_in = Embedder(TIME_FEATURES, D, bias)
        self.vector_in = Embedder(config.pooled_dim, D, bias) if config.pooled_dim else None
        self.guidance_in = Embedder(TIME_FEATURES, D, bias) if config.guidance_embed else None
        if not config.shared_modulation:
            self.block_modulation = LinearGroup()
        else:
            self.double_stream_modulation_img = ModulationLinear(D, 2, bias)
            self.double_stream_modulation_txt = ModulationLinear(D, 2, bias)
            self.single_stream_modulation = ModulationLinear(D, 1, bias)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single))
        self.final_layer = FinalLayer(D, config.in_channels, bias)

    def forward(
        self,
        img_BTC: Tensor,
        img_ids_BTA: Tensor,
        txt_BLE: Tensor,
        txt_ids_BLA: Tensor,
        t_B: Tensor,
        pooled_BV: Tensor | None = None,
        guidance_B: Tensor | None = None,
        txt_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Returns velocity_BTC in the dtype of the computation.

        Args:
            img_BTC: noisy tokens. Like txt_BLE and pooled_BV of any floating dtype; cast to the parameters'.
            img_ids_BTA: int64 positions (flux/positions.py), and so txt_ids_BLA.
            txt_BLE: text features.
            t_B: fp32 time in 0..1, 1 = noise.
            pooled_BV: pooled text feature, for models with `pooled_dim` and only those.
            guidance_B: fp32 guidance scale, for models with `guidance_embed` and only those.
            txt_mask_BL: bool, True = attend to this text token; None: to all, padding too, as FLUX was trained.

        Raises:
            ValueError: pooled_BV or guidance_B is missing, or given to a model without it.
        """
        dtype = self.img_in.weight.dtype
        rotary = rotary_table(torch.cat((txt_ids_BLA, img_ids_BTA), dim=1), self.config.axes_dim, self.config.theta)
        mask_BS = None if txt_mask_BL is None else F.pad(txt_mask_BL, (0, img_BTC.shape[1]), value=True)
        vec_BD = self.embed_conditions(t_B, pooled_BV, guidance_B)
        double, single = self.modulate_blocks(vec_BD)

        img_BTD = self.img_in(img_BTC.to(dtype))
        txt_BLD = self.txt_in(self.txt_norm(txt_BLE.to(dtype)))
        for block, pair in zip(self.double_blocks, double, strict=True):
            img_BTD, txt_BLD = block(img_BTD, txt_BLD, pair, rotary, mask_BS)
        x_BSD = torch.cat((txt_BLD, img_BTD), dim=1)
        for block, modulation in zip(self.single_blocks, single, strict=True):
            # Of the last block nobody reads the text: three eighths of its products where that is half of the tokens.
            unread = txt_BLD.shape[1] if block is self.single_blocks[-1] else 0
            x_BSD = block(x_BSD, modulation, rotary, mask_BS, unread)
        return self.final_layer(x_BSD[:, -img_BTD.shape[1] :], vec_BD)

    def embed_conditions(self, t_B: Tensor, pooled_BV: Tensor | None, guidance_B: Tensor | None) -> Tensor:
        """All that is said about a sample as a whole, in one vector: vec_BD."""
        given = (("pooled_BV", pooled_BV, self.vector_in), ("guidance_B", guidance_B, self.guidance_in))
        for name, value, layer in given:
            if (value is None) != (layer is None):
                raise ValueError(f"{name} must {'be' if value is None else 'not be'} given to this flavor")
        vec_BD = self.time_in(time_features(t_B))
        if self.guidance_in is not None and guidance_B is not None:
            vec_BD = vec_BD + self.guidance_in(time_features(guidance_B))
        if self.vector_in is not None and pooled_BV is not None:
            vec_BD = vec_BD + self.vector_in(pooled_BV)
        return vec_BD

    def modulate_blocks(self, vec_BD: Tensor) -> tuple[list[DoubleModulation], list[Modulation]]:
        """The modulation of each double and of each single block."""
        depth = len(self.double_blocks)
        if self.config.shared_modulation:
            double = self.double_stream_modulation_img(vec_BD), self.double_stream_modulation_txt(vec_BD)
            return [double] * depth, [self.single_stream_modulation(vec_BD)[0]] * len(self.single_blocks)
        blocks = (*self.double_blocks, *self.single_blocks)
        layers = [layer for block in blocks for layer in block.children() if isinstance(layer, ModulationLinear)]
        outputs = self.block_modulation(F.silu(vec_BD), [layer.lin for layer in layers])
        made = [layer.divide(y) for layer, y in zip(layers, outputs, strict=True)]
        image, text, rest = made[: 2 * depth : 2], made[1 : 2 * depth : 2], made[2 * depth :]
        return list(zip(image, text, strict=True)), [single for (single,) in rest]


class DoubleBlock(nn.Module):
    """Image and text have their own weights and meet in attention."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        D, bias = config.hidden_size, config.bias
        if not config.shared_modulation:
            self.img_mod = ModulationLinear(D, 2, bias)
            self.txt_mod = ModulationLinear(D, 2, bias)
        self.img_norm1, self.txt_norm1 = build_layer_norm(D), build_layer_norm(D)
        self.img_attn, self.txt_attn = Projections(config), Projections(config)
        self.img_norm2, self.txt_norm2 = build_layer_norm(D), build_layer_norm(D)
        self.img_mlp, self.txt_mlp = build_mlp(config), build_mlp(config)
        self.attention = Attention()

    def forward(
        self,
        img_BTD: Tensor,
        txt_BLD: Tensor,
        modulation: DoubleModulation | Tensor,
        rotary: Tensor,
        mask_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns img_BTD, txt_BLD. `modulation` may be vec_BD, of which the block makes its own."""
        if isinstance(modulation, Tensor):
            modulation = self.img_mod(modulation), self.txt_mod(modulation)
        img_mod, txt_mod = modulation

        img_qkv = self.img_attn(modulate(self.img_norm1(img_BTD), img_mod[0]))
        txt_qkv = self.txt_attn(modulate(self.txt_norm1(txt_BLD), txt_mod[0]))
        q_BSNK, k_BSNK, v_BSNK = (torch.cat(pair, dim=1) for pair in zip(txt_qkv, img_qkv, strict=True))
        attn_BSNK = self.attention(rotate(q_BSNK, rotary), rotate(k_BSNK, rotary), v_BSNK, mask_BS)
        txt_attn_BLD, img_attn_BTD = attn_BSNK.flatten(2).split((txt_BLD.shape[1], img_BTD.shape[1]), dim=1)

        img_BTD = add_gated(img_BTD, img_mod[0], self.img_attn.proj(img_attn_BTD))
        img_BTD = add_gated(img_BTD, img_mod[1], self.img_mlp(modulate(self.img_norm2(img_BTD), img_mod[1])))
        txt_BLD = add_gated(txt_BLD, txt_mod[0], self.txt_attn.proj(txt_attn_BLD))
        txt_BLD = add_gated(txt_BLD, txt_mod[1], self.txt_mlp(modulate(self.txt_norm2(txt_BLD), txt_mod[1])))
        return img_BTD, txt_BLD


class SingleBlock(nn.Module):
    """One stream of all tokens; attention and MLP side by side, fused into two linear layers (arXiv 2302.05442)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, mlp_width(config), config.bias
        self.head_dim = config.head_dim
        self.widths = (3 * D, 2 * inner if config.swiglu else inner)  # of linear1: qkv, MLP
        if not config.shared_modulation:
            self.modulation = ModulationLinear(D, 1, bias)
        self.pre_norm = build_layer_norm(D)
        self.linear1 = nn.Linear(D, sum(self.widths), bias=bias)
        self.norm = QKNorm(config.head_dim)
        self.mlp_act = build_activation(config)
        self.linear2 = nn.Linear(D + inner, D, bias=bias)
        self.attention = Attention()

    def forward(
        self,
        x_BSD: Tensor,
        modulation: Modulation | Tensor,
        rotary: Tensor,
        mask_BS: Tensor | None = None,
        unread: int = 0,
    ) -> Tensor:
        """Returns x_BSD without its first `unread` tokens, which the others attend to all the same.

        `modulation` may be vec_BD, of which the block makes its own.
        """
        mod = self.modulation(modulation)[0] if isinstance(modulation, Tensor) else modulation
        qkv, mlp = self.project(modulate(self.pre_norm(x_BSD), mod), unread)
        q_BSNK, k_BSNK, v_BSNK = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        q_BSNK, k_BSNK = self.norm(q_BSNK, k_BSNK)
        attn_BSNK = self.attention(rotate(q_BSNK, rotary), rotate(k_BSNK, rotary), v_BSNK, mask_BS)
        y_BSD = self.linear2(torch.cat((attn_BSNK[:, unread:].flatten(2), self.mlp_act(mlp)), dim=-1))
        return add_gated(x_BSD[:, unread:], mod, y_BSD)

    def project(self, x_BSD: Tensor, unread: int) -> tuple[Tensor, Tensor]:
        """Queries, keys and values of all tokens, and what goes into the MLP of those after `unread`."""
        linear, width = self.linear1, self.widths[0]
        if unread and type(linear) is nn.Linear:  # what may be in its place cannot make some of its outputs alone
            fused = linear(x_BSD[:, unread:])
            bias = None if linear.bias is None else linear.bias[:width]
            qkv = F.linear(x_BSD[:, :unread], linear.weight[:width], bias)
            return torch.cat((qkv, fused[..., :width]), dim=1), fused[..., width:]
        fused = linear(x_BSD)
        # Shares of what is there, not fixed widths: under tensor parallelism a rank holds a part of each.
        qkv, mlp = fused.split([fused.shape[-1] * width // sum(self.widths) for width in self.widths], dim=-1)
        return qkv, mlp[:, unread:]


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int, bias: bool):
        super().__init__()
        self.norm_final = build_layer_norm(width)
        self.linear = nn.Linear(width, channels, bias=bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width, bias=bias))

    def forward(self, img_BTD: Tensor, vec_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec_BD)[:, None].chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm_final(img_BTD), 1 + scale))


class Attention(nn.Module):
    """Full attention, never causal. Parameter-free: what spreads a sequence over ranks puts its own in this place."""

    def forward(self, q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Returns attn_BSNK. mask_BS is bool, True = attend to this key."""
        dtype = v_BSNK.dtype
        if dtype is torch.bfloat16 and v_BSNK.device.type == "cpu" and v_BSNK.shape[1] <= SHORT_FOR_CPU:
            q_BSNK, k_BSNK, v_BSNK = q_BSNK.float(), k_BSNK.float(), v_BSNK.float()
        attn_BNSK = F.scaled_dot_product_attention(
            q_BSNK.transpose(1, 2),
            k_BSNK.transpose(1, 2),
            v_BSNK.transpose(1, 2),
            attn_mask=None if mask_BS is None else mask_BS[:, None, None, :],
            is_causal=False,
        )
        return attn_BNSK.transpose(1, 2).to(dtype)


class LinearGroup(nn.Module):
    """Linear layers of one input. Parameter-free: what keeps their weights split over ranks puts its own here."""

    def forward(self, x_BD: Tensor, layers: Sequence[nn.Linear]) -> list[Tensor]:
        """Returns the output of each layer, `[B, its outputs]`."""
        return [layer(x_BD) for layer in layers]


class Projections(nn.Module):
    """One stream's way into attention and, through `proj`, out of it."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BSNK, k_BSNK, v_BSNK = self.qkv(x_BSD).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        return *self.norm(q_BSNK, k_BSNK), v_BSNK


class QKNorm(nn.Module):
    """RMSNorm of every head of queries and keys; keeps the attention logits bounded in bf16 (arXiv 2302.05442)."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = nn.RMSNorm(head_dim, eps=_EPS)
        self.key_norm = nn.RMSNorm(head_dim, eps=_EPS)

    def forward(self, q_BSNK: Tensor, k_BSNK: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q_BSNK), self.key_norm(k_BSNK)


class ModulationLinear(nn.Module):
    """vec_BD -> the modulation of `branches` branches."""

    def __init__(self, width: int, branches: int, bias: bool):
        super().__init__()
        self.branches = branches
        self.lin = nn.Linear(width, 3 * branches * width, bias=bias)

    def forward(self, vec_BD: Tensor) -> tuple[Modulation, ...]:
        return self.divide(self.lin(F.silu(vec_BD)))

    def divide(self, y: Tensor) -> tuple[Modulation, ...]:
        """What `lin` has made, branch by branch."""
        chunks = y[:, None].chunk(3 * self.branches, dim=-1)
        return tuple(Modulation(*chunks[start : start + 3]) for start in range(0, len(chunks), 3))


class Embedder(nn.Module):
    """Features of the whole sample -> [B, D]."""

    def __init__(self, features: int, width: int, bias: bool):
        super().__init__()
        self.in_layer = nn.Linear(features, width, bias=bias)
        self.out_layer = nn.Linear(width, width, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(features.to(self.in_layer.weight.dtype))))


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def mlp_width(config: TransformerConfig) -> int:
    return int(config.hidden_size * config.mlp_ratio)


def build_layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=_EPS)


def build_activation(config: TransformerConfig) -> nn.Module:
    return SwiGLU() if config.swiglu else nn.GELU(approximate="tanh")


def build_mlp(config: TransformerConfig) -> nn.Sequential:
    inner = mlp_width(config)
    return nn.Sequential(
        nn.Linear(config.hidden_size, 2 * inner if config.swiglu else inner, bias=config.bias),
        build_activation(config),
        nn.Linear(inner, config.hidden_size, bias=config.bias),
    )


def modulate(x: Tensor, modulation: Modulation) -> Tensor:
    return torch.addcmul(modulation.shift, x, 1 + modulation.scale)


def add_gated(x: Tensor, modulation: Modulation, y: Tensor) -> Tensor:
    return torch.addcmul(x, modulation.gate, y)


def time_features(t_B: Tensor) -> Tensor:
    """Cosines, then sines of 1000 t at 128 wavelengths from 2 pi to 2 pi 10^4; fp32 `[B, 256]`."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angles = 1000 * t_B.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_table(ids_BSA: Tensor, axes_dim: tuple[int, ...], theta: float) -> Tensor:
    """Cosine and sine of every token's angle in each plane of a head: fp32 `[B, S, 1, K / 2, 2]`.

    Angles are float64: in fp32 a large position times a small frequency loses the digits that tell neighbors apart.
    """
    angles = []
    for axis, dims in enumerate(axes_dim):
        exponents = torch.arange(0, dims, 2, dtype=torch.float64, device=ids_BSA.device) / dims
        angles.append(ids_BSA[:, :, None, axis, None] * theta**-exponents)
    angles_BS1P = torch.cat(angles, dim=-1)
    return torch.stack((angles_BS1P.cos(), angles_BS1P.sin()), dim=-1).float()


def rotate(x_BSNK: Tensor, rotary: Tensor) -> Tensor:
    """Turn neighboring pairs of a head's dims by the token's angles (RoPE, arXiv 2104.09864), computed in fp32."""
    pairs = x_BSNK.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # Real arithmetic, which the compiler fuses with its surroundings; halves to be stacked it would write in fp32.
        cos, sin = rotary[..., :1], rotary[..., 1:]
        turned = pairs * cos + pairs.flip(-1) * sin * torch.arange(-1, 2, 2, device=pairs.device)
    else:  # the same product in one kernel
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    return turned.flatten(-2).to(x_BSNK.dtype)
