"""The frozen encoders of a run, held together: RawBatch -> EncodedBatch, prompts -> TextCond."""

from dataclasses import dataclass

import torch

from flux.batch import EncodedBatch, RawBatch, TextCond
from flux.codec import LatentCodec
from flux.conditioner import T5ClipConditioner
from flux.data.tokenizers import FluxTokenizer
from flux.spec import PIXELS_PER_TOKEN


@dataclass(frozen=True)
class Encoders:
    tokenizer: FluxTokenizer
    conditioner: T5ClipConditioner
    codec: LatentCodec
    device: torch.device

    def encode(self, raw: RawBatch) -> EncodedBatch:
        """Latents and text features of a batch that is on the device. No gradients."""
        height, width = raw.pixels_BCHW.shape[-2:]
        return EncodedBatch(
            latents_BTC=self.codec.encode(raw.pixels_BCHW, raw.draws.posterior_noise_BTC),
            grid=(height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN),
            text=self.conditioner.encode(raw.tokens),
        )

    def encode_prompts(self, prompts: list[str]) -> TextCond:
        """Text features of prompts, on the device."""
        tokens = {key: ids.to(self.device) for key, ids in self.tokenizer(prompts).items()}
        return self.conditioner.encode(tokens)

    def describe(self) -> str:
        """Sizes in millions of parameters, for people."""
        parts = {"T5": self.conditioner.t5, "CLIP": self.conditioner.clip, "autoencoder": self.codec.autoencoder}
        return ", ".join(
            f"{name} {sum(parameter.numel() for parameter in part.parameters()) / 1e6:.1f} M"
            for name, part in parts.items()
        )
