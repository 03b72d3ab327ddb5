"""The door to transformers: the classes that the recipe uses, without what other libraries say when they come along.

transformers imports torchao wherever it is installed, which then reports that its CUDA libraries do not load on a CPU,
and a deprecated call of its own, on every process and before the run has said a word.
"""

import logging

_NOISE = ("Failed to load", "register_constant() on Enum")


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _NOISE)


for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).addFilter(_is_news)

from transformers import (  # noqa: E402, F401
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
