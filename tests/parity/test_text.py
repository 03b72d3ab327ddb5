"""Text encoding against FluxPipeline.encode_prompt, with the tiny encoders loaded by each side on its own."""

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from flux.batch import TextCond
from flux.conditioner import build_conditioner
from flux.config import Encoder
from flux.data.tokenizers import build_tokenizer
from flux.spec import SPECS
from flux.text_folders import TINY_CLIP, TINY_T5

TOLERANCE = 1e-6  # the same networks on the same ids: only threads may reorder a sum
DIFFERENT = 1e-3  # a fault must move the features (of unit size) by far more than that
LENGTH = 24
PROMPTS = [
    "a large yellow triangle at the bottom right on an orange background",
    "a red circle on a blue background",
    "",
    "It's 42 ~odd~ <things>, {really}? </s> <pad> \u00e9\u4e2d",
    "a very long prompt that goes on and on " * 12,
]
CUT = 4  # place of the long prompt


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(dtype) -> FluxPipeline:
    kind = getattr(torch, dtype)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        transformer=None,
        text_encoder=CLIPTextModel.from_pretrained(TINY_CLIP.weights, dtype=kind),
        text_encoder_2=T5EncoderModel.from_pretrained(TINY_T5.weights, dtype=kind),
        tokenizer=CLIPTokenizer.from_pretrained(TINY_CLIP.tokenizer),
        tokenizer_2=T5Tokenizer.from_pretrained(TINY_T5.tokenizer),
    )


@torch.no_grad()
def theirs(pipeline: FluxPipeline, prompts: list[str] = PROMPTS) -> tuple[torch.Tensor, torch.Tensor]:
    txt_BLE, pooled_BV, _ = pipeline.encode_prompt(prompts, device=torch.device("cpu"), max_sequence_length=LENGTH)
    return txt_BLE, pooled_BV


def ours(dtype: str, length: int = LENGTH, mask_padding: bool = False) -> TextCond:
    encoder = Encoder(dtype=dtype, max_t5_encoding_len=length, mask_padding=mask_padding)
    conditioner = build_conditioner(encoder, SPECS["flux-tiny"].transformer, test_mode=False, device="cpu")
    return conditioner.encode(build_tokenizer(encoder, test_mode=False)(PROMPTS))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def test_features_are_those_of_the_pipeline(pipeline, dtype):
    txt_BLE, pooled_BV = theirs(pipeline)
    cond = ours(dtype)
    assert cond.mask_BL is None
    assert cond.txt_BLE.dtype == cond.pooled_BV.dtype == txt_BLE.dtype == getattr(torch, dtype)
    assert gap(cond.txt_BLE, txt_BLE) <= TOLERANCE
    assert gap(cond.pooled_BV, pooled_BV) <= TOLERANCE


def test_masked_padding_is_seen(pipeline, dtype):
    """Negative control: every token of a short prompt changes when padding is hidden from T5."""
    txt_BLE, _ = theirs(pipeline)
    masked = ours(dtype, mask_padding=True)
    assert gap(masked.txt_BLE[1, 0], txt_BLE[1, 0]) > DIFFERENT


def test_another_length_is_seen(pipeline, dtype):
    """Negative control: more padding reaches the features of the words, and a longer cut the prompt that is cut."""
    txt_BLE, _ = theirs(pipeline)
    longer = ours(dtype, length=2 * LENGTH)
    assert gap(longer.txt_BLE[1, :8], txt_BLE[1, :8]) > DIFFERENT
    assert gap(longer.txt_BLE[CUT, LENGTH - 1], txt_BLE[CUT, LENGTH - 1]) > DIFFERENT


def test_another_prompt_is_seen(pipeline, dtype):
    """Negative control: swapping the colors of shape and background changes both encoders' features."""
    txt_BLE, pooled_BV = theirs(pipeline, ["a blue circle on a red background"])
    cond = ours(dtype)
    assert gap(cond.txt_BLE[1], txt_BLE[0]) > DIFFERENT
    assert gap(cond.pooled_BV[1], pooled_BV[0]) > DIFFERENT
