"""Makes assets/tiny/t5 and assets/tiny/clip: small text encoders with real tokenizers in the Hugging Face layout.

    python -m scripts.make_tiny_text_encoders

The tokenizers are trained here, on the captions of the shapes data and on English-like sentences put together below.
The weights are random, yet shaped so that features are useful: T5's heads look at fixed neighbors, so that the feature
of "red" tells whether a circle or a background follows; both networks keep different words far apart. They are stored
in bfloat16, so that a run in either dtype has the same weights.
"""

import argparse
import io
import json
import math
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flux.data.shapes import SCENES
from flux.data.tokenizers import CLIP_LENGTH
from flux.rng import keyed_generator
from flux.spec import SPECS
from flux.text_folders import ASSETS

SEED = 0
SENTENCES = 6000
MADE_UP_WORDS = 4000
T5_PIECES = 1000
CLIP_MERGES = 600
PRINTABLE = "".join(map(chr, range(32, 127)))
# Not "<unk>": a caption that holds these five characters would then be cut down to the unknown token.
UNKNOWN = "\u2047"

ADJECTIVES = """
big bright calm clean cold dark deep dry empty fast flat fresh golden happy heavy high hot huge little long low narrow
new old open pale plain pretty quiet round sharp short simple slow small soft strange striped strong sunny tall thick
thin tiny warm wet wide wild wooden young
"""
COLORS = """
red orange yellow green blue purple pink brown gray white black silver
"""
NOUNS = """
animal apple arm bag ball bank beach bear bed bench bike bird boat book bottle bowl box boy bread bridge building bus
cake camera car cat chair child church city clock cloud coat computer corner couple cow cup desk dog door dress
elephant eye face family farm field fire fish floor flower food forest fruit garden girl glass grass ground group hair
hand hat head hill horse house ice image island kitchen lake lamp leaf light line man map meal mirror moon mountain
mouth night ocean office orange paper park path pattern people person phone photo picture pizza plane plant plate
portrait rain river road rock roof room rose sand scene school sea shadow sheep ship shirt shoe shop sign sink sky
snow stone store storm street sun surface table toilet tower town toy track train tree truck umbrella vase view
village wall water wave wheel wind window winter woman wood world zebra
"""
VERBS = """
carries catches climbs covers crosses draws eats faces fills follows holds hides keeps leads leaves looks makes meets
moves opens paints passes plays pulls pushes reaches rides runs sees shows sits sleeps stands stops takes touches
turns walks watches wears works writes
"""
PLACES = """
above across against along around at behind below beside between beyond by down from in inside into near of off on
onto outside over past through to toward under with without
"""
FRAGMENTS = """
ab able ac ad age al an ance and ant ap ar ard art as at ate ation ba be ble bo bu ca ce cent ch che ci ck co com con
cr cu da de der di dis do du ed el em en end ent er es est ex fe fi for fr ful ge gi go gr ha he hi ho ic ice il im in
ine ing ion is ish ist it ity ive ize ja ke la ld le less li lo lu ly ma ment mi mo mu na ne ness ni no nt ol om on op
or ou ough ous out over pa pe per pi pl po pr pre pro qu ra re ri ro ru sa se sh si sp ss st str su ta te ter th ti
tion to tr tu ty ul um un under up ur us ut va ve ver vi vo wa we wh wi wo ya
"""
FRAMES = (
    "a {adjective} {noun} {place} a {noun}",
    "The {adjective} {noun} {verb} the {noun}.",
    "a photo of a {color} {noun} {place} the {adjective} {noun}",
    "Two {noun}s and one {noun}, seen {place} the {noun}",
    "It is not what the {noun} {verb}; there are {number} more.",
    "close up of {adjective} {color} {noun}s, {adjective} light, {number} mm",
    "An old {noun} that {verb} {place} its {noun}, painted in oil",
    "{noun} {place} {noun}: someone is going there, or was looking for the {adjective} {noun}",
    "a {color} and {color} {noun} next to a {noun} with a {color} {noun} in the background",
    "{color} {noun}",
)


def make_corpus() -> list[str]:
    """Every shapes caption, English-like sentences and every printable ASCII character; always the same lines."""
    draw = random.Random(SEED)
    words: dict[str, Callable[[], str]] = {
        "adjective": lambda: draw.choice(ADJECTIVES.split()),
        "color": lambda: draw.choice(COLORS.split()),
        "noun": lambda: draw.choice(NOUNS.split()),
        "verb": lambda: draw.choice(VERBS.split()),
        "place": lambda: draw.choice(PLACES.split()),
        "number": lambda: str(draw.randrange(1000)),
    }

    def fill(frame: str) -> str:
        parts = string.Formatter().parse(frame)
        return "".join(text + (words[field]() if field else "") for text, field, _, _ in parts)

    lines = [scene.caption for scene in SCENES] + [fill(draw.choice(FRAMES)) for _ in range(SENTENCES)]
    # Sentencepiece takes as pieces only what occurs in two different words: "yellow" and "yellow,".
    lines += [
        f"{word}, {word}." for word in sorted({word for line in lines for word in line.split() if word.isalpha()})
    ]
    # Made-up words keep common fragments among the pieces: a word that is not above then costs a few, not one a letter.
    lines += ["".join(draw.choices(FRAGMENTS.split(), k=draw.randint(2, 4))) for _ in range(MADE_UP_WORDS)]
    return [*lines, " ".join(PRINTABLE)]


