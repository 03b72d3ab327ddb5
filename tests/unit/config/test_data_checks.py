"""Rules between the keys that say what a run reads: each names key, value, rule and remedy."""

import pytest

from config.parse import ConfigError, parse

MIXTURE = """
[training]
dataset = "mixture"
[[data.sources]]
dataset = "shapes"
weight = {0}
[[data.sources]]
dataset = "{1}"
{2}
weight = {0}
"""


def errors_of(tmp_path, text: str = "", *options: str) -> str:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse(["--job.config_file", str(file), *options])
    return str(caught.value)


def warnings_of(*options: str) -> str:
    return "\n".join(parse(list(options))[1])


@pytest.mark.parametrize("dataset", ["imagefolder", "webdataset", "parquet", "cache", "mlperf"])
def test_a_data_set_that_lies_somewhere_needs_its_place(tmp_path, dataset):
    assert f'training.dataset="{dataset}" needs training.dataset_path: set it to' in errors_of(
        tmp_path, "", f"--training.dataset={dataset}"
    )
    assert f'validation.dataset="{dataset}" needs validation.dataset_path: set it to' in errors_of(
        tmp_path, "", f"--validation.dataset={dataset}", "--validation.enable"
    )
    error = errors_of(tmp_path, MIXTURE.format(1, dataset, ""))
    assert f'data.sources[1].dataset="{dataset}" needs a dataset_path: set it to' in error


@pytest.mark.parametrize("dataset", ["shapes", "cc12m-wds", "cc12m-test", "coco-validation"])
def test_other_data_sets_need_none(dataset):
    parse([f"--training.dataset={dataset}"])


def test_a_mixture_and_its_sources_belong_together(tmp_path):
    assert "needs data.sources: write a [[data.sources]] table" in errors_of(tmp_path, "", "--training.dataset=mixture")
    error = errors_of(tmp_path, MIXTURE.format(1, "shapes", ""), "--training.dataset=shapes")
    assert 'data.sources is not read with training.dataset="shapes": set training.dataset="mixture"' in error
    error = errors_of(tmp_path, MIXTURE.format(1, "shapes", ""), "--validation.dataset=mixture")
    assert 'validation.dataset="mixture" must be one data set' in error
    error = errors_of(tmp_path, MIXTURE.format(1, "shapes", ""), "--validation.dataset_path=x")
    assert 'validation.dataset_path="x" needs validation.dataset beside a mixture' in error


def test_weights_that_sum_to_zero(tmp_path):
    error = errors_of(tmp_path, MIXTURE.format(0, "shapes", ""))
    assert error.endswith("data.sources have the weights 0, 0, which must not sum to 0: raise one of them")


def test_pictures_and_encoded_samples_do_not_mix(tmp_path):
    error = errors_of(tmp_path, MIXTURE.format(1, "cache", 'dataset_path = "cache"'))
    assert "data.sources mix encoded data sets" in error


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--data.buckets.step=24"], "data.buckets.step=24 must be a multiple of 16: use 16"),
        (
            ["--training.img_size=80"],
            "training.img_size has 80, which must be a multiple of data.buckets.step=64: use 64",
        ),
        (["--data.buckets.img_sizes=256,500"], "data.buckets.img_sizes has 500, which must be a multiple of"),
        (["--data.shuffle_window=4"], "data.shuffle_window=4 does not go with data.buckets.enable=true"),
    ],
)
def test_buckets(tmp_path, options, error):
    assert error in errors_of(tmp_path, "", "--data.buckets.enable", *options)


def test_padding_that_cannot_be_found_is_not_hidden(tmp_path):
    options = ("--training.dataset=mlperf", "--training.dataset_path=x")
    assert "encoder.mask_padding=true cannot hide" in errors_of(tmp_path, "", *options, "--encoder.mask_padding")


def test_what_is_probably_not_meant():
    warning = warnings_of("--training.dataset=parquet", "--training.dataset_path=x")
    assert "data.shuffle_window=0 shuffles all of the parquet files" in warning
    assert 'dataset_path="x" is not read: shapes draws its own' in warnings_of("--training.dataset_path=x")
    clip = ("--validation.clip_score_path=x", "--validation.enable")
    assert 'clip_score_path="x" is not read, since no pictures' in warnings_of(*clip, "--validation.eval_freq=0")
    assert "clip_score_path" not in warnings_of(*clip)
    few = ("--validation.enable", "--validation.local_batch_size=4", "--validation.steps=1")
    assert "validation.steps=1 x validation.local_batch_size=4 = 4 measurements do not take" in warnings_of(*few)
    for enough in (["--validation.steps=3"], ["--validation.steps=-1"], ["--validation.enable=false"]):
        assert "measurements" not in warnings_of(*few, *enough)
    warning = warnings_of(*few, "--validation.steps=3", "--validation.all_timesteps")
    assert "= 12 measurements do not take all 8 times equally often" in warning and warning.endswith("such as 16")
    both = ("--validation.enable", "--training.dataset=webdataset", "--training.dataset_path=x")
    warning = warnings_of(*both, "--validation.dataset_path=x")
    assert "so nothing is held out: leave it out, and a part of the data is" in warning
