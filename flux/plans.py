"""What parallel/ needs to know of the transformer: module-name patterns, `*` stands for a part. No torch here."""

from dataclasses import dataclass

from flux.spec import TransformerConfig


@dataclass(frozen=True)
class ParallelPlan:
    """How the transformer may be split, recomputed, compiled and quantized.

    Args:
        blocks: what repeats, in the order of the forward pass: the unit of FSDP, recomputation and compilation.
        attention: the parameter-free modules in which tokens meet.
        sequence_tensors: what has text or image tokens along dim 1: arguments of the forward pass, and the target.
        column: linear layers whose rows are split over tensor parallel ranks, and the number of equal pieces their rows
            consist of: each piece is split by itself, so that a rank holds whole heads and the MLP columns that match.
        row: linear layers whose columns are split, and the number of pieces of these.
        head_norms: norms that meet only a rank's own heads.
        modulation: linear layers of the blocks that see one row per sample: where their weights are split over ranks,
            outputs travel with less effort.
        modulation_product: the parameter-free module that applies all of these.
        quantized: linear layers that may compute in 8 bits. Modulation, time, vector and guidance layers see one row
            per sample, too few to gain anything; the first and the last layers are small and carry the most precision.
        precise_weight_gradients: of those, layers whose weight gradient stays in the computation's dtype: with an 8-bit
            gradient of the double blocks' qkv, training FLUX.1 ended in NaN within 20 steps.
    """

    blocks: tuple[str, ...]
    attention: str
    sequence_tensors: tuple[str, ...]
    column: dict[str, int]
    row: dict[str, int]
    head_norms: tuple[str, ...]
    modulation: tuple[str, ...]
    modulation_product: str
    quantized: tuple[str, ...]
    precise_weight_gradients: tuple[str, ...]


def make_plan(config: TransformerConfig) -> ParallelPlan:
    """The plan of a transformer of these sizes."""
    column = {"double_blocks.*.*_attn.qkv": 3, "double_blocks.*.*_mlp.0": 2 if config.swiglu else 1}
    row = {"double_blocks.*.*_attn.proj": 1, "double_blocks.*.*_mlp.2": 1}
    blocks: tuple[str, ...] = ("double_blocks.*",)
    modulation: tuple[str, ...] = ("double_blocks.*.*_mod.lin",)
    head_norms: tuple[str, ...] = ("double_blocks.*.*_attn.norm.*_norm",)
    if config.depth_single:  # Qwen-Image has none
        mlp = int(config.mlp_ratio)  # the MLP's width in pieces of the hidden size
        assert mlp == config.mlp_ratio, f"mlp_ratio={config.mlp_ratio} packs no whole pieces into linear1 and linear2"
        column["single_blocks.*.linear1"] = 3 + (2 * mlp if config.swiglu else mlp)
        row["single_blocks.*.linear2"] = 1 + mlp
        blocks += ("single_blocks.*",)
        modulation += ("single_blocks.*.modulation.lin",)
        head_norms += ("single_blocks.*.norm.*_norm",)
    return ParallelPlan(
        blocks=blocks,
        attention="*_blocks.*.attention",
        sequence_tensors=("img_BTC", "img_ids_BTA", "txt_BLE", "txt_ids_BLA", "txt_mask_BL", "target_BTC"),
        column=column,
        row=row,
        head_norms=head_norms,
        modulation=() if config.shared_modulation else modulation,
        modulation_product="block_modulation",
        quantized=(*column, *row),
        precise_weight_gradients=("double_blocks.*.*_attn.qkv",),
    )
