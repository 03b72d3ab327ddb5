"""The [model], [encoder], [data], [training], [validation] and [inference] sections."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from flux.spec import PIXELS_PER_TOKEN, SPECS

Dtype = Literal["bfloat16", "float32"]

# Names of data sets that a configuration may carry. A run refuses the ones that it has no reader for.
MIXABLE_DATASETS = (
    *("shapes", "imagefolder", "webdataset", "parquet", "cc12m-wds", "cc12m-test", "coco-validation"),
    *("cache", "mlperf"),
)
DATASETS = (*MIXABLE_DATASETS, "mixture")

TIME_STEPS = 8  # validation samples take eight times in turn


@dataclass(frozen=True)
class Model:
    """Which transformer is trained."""

    name: Annotated[Literal["flux"], "the model family"] = "flux"
    flavor: Annotated[str, "sizes and switches of the transformer (flux/spec.py)", tuple(SPECS)] = "flux-tiny"
    converters: Annotated[
        list[str],
        "what replaces linear layers before training; each is set up in its section",
        ("quantize.linear.float8", "quantize.linear.mx"),
    ] = field(default_factory=list)
    attention_backend: Annotated[
        Literal["auto", "cudnn", "flash", "flash3", "efficient", "math"],
        "torch's kernel of attention; auto on a GPU: cudnn up to 1024 tokens, above that FlashAttention-3 where it is "
        "installed, else flash",
    ] = "auto"


@dataclass(frozen=True)
class Encoder:
    """The frozen networks that turn pictures into latents and prompts into features."""

    t5_encoder: Annotated[
        str, "T5 encoder and its tokenizer: a folder, or a name that scripts.download_assets fetches", "[1, inf)"
    ] = "assets/tiny/t5"
    clip_encoder: Annotated[
        str, "CLIP text encoder and its tokenizer: a folder, or a name that scripts.download_assets fetches", "[1, inf)"
    ] = "assets/tiny/clip"
    autoencoder_path: Annotated[
        str,
        "the autoencoder: a safetensors file under Black Forest Labs' names or diffusers', or a pipeline's vae folder",
        "[1, inf)",
    ] = "assets/tiny/autoencoder.safetensors"
    max_t5_encoding_len: Annotated[
        int, "T5 tokens per prompt: longer ones are cut, shorter ones padded", "[1, 512]"
    ] = 256
    dtype: Annotated[Dtype, "number format of the text encoders and the autoencoder"] = "bfloat16"
    mask_padding: Annotated[bool, "hide padding tokens from T5 and the transformer; FLUX was trained seeing them"] = (
        False
    )
    cpu_offload: Annotated[
        bool, "keep T5's weights in the CPU's memory, from where a GPU fetches one block after the other"
    ] = False
    encode_ahead: Annotated[
        bool, "on a GPU, encode the next batch beside the current step, which takes memory for the encoders' work"
    ] = True
    sample_posterior: Annotated[bool, "draw latents from the autoencoder's posterior; false: take its mean"] = True


@dataclass(frozen=True)
class DataSource:
    """One of several data sets that are mixed. What is not set is as in [data]."""

    dataset: Annotated[str, "the kind of data set", MIXABLE_DATASETS] = "webdataset"
    dataset_path: Annotated[str | None, "where its pictures are", "[1, inf)"] = None
    weight: Annotated[float, "share of the samples that come from here, relative to the other weights", "[0, inf)"] = (
        1.0
    )
    caption_field: Annotated[str | None, "as data.caption_field", "[1, inf)"] = None
    image_field: Annotated[str | None, "as data.image_field", "[1, inf)"] = None
    random_crop: Annotated[bool | None, "as data.random_crop"] = None
    min_side: Annotated[int | None, "as data.min_side", "[1, inf)"] = None
    max_aspect: Annotated[float | None, "as data.max_aspect", "[1, inf)"] = None


@dataclass(frozen=True)
class Buckets:
    """Aspect-ratio buckets: every update has pictures of one shape, and pictures of all shapes are seen."""

    enable: Annotated[bool, "train on pictures in about their own shape instead of squares"] = False
    img_sizes: Annotated[
        list[int],
        "a picture is shown with the area of the largest of these squares that it fills; empty: training.img_size",
        "[1, inf)",
    ] = field(default_factory=list)
    step: Annotated[int, "sides are multiples of so many pixels, itself a multiple of 16", "[16, inf)"] = 64
    max_aspect: Annotated[float, "longest shape: the long side by the short one", "[1, inf)"] = 2.0
    constant_tokens: Annotated[
        bool, "larger pictures come in smaller updates, with as many tokens as global_batch_size pictures of img_size"
    ] = False


@dataclass(frozen=True)
class Data:
    """How data sets are read, for training and validation."""

    sources: Annotated[
        list[DataSource], 'data sets that training.dataset="mixture" mixes: one [[data.sources]] table for each'
    ] = field(default_factory=list)
    caption_field: Annotated[
        str | None,
        "column of parquet, or field of JSON, that holds the caption or a list of them; not set: text or caption",
        "[1, inf)",
    ] = None
    image_field: Annotated[
        str | None, "column of parquet that holds the picture; not set: image, jpg, png or webp", "[1, inf)"
    ] = None
    random_crop: Annotated[bool, "cut pictures to their shape at a random place; false: in the middle"] = True
    min_side: Annotated[int, "pictures with a shorter side, in pixels, are bad samples", "[1, inf)"] = 16
    max_aspect: Annotated[float, "pictures that are longer, long side by short side, are bad samples", "[1, inf)"] = 8.0
    max_megapixels: Annotated[float, "larger pictures are bad samples, found before they are decoded", "(0, 178]"] = (
        64.0
    )
    background: Annotated[str, "what shows through transparent places: a color such as #ffffff", "[1, inf)"] = "#ffffff"
    fast_jpeg: Annotated[bool, "let the JPEG decoder shrink large pictures, which saves most of its time"] = True
    empty_caption: Annotated[
        Literal["bad", "unconditional"], "whether an empty caption makes a bad sample, or one without a prompt"
    ] = "bad"
    max_bad_fraction: Annotated[float, "the run stops when more of the last 10,000 samples were bad", "[0, 1]"] = 0.01
    on_bad_shard: Annotated[
        Literal["stop", "skip"], "skip replaces the samples that a cut or lost shard does not give any more"
    ] = "stop"
    shuffle_window: Annotated[
        int,
        "so many shards (row groups of parquet) are shuffled together, which disks and networks like; 0: all",
        "[0, inf)",
    ] = 0
    index_folder: Annotated[str, "where the indexes of shards are kept", "[1, inf)"] = "outputs/index"
    index_workers: Annotated[int, "processes that read shards for an index; 0: this one does", "[0, inf)"] = 4
    shard_cache: Annotated[str, "folder on a local disk for copies of remote shards", "[1, inf)"] = "outputs/shards"
    shard_cache_gb: Annotated[
        float,
        "room for them in GB, the least used ones go; 0: no copies, every sample is fetched by itself",
        "[0, inf)",
    ] = 0.0
    worker_timeout_seconds: Annotated[
        int,
        "longest wait for a batch before the data workers are replaced, which happens once; 0: no limit",
        "[0, inf)",
    ] = 120
    buckets: Buckets = field(default_factory=Buckets)


@dataclass(frozen=True)
class DataLoader:
    """The processes that prepare batches."""

    num_workers: Annotated[int, "processes that prepare batches; 0: the training process does it", "[0, inf)"] = 0
    persistent_workers: Annotated[bool, "keep the workers alive from one pass over the data to the next"] = False
    pin_memory: Annotated[bool, "put batches into page-locked memory, which makes copies to a GPU faster"] = False
    prefetch_factor: Annotated[int | None, "batches that each worker prepares ahead; not set: 2", "[1, inf)"] = None


@dataclass(frozen=True)
class Training:
    """The data, the batch, the length of the run and the training objective."""

    dataset: Annotated[str, "what is trained on; shapes draws its own pictures, imagefolder reads yours", DATASETS] = (
        "shapes"
    )
    dataset_path: Annotated[
        str | None, "where the pictures are, for every data set that is read from disk", "[1, inf)"
    ] = None
    local_batch_size: Annotated[
        int, "samples per forward pass of each process, or of each group that shares samples", "[1, inf)"
    ] = 8
    global_batch_size: Annotated[
        int, "samples per update, reached by accumulating gradients; -1: no accumulation", "-1 or [1, inf)"
    ] = -1
    max_norm: Annotated[float, "gradients are scaled down to this norm when theirs is larger", "(0, inf)"] = 1.0
    steps: Annotated[int, "number of updates", "[1, inf)"] = 10_000
    dtype: Annotated[Dtype, "number format of weights and gradients; the optimizer's is optimizer.state_dtype"] = (
        "float32"
    )
    mixed_precision_param: Annotated[Dtype, "number format in which the transformer computes"] = "bfloat16"
    mixed_precision_reduce: Annotated[
        Dtype, "number format in which gradients are summed over processes; bfloat16 halves what is sent"
    ] = "float32"
    enable_cpu_offload: Annotated[
        bool, "keep weights, gradients and optimizer states in the CPU's memory and update them there"
    ] = False
    classifier_free_guidance_prob: Annotated[
        float, "probability that a prompt is replaced by the empty one, which classifier-free guidance needs", "[0, 1]"
    ] = 0.0
    prompt_dropout: Annotated[
        Literal["independent", "joint"], "whether T5 and CLIP lose their prompts independently or together"
    ] = "independent"
    img_size: Annotated[int, "side of the square training pictures in pixels, a multiple of 16", "[16, inf)"] = 256
    timestep_distribution: Annotated[
        Literal["uniform", "logit_normal"], "how training times between 0 and 1 are drawn (1 is pure noise)"
    ] = "uniform"
    timestep_shift: Annotated[
        Literal["none", "resolution"], "resolution moves the times towards noise for larger pictures, as sampling does"
    ] = "none"
    guidance: Annotated[float, "guidance value fed to models that embed one (flux-dev)", "[0, inf)"] = 1.0
    test_mode: Annotated[bool, "random one-layer text encoders of FLUX.1's widths, so that nothing is downloaded"] = (
        False
    )
    dataloader: DataLoader = field(default_factory=DataLoader)

    @property
    def img_tokens(self) -> int:
        """Image tokens of a square picture."""
        return (self.img_size // PIXELS_PER_TOKEN) ** 2

    def update_size(self, groups: int) -> int:
        """Samples per update, where `groups` of processes see different samples."""
        return max(self.global_batch_size, self.local_batch_size * groups)

    def accumulation(self, groups: int) -> int:
        """Forward passes per update."""
        return self.update_size(groups) // (self.local_batch_size * groups)

    def is_due(self, freq: int, step: int) -> bool:
        """Every `freq` steps and at the last one; 0: never."""
        return freq > 0 and (step % freq == 0 or step == self.steps)

    def describe_update(self, groups: int) -> str:
        """Such as `4 per step x 4 groups x 2 accumulated = 32 per update`."""
        dealt = f" x {groups} groups" if groups > 1 else ""
        product = f"{self.local_batch_size} per step{dealt} x {self.accumulation(groups)} accumulated"
        return f"{product} = {self.update_size(groups)} per update"


@dataclass(frozen=True)
class Validation:
    """A loss on held-out samples, and a grid of pictures, while training goes on."""

    enable: Annotated[bool, "compute the validation loss and draw the picture grid"] = False
    dataset: Annotated[
        str | None, "where the held-out samples come from; not set: a held-out part of training.dataset", DATASETS
    ] = None
    dataset_path: Annotated[
        str | None, "where the held-out pictures are; not set: a fixed part of training.dataset_path", "[1, inf)"
    ] = None
    local_batch_size: Annotated[int, "samples per process and forward pass", "[1, inf)"] = 8
    freq: Annotated[int, "steps from one validation loss to the next", "[1, inf)"] = 10
    times: Annotated[
        Literal["midpoints", "eighths"],
        "times of the samples in turn: (k + 0.5) / 8 as torchtitan takes them, or k / 8 as MLPerf does, k = 0..7",
    ] = "midpoints"
    all_timesteps: Annotated[bool, "measure every sample at all eight times, instead of each at one in turn"] = False
    target_loss: Annotated[
        float | None, "the run ends with success when the validation loss is no higher", "(0, inf)"
    ] = None
    steps: Annotated[int, "batches per validation loss, dealt to all processes; -1: all samples", "-1 or [1, inf)"] = -1
    enable_classifier_free_guidance: Annotated[bool, "draw the picture grid with classifier-free guidance"] = False
    classifier_free_guidance_scale: Annotated[float, "strength of that guidance; 1 is none", "[0, inf)"] = 5.0
    denoising_steps: Annotated[int, "Euler steps per picture of the grid", "[1, inf)"] = 50
    eval_freq: Annotated[
        int, "steps from one picture grid to the next, where validation is enabled; 0: no pictures", "[0, inf)"
    ] = 100
    save_img_count: Annotated[int, "pictures in the grid", "[1, inf)"] = 1
    save_img_folder: Annotated[str, "folder of the grids, inside the run folder", "[1, inf)"] = "img"
    prompts_path: Annotated[
        str | None, "text file with one prompt per line; not set: captions of the first held-out samples", "[1, inf)"
    ] = None
    clip_score_path: Annotated[
        str | None,
        "CLIP model that scores the pictures by their prompts: a folder, or a name that scripts.download_assets "
        "fetches; not set: no score",
        "[1, inf)",
    ] = None
    dataloader: DataLoader = field(default_factory=DataLoader)

    @property
    def cfg_scale(self) -> float:
        """The scale that pictures are drawn with; 1 is no guidance."""
        return self.classifier_free_guidance_scale if self.enable_classifier_free_guidance else 1.0


@dataclass(frozen=True)
class Inference:
    """What scripts.sample draws where its command line does not say otherwise."""

    prompts_path: Annotated[str | None, "text file with one prompt per line", "[1, inf)"] = None
    save_img_folder: Annotated[str, "where the pictures go", "[1, inf)"] = "inference_results"
    local_batch_size: Annotated[int, "pictures that a process draws at a time", "[1, inf)"] = 2
    img_size: Annotated[
        int, "side of the pictures in pixels, a multiple of 16; -1: as in training", "-1 or [16, inf)"
    ] = -1
