"""What a checkpoint has is compared with what a run wants before anything is loaded."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from checkpoint.compare import check_tensors, part_of
from checkpoint.slices import Slices

PATH = Path("run/checkpoint/step-7")
NAMES = ["blocks.0.weight", "optimizer.state.blocks.0.weight.exp_avg", "ema.blocks.0.weight"]


def has(*names: str, shape=(2, 3), dtype=torch.float32) -> dict[str, TensorStorageMetadata]:
    return {name: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), []) for name in names}


def wants(*names: str, shape=(2, 3), dtype=torch.float32) -> dict[str, Slices]:
    return {name: Slices(shape, dtype, []) for name in names}


def refusal(entries, wanted, ignored=(), may_cast=False) -> str:
    with pytest.raises(ValueError) as error:
        check_tensors(PATH, entries, wanted, ignored, may_cast)
    text = str(error.value)
    assert "\n" not in text and str(PATH) in text and ": " in text
    return text


def test_what_fits_is_accepted():
    check_tensors(PATH, has(*NAMES), wants(*NAMES), [], may_cast=False)


def test_parts():
    assert [part_of(name) for name in [*NAMES, "emaciated.weight"]] == ["model", "optimizer", "ema", "model"]


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_one_of_them_lacks_is_named(name):
    fewer = [other for other in NAMES if other != name]
    remedy = {
        NAMES[0]: "use the flavor and the settings",
        NAMES[1]: "exclude_from_loading=optimizer",
        NAMES[2]: "exclude_from_loading=ema",
    }[name]
    text = refusal(has(*fewer), wants(*NAMES))
    assert f"has no {name}" in text and remedy in text
    text = refusal(has(*NAMES), wants(*fewer))
    assert f"also has {name}" in text and remedy in text


def test_of_many_names_three_are_shown():
    text = refusal(has(*NAMES), wants(*NAMES, *(f"more.{number}" for number in range(9))))
    assert "more.0, more.1, more.2 and 6 more tensors" in text


def test_parts_that_are_left_out_may_be_there():
    check_tensors(PATH, has(*NAMES), wants(NAMES[0], NAMES[2]), ["optimizer"], may_cast=False)
    refusal(has(*NAMES), wants(NAMES[0], NAMES[2]), ["ema"])


def test_shapes_must_agree():
    text = refusal(has(*NAMES), wants(*NAMES[:2]) | wants(NAMES[2], shape=(3, 2)))
    assert f"{NAMES[2]} of shape [2, 3], and this run of shape [3, 2]" in text


def test_number_formats_must_agree_unless_the_weights_are_another_runs():
    other = wants(*NAMES, dtype=torch.bfloat16)
    text = refusal(has(*NAMES), other)
    assert "in float32, and this run in bfloat16" in text and "set training.dtype and optimizer.bf16" in text
    check_tensors(PATH, has(*NAMES), other, [], may_cast=True)


def test_another_number_format_of_the_optimizer_is_named():
    remedy = "set optimizer.state_dtype as it was, or let it start anew with checkpoint.exclude_from_loading=optimizer"
    codes = (NAMES[0], f"{NAMES[1]}_codes", f"{NAMES[1]}_scales", NAMES[2])
    for some, others in ((NAMES, codes), (codes, NAMES)):
        assert refusal(has(*some), wants(*others)).endswith(f"unlike this run: {remedy}")
    other = wants(NAMES[0], NAMES[2]) | wants(NAMES[1], dtype=torch.bfloat16)
    assert f"has {NAMES[1]} in float32, and this run in bfloat16: {remedy}" in refusal(has(*NAMES), other)
