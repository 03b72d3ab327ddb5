"""Files and command lines as people write them, and all their errors at once."""

import pytest

from config.job_config import JobConfig
from config.parse import ConfigError, load_config, parse

HUB_TOKEN = "hf_" + "aB3" * 12
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def run_file(tmp_path):
    """Writes a TOML file and returns its path."""

    def write(text: str | bytes) -> str:
        file = tmp_path / "run.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return write


def errors_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(list(argv))
    return str(caught.value).splitlines()


def test_without_arguments_everything_has_its_default():
    assert parse([]) == (JobConfig(), [])


def test_the_command_line_wins_and_the_last_word_counts(run_file):
    file = run_file("[training]\nsteps = 1\nlocal_batch_size = 2\nimg_size = 64\n")
    argv = [
        "--training.steps",
        "5",
        "--job.config_file",
        file,
        "--training.steps=6",
        "--training.local_batch_size",
        "3",
    ]
    training = parse(argv)[0].training
    assert (training.steps, training.local_batch_size, training.img_size) == (6, 3, 64)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--training.test_mode"], True),
        (["--training.test_mode", "--debug.seed", "1"], True),
        (["--training.test_mode", "true"], True),
        (["--training.test_mode=False"], False),
        (["--training.test_mode", "false"], False),
    ],
)
def test_booleans_on_the_command_line(argv, expected):
    assert parse(argv)[0].training.test_mode is expected


def test_negative_numbers_and_texts_with_equals_signs_on_the_command_line():
    config, _ = parse(["--validation.steps", "-1", "--job.description=a=b", "--job.dump_folder", "out put"])
    assert config.validation.steps == -1
    assert config.job.description == "a=b"
    assert config.job.dump_folder == "out put"


@pytest.mark.parametrize(
    "text",
    [
        "[training]\nsteps = 7\ndataloader.num_workers = 2\n",
        "[training]\nsteps = 7\n[training.dataloader]\nnum_workers = 2\n",
        "training = { steps = 7, dataloader = { num_workers = 2 } }\n",
        "training.steps = 7\ntraining.dataloader.num_workers = 2\n",
        '\N{BYTE ORDER MARK}["training"]\r\n"steps" = 7\r\n\'dataloader\'."num_workers" = 2\r\n',
    ],
)
def test_every_way_to_write_a_table(run_file, text):
    training = parse(["--job.config_file", run_file(text)])[0].training
    assert (training.steps, training.dataloader.num_workers) == (7, 2)


def test_all_errors_of_file_and_command_line_at_once(run_file):
    file = run_file("""\
[optimizer]
lrr = 1e-3
beta1 = 1.0

[trainnig]
steps = 3

[training]
img_size = 100
local_batch_size = 8
global_batch_size = 12
steps = "5"

[validation]
dataset = "coco-val"
""")
    expected = [
        (f"{file}:2: ", "key 'optimizer.lrr' is unknown - did you mean 'optimizer.lr'?"),
        (f"{file}:3: ", "optimizer.beta1=1.0 is out of range: it must be at least 0 and less than 1"),
        (f"{file}:5: ", "section [trainnig] is unknown - did you mean [training]?"),
        (f"{file}:9: ", "training.img_size=100 must be a multiple of 16: use 96 or 112"),
        (f"{file}:11: ", "training.global_batch_size=12 must be a multiple of training.local_batch_size=8"),
        (f"{file}:12: ", 'training.steps="5" must be a whole number such as 4: remove the quotes'),
        (f"{file}:15: ", 'validation.dataset="coco-val" is not a known choice - did you mean "coco-validation"? use '),
        ("command line: ", "key 'optimiser.lr' is unknown - did you mean 'optimizer.lr'?"),
        ("command line: ", '"stray" stands alone: write --section.key value'),
        ("command line: ", "metrics.log_freq needs a value: write --metrics.log_freq VALUE"),
    ]
    errors = errors_of(
        "--job.config_file", file, "--optimiser.lr", "3", "--training.test_mode=true", "stray", "--metrics.log_freq"
    )
    assert len(errors) == len(expected)
    for error, (place, text) in zip(errors, expected, strict=True):
        assert error.startswith(place + text)


def test_a_rule_between_keys_points_to_the_key_that_was_set_last(run_file):
    file = run_file("[training]\nglobal_batch_size = 12\nlocal_batch_size = 4\n")
    errors = errors_of("--job.config_file", file, "--training.local_batch_size", "5")
    assert len(errors) == 1
    assert errors[0].startswith("command line: training.global_batch_size=12 must be a multiple of")


