"""The frozen encoders of a run, held together: RawBatch -> EncodedBatch, prompts -> TextCond."""

from dataclasses import dataclass

import torch

from flux.batch import EncodedBatch, RawBatch, TextCond
from flux.codec import LatentCodec
from flux.conditioner import T5ClipConditioner
from flux.data.tokenizers import FluxTokenizer
from flux.spec import LATENT_STRIDE, PIXELS_PER_TOKEN

ALL_PARTS = frozenset({"t5", "clip", "autoencoder"})


@dataclass(frozen=True)
class Encoders:
    """Those of the encoders that a run needs: what a data set stores is not made again."""

    tokenizer: FluxTokenizer | None  # None: no prompt is encoded
    conditioner: T5ClipConditioner
    codec: LatentCodec
    device: torch.device

    def encode(self, raw: RawBatch) -> EncodedBatch:
        """Latents and text features of a batch that is on the device. No gradients."""
        if raw.moments_BCHW is not None:
            latents_BTC = self.codec.latents(raw.moments_BCHW, raw.draws.posterior_noise_BTC)
            height, width = (LATENT_STRIDE * side for side in raw.moments_BCHW.shape[-2:])
        else:
            assert raw.pixels_BCHW is not None
            latents_BTC = self.codec.encode(raw.pixels_BCHW, raw.draws.posterior_noise_BTC)
            height, width = raw.pixels_BCHW.shape[-2:]
        return EncodedBatch(latents_BTC, (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN), self._text(raw))

    def _text(self, raw: RawBatch) -> TextCond:
        """Of stored features and tokens, one or the other for each encoder."""
        txt_BLE, mask_BL = raw.t5_BLE, raw.t5_mask_BL
        if txt_BLE is None:
            txt_BLE, mask_BL = self.conditioner.encode_t5(raw.tokens["t5"])
        pooled_BV = raw.pooled_BV
        if pooled_BV is None:
            pooled_BV = self.conditioner.encode_clip(raw.tokens["clip"])
        return TextCond(txt_BLE, pooled_BV, mask_BL)

    def encode_prompts(self, prompts: list[str]) -> TextCond:
        """Text features of prompts, on the device."""
        assert self.tokenizer is not None
        tokens = {key: ids.to(self.device) for key, ids in self.tokenizer(prompts).items()}
        return self.conditioner.encode(tokens)

    def describe(self) -> str:
        """Sizes in millions of parameters, for people."""
        parts = {"T5": self.conditioner.t5, "CLIP": self.conditioner.clip, "autoencoder": self.codec.autoencoder}
        return ", ".join(
            f"{name} {sum(parameter.numel() for parameter in part.parameters()) / 1e6:.1f} M"
            if part
            else f"{name} stored"
            for name, part in parts.items()
        )
