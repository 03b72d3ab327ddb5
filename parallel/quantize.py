"""Matrix products in 8 bits, through torchao: float8 (arXiv 2209.05433) and MXFP8 (arXiv 2310.10537).

Weights stay in their own dtype; each product casts its operands, with scales that it takes from them. Layers are
replaced by ones that hold the same parameters under the same names. torchao is no requirement of a run that has no use
for it.
"""

import importlib.util
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from parallel.config import FLOAT8, MX, MXFP8, SIZE_MULTIPLE, Float8, Quantize
from parallel.names import matches

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig


_Filter = Callable[[nn.Module, str], bool]


def apply_converters(
    model: nn.Module,
    converters: Sequence[str],
    section: Quantize,
    include: Collection[str],
    keep_weight_gradient: Collection[str],
) -> list[str]:
    """Makes linear layers compute in 8 bits, in place. Returns the names of those that do.

    Layers whose sizes no 8-bit unit takes, and those that `filter_fqns` names, stay as they are.

    Args:
        model: on the meta device or materialized.
        converters: FLOAT8, MXFP8, or none.
        include: patterns of the names of layers that may be converted.
        keep_weight_gradient: patterns of those whose weight gradient is not computed in 8 bits.

    Raises:
        ValueError: there is no layer to convert.
    """
    converted: list[str] = []
    for converter in converters:
        settings = section.linear.float8 if converter == FLOAT8 else section.linear.mx
        layers = {
            name: module
            for name, module in model.named_modules()
            if type(module) is nn.Linear and any(matches(name, pattern) for pattern in include)
        }
        for part in settings.filter_fqns:
            if not any(part in name for name in layers):
                raise ValueError(
                    f'{converter}.filter_fqns holds "{part}", which is part of no name of a layer that would be '
                    f'converted: use such as "{next(iter(layers))}"'
                )
        names = {
            name
            for name, module in layers.items()
            if not any(part in name for part in settings.filter_fqns)
            and all(size % SIZE_MULTIPLE[converter] == 0 for size in module.weight.shape)
        }
        if not names:
            raise ValueError(
                f"{converter} finds no layer to convert: {converter}.filter_fqns={settings.filter_fqns} must leave "
                f"some whose sizes are multiples of {SIZE_MULTIPLE[converter]}, or leave it out of model.converters"
            )
        precise = {name for name in names if any(matches(name, pattern) for pattern in keep_weight_gradient)}
        if isinstance(settings, Float8):
            _convert_to_float8(model, settings, names - precise, precise)
        else:
            _convert_to_mxfp8(model, settings, names - precise, precise)
        converted += sorted(names)
    return converted


def after_update(model: nn.Module, converters: Sequence[str], section: Quantize) -> None:
    """To be called after each change of the weights: computes all scales of a float8 all-gather in one reduction."""
    if FLOAT8 in converters and section.linear.float8.precompute_float8_dynamic_scale_for_fsdp:
        from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

        precompute_float8_dynamic_scale_for_fsdp(model)


def check_converters(converters: Sequence[str], section: Quantize, device_type: str) -> None:
    """Can these converters run here?

    Raises:
        ValueError: no torchao, or hardware that does not multiply in 8 bits.
    """
    if converters and importlib.util.find_spec("torchao") is None:
        raise ValueError(
            f"model.converters={list(converters)} needs torchao: install it with `pip install torchao==0.18.0`, or "
            "leave the key out"
        )
    if FLOAT8 in converters and not section.linear.float8.emulate:
        _check_capability(FLOAT8, (8, 9), device_type, f"{FLOAT8}.emulate=true")
    if MXFP8 in converters and section.linear.mx.recipe_name != "mxfp8_emulated":
        _check_capability(MXFP8, (10, 0), device_type, f'{MXFP8}.recipe_name="mxfp8_emulated"')


def _check_capability(converter: str, needed: tuple[int, int], device_type: str, instead: str) -> None:
    if device_type == "cuda":
        found = torch.cuda.get_device_capability()
        if found >= needed:
            return
        this = f"{torch.cuda.get_device_name()}, {found[0]}.{found[1]}"
    else:
        this = device_type
    raise ValueError(
        f"{converter} needs an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or newer (this: {this}): "
        f"set {instead} to try it in slow emulation, or leave it out of model.converters"
    )


def _convert_to_float8(model: nn.Module, settings: Float8, plain: set[str], precise: set[str]) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(
        Float8LinearConfig.from_recipe_name(settings.recipe_name),
        enable_fsdp_float8_all_gather=settings.enable_fsdp_float8_all_gather,
        emulate=settings.emulate,
    )
    convert_to_float8_training(model, config=config, module_filter_fn=_named(plain))
    convert_to_float8_training(model, config=_keep_weight_gradient(config), module_filter_fn=_named(precise))


def _named(names: set[str]) -> _Filter:
    return lambda _module, name: name in names


def _keep_weight_gradient(config: "Float8LinearConfig") -> "Float8LinearConfig":
    """The same, but the product of input and output gradient is taken of both as they are."""
    from torchao.float8 import CastConfig, ScalingType

    def disabled(cast: CastConfig) -> CastConfig:
        return CastConfig(scaling_type=ScalingType.DISABLED, target_dtype=cast.target_dtype)

    return replace(
        config,
        cast_config_input_for_grad_weight=disabled(config.cast_config_input),
        cast_config_grad_output_for_grad_weight=disabled(config.cast_config_grad_output),
    )


def _convert_to_mxfp8(model: nn.Module, settings: MX, plain: set[str], precise: set[str]) -> None:
    # torchao's own conversion, which wraps weights in a tensor subclass, forgets the bias of nn.Linear.
    from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    emulated = settings.recipe_name == "mxfp8_emulated"
    for name in plain | precise:
        linear: Any = model.get_submodule(name)
        with torch.device("meta"):
            layer = MXFP8Linear(
                linear.in_features,
                linear.out_features,
                bias=False,
                kernel_preference=KernelPreference.EMULATED if emulated else KernelPreference.AUTO,
                wgrad_with_hp=name in precise,
            )
        layer.weight, layer.bias = linear.weight, linear.bias
        model.set_submodule(name, layer)