def test_a_broken_key_is_not_judged_by_its_default(run_file):
    """local_batch_size falls back to 8, which 12 is no multiple of; the user did not say 8."""
    errors = errors_of("--training.local_batch_size", "four", "--training.global_batch_size", "12")
    assert len(errors) == 1
    assert "whole number" in errors[0]


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("training.lr", "'optimizer.lr'"),
        ("optimizer.warmup_steps", "'lr_scheduler.warmup_steps'"),
        ("img_size", "'training.img_size'"),
        ("training.num_workers", "'training.dataloader.num_workers'"),
        ("train.steps", "'training.steps'"),
    ],
)
def test_the_right_word_in_the_wrong_section(name, suggestion):
    (error,) = errors_of(f"--{name}", "1")
    assert suggestion in error


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("steps = 3\n", ":1: key 'steps' is unknown - did you mean"),
        ("training = 3\n", ":1: 'training' is a section, not a key"),
        ("[[training]]\nsteps = 3\n", ":1: 'training' is a section, not a key"),
        ("[training]\ndataloader = 2\n", ":2: 'training.dataloader' is a section, not a key"),
        ("[training]\n[training.steps]\nvalue = 3\n", ':2: training.steps={"value": 3} must be a whole number'),
        ("[training]\nsteps = 2026-01-01\n", ":2: training.steps=2026-01-01 must be a whole number"),
        ('"training.steps" = 3\n', ":1: key '\"training.steps\"' is unknown - did you mean 'training.steps'?"),
        ("[training.extra]\n", ":1: key 'training.extra' is unknown"),
        ("[zzz]\nsteps = 1\n", ":1: section [zzz] is unknown: the sections are activation_checkpoint, "),
        ("[training]\nsteps = = 3\n", ":2: not valid TOML: "),
        ("[training]\nsteps = 3\nsteps = 4\n", ":3: not valid TOML: "),
        ("[training]\nsteps = 1" + "0" * 5000, ": not valid TOML: "),
        ("[training]\nsteps = " + "[" * 20_000, ": not valid TOML: "),
        (b"[job]\ndescription = '\xff'\n", ": byte 21 is not UTF-8: save the file as UTF-8 text"),
    ],
)
def test_malformed_files(run_file, text, error):
    file = run_file(text)
    (found,) = errors_of("--job.config_file", file)
    assert found.startswith(f"{file}{error}")


def test_a_file_that_cannot_be_read_hides_no_other_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # messages shorten long values, and temporary folders may have long names
    for path, reason in (("missing.toml", "no such file"), (".", "is a directory")):
        errors = errors_of("--job.config_file", path, "--training.steps", "0", "--training.global_batch_size", "3")
        assert len(errors) == 2, "rules between keys need the file"
        assert f'job.config_file="{path}" cannot be read ({reason}' in errors[0]
        assert "train_configs/flux_tiny.toml" in errors[0]
        assert errors[1].startswith("command line: training.steps=0 is out of range")


@pytest.mark.parametrize("token", [HUB_TOKEN, WANDB_KEY, f"https://user:{HUB_TOKEN}@huggingface.co/x"])
def test_access_tokens_are_refused_and_never_shown(run_file, token, capsys):
    file = run_file(f"[training]\ndataset_path = '{token}'\n[{token.partition(':')[0]}]\nx = '{'y' * 60} {token}'\n")
    argv = [
        "--job.config_file",
        file,
        "--model.converters",
        f"a,{token}",
        f"--{token}",
        "1",
        f"--a.b={token}",
        f"{'y' * 50} {token}",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    output = capsys.readouterr()
    shown = str(caught.value) + output.out + output.err
    assert "training.dataset_path holds what looks like an access token" in shown
    assert "model.converters holds what looks like an access token" in shown
    assert HUB_TOKEN not in shown and WANDB_KEY not in shown
    # Nor a part of one that is still worth something.
    assert HUB_TOKEN[:20] not in shown and WANDB_KEY[:20] not in shown


def test_hashes_of_other_lengths_are_no_tokens():
    parse(["--job.description", "sha256 " + "0123456789abcdef" * 4, "--training.dataset_path", "hf_datasets/pictures"])


def test_text_that_is_not_unicode_is_refused():
    (error,) = errors_of("--job.dump_folder", "out\udcff")
    assert "is not Unicode text" in error
    error.encode()


def test_warnings_go_to_stderr(capsys):
    load_config(["--training.gc_debug", "--training.seq_len", "5"])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "warning: these keys have no effect yet: training.gc_debug",
        "warning: these keys are not used here: training.seq_len",
    ]


def test_the_folder_of_a_commit_is_no_token():
    path = f"--encoder.t5_encoder=/cache/snapshots/{'0a' * 20}/text_encoder_2"
    assert parse([path])[0].encoder.t5_encoder.startswith("/cache/snapshots/0a0a")