def make_t5_tokenizer(corpus: list[str], folder: Path) -> None:
    """Unigram sentencepiece model with T5's special ids: pad 0, end 1, unknown 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="unigram",
        vocab_size=T5_PIECES,
        character_coverage=1.0,
        required_chars=PRINTABLE.replace(" ", ""),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        unk_piece=UNKNOWN,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0, unk_token=UNKNOWN, model_max_length=512)
    tokenizer.save_pretrained(folder)


def make_clip_tokenizer(corpus: list[str], folder: Path) -> None:
    """Byte-level BPE in CLIP's order: 256 bytes, the same at the end of a word, merges, start, end."""
    blank = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=512 + CLIP_MERGES, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]][:CLIP_MERGES]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_LENGTH).save_pretrained(folder)


def make_t5(vocabulary: int, width: int) -> T5EncoderModel:
    """Two layers in the shape of T5 v1.1 (gated GELU); each head looks at one neighbor, by its position bias."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=16,
        num_heads=8,
        d_ff=256,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,  # as the files of T5 v1.1 say
        decoder_start_token_id=0,
    )
    model = T5EncoderModel(config)
    width_in = 1 / math.sqrt(width)
    scales = {
        "shared": 1.0,
        "SelfAttention.q": 0.3 * width_in,
        "SelfAttention.k": 0.3 * width_in,
        "SelfAttention.v": width_in,
        "SelfAttention.o": 0.6 * width_in,
        "relative_attention_bias": 0.5,
        "wi_0": width_in,
        "wi_1": width_in,
        "DenseReluDense.wo": 0.6 / math.sqrt(config.d_ff),
    }
    _draw_weights(model, "t5", scales)
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    # T5's bucket of a near token is its distance before the query, or 16 + its distance behind it.
    for head, bucket in enumerate((1, 17, 2, 18, 3, 19, 4)):
        with torch.no_grad():
            bias[bucket, head] += 6.0
    return model


def make_clip(vocabulary: int, width: int) -> CLIPTextModel:
    """Two causal layers; what counts is the state at the end token, which sees the whole prompt."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=width,
        # Its own ids: an eos_token_id of 2 makes the library take the highest id of the prompt as its end.
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    model = CLIPTextModel(config)
    width_in = 1 / math.sqrt(width)
    scales = {
        "token_embedding": 1.0,
        "position_embedding": 0.5,
        "q_proj": 1.2 * width_in,
        "k_proj": 1.2 * width_in,
        "v_proj": width_in,
        "out_proj": 2.0 * width_in,
        "fc1": 1.5 * width_in,
        "fc2": 2.0 / math.sqrt(config.intermediate_size),
    }
    _draw_weights(model, "clip", scales)
    return model


@torch.no_grad()
def _draw_weights(model: nn.Module, stream: str, scales: dict[str, float]) -> None:
    """Normal weights of the given standard deviations; norms and biases stay as they are built, at one and zero."""
    for name, parameter in model.named_parameters():
        for part, scale in scales.items():
            if name.endswith(f"{part}.weight"):
                plain = name.removeprefix("text_model.")
                parameter.normal_(std=scale, generator=keyed_generator(SEED, f"tiny/{stream}", plain))


def save_encoder(model: PreTrainedModel, folder: Path, prefix: str) -> None:
    """Writes config.json and model.safetensors under the names that published files use."""
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    plain = {name.removeprefix(prefix): parameter for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {prefix + name: tensor.detach().bfloat16() for name, tensor in plain.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Makes the tiny T5 and CLIP that the default run uses.")
    parser.add_argument("--out", type=Path, default=ASSETS / "tiny", help="folder of t5/ and clip/ (assets/tiny)")
    out: Path = parser.parse_args(arguments).out
    widths = SPECS["flux-tiny"].transformer
    assert widths.pooled_dim is not None
    for name in ("t5", "clip"):
        # Emptied first: the library would read an old tokenizer.json before a new spiece.model.
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    corpus = make_corpus()
    make_t5_tokenizer(corpus, out / "t5")
    make_clip_tokenizer(corpus, out / "clip")
    save_encoder(make_t5(T5_PIECES, widths.context_dim), out / "t5", "")
    save_encoder(make_clip(512 + CLIP_MERGES + 2, widths.pooled_dim), out / "clip", "text_model.")
    for file in sorted(out.glob("t5/*")) + sorted(out.glob("clip/*")):
        print(f"{file.stat().st_size:>9,} bytes  {file}")


if __name__ == "__main__":
    main()
