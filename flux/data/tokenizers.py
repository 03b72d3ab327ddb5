"""Prompts -> token ids for T5 and CLIP, as FluxPipeline makes them: padded to the maximum length and truncated."""

import logging
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from flux.config import Encoder
from flux.huggingface import CLIPTokenizer, PreTrainedTokenizerBase, T5Tokenizer
from flux.text_folders import (
    CLIP_TOKENIZER_FILES,
    T5_TOKENIZER_FILES,
    TINY_CLIP,
    TINY_T5,
    holds_any,
    resolve_clip,
    resolve_t5,
)

CLIP_LENGTH = 77

log = logging.getLogger(__name__)


class FluxTokenizer:
    """Tokenizes prompts for both encoders. Travels to loader workers by fork or by pickle.

    Args:
        t5_folder: holds `tokenizer.json` or `spiece.model`.
        clip_folder: holds `tokenizer.json`, or `vocab.json` and `merges.txt`.
        max_t5_length: L, at least 1; a longer prompt loses its tail, never its end token.

    Raises:
        ValueError: a folder holds no tokenizer of that kind.
    """

    def __init__(self, t5_folder: Path | str, clip_folder: Path | str, max_t5_length: int):
        t5 = _load("encoder.t5_encoder", T5Tokenizer, "\u2581", Path(t5_folder), T5_TOKENIZER_FILES)
        self._t5 = _padded(t5, max_t5_length)
        self._clip = load_clip_tokenizer("encoder.clip_encoder", Path(clip_folder))
        self._max_t5_length = max_t5_length
        self._told = False  # that a prompt was cut: said once
        self.vocabulary_sizes = {"t5": len(t5), "clip": self._clip.get_vocab_size()}

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """Ids, int64: "t5" [B, max_t5_length] and "clip" [B, 77]."""
        # One prompt at a time: encode_batch starts threads, and a fork after that makes every worker print a warning.
        t5 = [self._t5.encode(prompt) for prompt in prompts]
        cut = next((prompt for prompt, encoding in zip(prompts, t5, strict=True) if encoding.overflowing), None)
        if cut is not None and not self._told:
            self._told = True
            log.warning(
                "prompts of more than encoder.max_t5_encoding_len=%d tokens lose their tail, such as %.80r",
                self._max_t5_length,
                cut,
            )
        return {
            "t5": torch.tensor([encoding.ids for encoding in t5]),
            "clip": torch.tensor([self._clip.encode(prompt).ids for prompt in prompts]),
        }


def build_tokenizer(encoder: Encoder, test_mode: bool) -> FluxTokenizer:
    """The tokenizers of the configured encoders; the tiny ones in test mode.

    Raises:
        ValueError: names `encoder.t5_encoder` or `encoder.clip_encoder`, what is wrong with the folder and the remedy.
    """
    t5, clip = (
        (TINY_T5, TINY_CLIP) if test_mode else (resolve_t5(encoder.t5_encoder), resolve_clip(encoder.clip_encoder))
    )
    return FluxTokenizer(t5.tokenizer, clip.tokenizer, encoder.max_t5_encoding_len)


def load_clip_tokenizer(key: str, folder: Path) -> Tokenizer:
    """Gives exactly 77 ids; a longer prompt loses its tail, never its end token.

    Args:
        key: of the configuration, for messages.
        folder: holds `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Raises:
        ValueError: it holds no tokenizer of CLIP.
    """
    return _padded(_load(key, CLIPTokenizer, "a</w>", folder, CLIP_TOKENIZER_FILES), CLIP_LENGTH)


def _load(
    key: str,
    kind: type[PreTrainedTokenizerBase],
    piece: str,
    folder: Path,
    alternatives: tuple[tuple[str, ...], ...],
) -> PreTrainedTokenizerBase:
    """Reads a tokenizer. Its vocabulary must hold `piece`: the library takes some foreign files without a word."""
    needed = " or ".join(" and ".join(files) for files in alternatives)
    if not holds_any(folder, alternatives):
        raise ValueError(
            f"{key}: the tokenizer folder {folder} must hold {needed}: copy them there or correct the path"
        )
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
        foreign = tokenizer.backend_tokenizer.token_to_id(piece) is None
    except Exception:  # whatever the library trips over in a broken file
        foreign = True
    if foreign:
        raise ValueError(
            f"{key}: {folder} must hold a tokenizer that {kind.__name__} can read and does not: "
            f"fetch {needed} of that encoder again or correct the path"
        )
    return tokenizer


def _padded(tokenizer: PreTrainedTokenizerBase, length: int) -> Tokenizer:
    """The library's fast tokenizer, set to give exactly `length` ids."""
    fast: Tokenizer = tokenizer.backend_tokenizer
    fast.enable_truncation(length)
    fast.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return fast
