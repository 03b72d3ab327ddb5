"""Rules about layouts: one row for each way to break one, and one beside it that is fine."""

from dataclasses import replace

import pytest

from config.keys import KEYS
from config.layout_checks import find_layout_faults, find_technique_faults
from config.parse import ConfigError, parse

REPLICATE = "--parallelism.data_parallel_replicate_degree"
SHARD = "--parallelism.data_parallel_shard_degree"
CP = "--parallelism.context_parallel_degree"
TP = "--parallelism.tensor_parallel_degree"
METHOD = "--parallelism.context_parallel_method"
FLOAT8 = "--quantize.linear.float8"

# Options, number of processes, the complete message.
FAULTS = [
    (
        f"--model.flavor=flux-schnell --optimizer.state_dtype=8bit {TP}=8",
        8,
        "parallelism.tensor_parallel_degree=8 cuts hidden_size=3072 of flux-schnell into parts that are no multiples "
        'of 256, the blocks of optimizer.state_dtype="8bit": use 1, 2, 3, 4, 6 or 12, or '
        'optimizer.state_dtype="bfloat16"',
    ),
    (
        f"--model.flavor=flux-schnell --optimizer.state_dtype=8bit {TP}=2 {SHARD}=4 {CP}=2",
        16,
        "parallelism.data_parallel_shard_degree=4 x parallelism.context_parallel_degree=2 beside "
        "parallelism.tensor_parallel_degree=2 cuts hidden_size=3072 of flux-schnell into parts that are no multiples "
        'of 256, the blocks of optimizer.state_dtype="8bit": use a product that is 1, 2, 3, 4, 6 or 12, or '
        'optimizer.state_dtype="bfloat16"',
    ),
    (
        f"{TP}=3",
        3,
        "parallelism.tensor_parallel_degree=3 must divide num_heads=8 of flux-tiny: use 1, 2, 4 or 8",
    ),
    (
        f"{TP}=16",
        None,
        "parallelism.tensor_parallel_degree=16 must divide num_heads=8 of flux-tiny: use 1, 2, 4 or 8",
    ),
    (
        f"{CP}=16",
        16,
        "parallelism.context_parallel_degree=16 must divide num_heads=8 of flux-tiny, since ulysses gives whole heads "
        'to processes: use 1, 2, 4 or 8, or parallelism.context_parallel_method="allgather"',
    ),
    (
        f"{CP}=8 {TP}=2",
        16,
        "parallelism.context_parallel_degree=8 must divide num_heads=8 of flux-tiny / "
        "parallelism.tensor_parallel_degree=2, since ulysses gives whole heads to processes: use 1, 2 or 4, or "
        'parallelism.context_parallel_method="allgather"',
    ),
    (
        f"{TP}=2 {SHARD}=3",
        6,
        "parallelism.data_parallel_shard_degree=3 x parallelism.context_parallel_degree=1 must divide hidden_size=256 "
        "of flux-tiny where parallelism.tensor_parallel_degree=2 splits weights too: use degrees whose product is "
        "1, 2, 4, 8, 16, 32, 64, 128 or 256",
    ),
    (
        f"{CP}=8 --training.img_size=32",
        8,
        "parallelism.context_parallel_degree=8 must divide the 4 image tokens of training.img_size=32: use 1, 2 or 4",
    ),
    (
        f"{CP}=2 --training.img_size=16",
        2,
        "parallelism.context_parallel_degree=2 must divide the 1 image token of training.img_size=16: use 1",
    ),
    (
        f"{CP}=8 --encoder.max_t5_encoding_len=20",
        8,
        "parallelism.context_parallel_degree=8 must divide encoder.max_t5_encoding_len=20: use 1, 2 or 4",
    ),
    (
        "--training.global_batch_size=20",
        1,
        "training.global_batch_size=20 must be a multiple of training.local_batch_size=8: use 16, 24, or -1 to update "
        "after every forward pass",
    ),
    (
        "--training.global_batch_size=4",
        None,
        "training.global_batch_size=4 must be a multiple of training.local_batch_size=8: use 8, or -1 to update after "
        "every forward pass",
    ),
    (
        f"--training.global_batch_size=40 {CP}=2 {REPLICATE}=2",
        8,
        "training.global_batch_size=40 must be a multiple of training.local_batch_size=8 x 4 groups of processes that "
        "see different samples = 32: use 32, 64, or -1 to update after every forward pass",
    ),
    (
        f"{REPLICATE}=-1",
        4,
        "parallelism.data_parallel_replicate_degree=-1 and parallelism.data_parallel_shard_degree=-1 cannot both take "
        "what is left: set one of them",
    ),
    (
        f"{REPLICATE}=3",
        8,
        "parallelism.data_parallel_replicate_degree=3 must divide the 8 processes of this run: use 1, 2, 4 or 8, or "
        "a number of processes that is a multiple of 3",
    ),
    (
        f"{CP}=2 {METHOD}=ring --compile.enable",
        None,
        'parallelism.context_parallel_method="ring" does not compile: set compile.enable=false, or use "ulysses" or '
        '"allgather"',
    ),
    (
        f"{CP}=2 {METHOD}=ring --encoder.mask_padding",
        2,
        'parallelism.context_parallel_method="ring" hides no tokens, which encoder.mask_padding=true asks for: use '
        '"ulysses" or "allgather"',
    ),
    (
        "--activation_checkpoint.cpu_offload --parallelism.tensor_parallel_degree=2",
        2,
        "activation_checkpoint.cpu_offload=true moves plain tensors, not the parts of tensors of "
        "parallelism.tensor_parallel_degree=2: leave one of them out",
    ),
    (
        "--activation_checkpoint.cpu_offload --activation_checkpoint.selective_ac_option=op",
        None,
        'activation_checkpoint.cpu_offload=true moves what autograd keeps, and selective_ac_option="op" keeps its '
        'products elsewhere: use activation_checkpoint.mode="full" or "none", selective_ac_option=2, or '
        "compile.enable=true",
    ),
    (
        "--activation_checkpoint.cpu_offload --model.converters=quantize.linear.float8",
        1,
        "activation_checkpoint.cpu_offload=true moves plain tensors, not the 8-bit tensors of "
        'model.converters=["quantize.linear.float8"]: leave one of them out',
    ),
    (
        "--activation_checkpoint.selective_ac_option=0",
        None,
        'activation_checkpoint.selective_ac_option="0" must be "op", or n for every n-th block: use "op", "1", "2" or '
        "a larger number",
    ),
    (
        "--activation_checkpoint.mode=memory_budget",
        None,
        'activation_checkpoint.mode="memory_budget" is the compiler\'s work: set compile.enable=true with "model" '
        'among compile.components, or use "selective"',
    ),
    (
        "--activation_checkpoint.mode=memory_budget --compile.enable --compile.components=loss",
        None,
        'activation_checkpoint.mode="memory_budget" is the compiler\'s work: set compile.enable=true with "model" '
        'among compile.components, or use "selective"',
    ),
    (
        "--model.converters=quantize.linear.float8,quantize.linear.mx",
        None,
        'model.converters=["quantize.linear.float8", "quantize.linear.mx"] would convert the same layers twice: '
        "choose one",
    ),
    (
        "--model.converters=quantize.linear.mx,quantize.linear.mx",
        None,
        'model.converters=["quantize.linear.mx", "quantize.linear.mx"] would convert the same layers twice: choose one',
    ),
    (
        f"--model.converters=quantize.linear.float8 {TP}=2",
        2,
        'model.converters=["quantize.linear.float8"] and parallelism.tensor_parallel_degree=2 both replace linear '
        "layers: leave one out",
    ),
    (
        "--model.converters=quantize.linear.float8 --training.local_batch_size=6 --training.img_size=32",
        1,
        "training.local_batch_size=6 x 4 image tokens must be a multiple of 16 for "
        'model.converters=["quantize.linear.float8"]: use training.local_batch_size=4 or 8',
    ),
    (
        f"--model.converters=quantize.linear.mx --data.buckets.enable --training.local_batch_size=1 {CP}=2",
        2,
        "training.local_batch_size=1 x 8 image tokens must be a multiple of 32 for "
        'model.converters=["quantize.linear.mx"]: use training.local_batch_size=4',
    ),
    (
        "--model.converters=quantize.linear.mx --data.buckets.enable --data.buckets.constant_tokens",
        1,
        "data.buckets.constant_tokens=true changes the number of samples, so data.buckets.step must give each of them "
        'a multiple of 32 image tokens on a process for model.converters=["quantize.linear.mx"], not 16: raise it, or '
        "set constant_tokens to false",
    ),
    (
        f"--model.converters=quantize.linear.mx {CP}=2 --training.local_batch_size=1 --encoder.max_t5_encoding_len=32",
        2,
        "training.local_batch_size=1 x 16 text tokens must be a multiple of 32 for "
        'model.converters=["quantize.linear.mx"]: use training.local_batch_size=2',
    ),
    (
        f"--model.converters=quantize.linear.float8 {FLOAT8}.recipe_name=rowwise "
        f"{FLOAT8}.enable_fsdp_float8_all_gather",
        None,
        "quantize.linear.float8.enable_fsdp_float8_all_gather=true needs "
        'quantize.linear.float8.recipe_name="tensorwise": a gathered weight has one scale',
    ),
    (
        f"--model.converters=quantize.linear.float8 {FLOAT8}.precompute_float8_dynamic_scale_for_fsdp",
        None,
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp=true is about the float8 all-gather: set "
        "quantize.linear.float8.enable_fsdp_float8_all_gather=true as well",
    ),
    (
        f"--model.converters=quantize.linear.float8 {FLOAT8}.enable_fsdp_float8_all_gather",
        1,
        "quantize.linear.float8.enable_fsdp_float8_all_gather=true needs weights that are split: leave it out, or use "
        "parallelism.data_parallel_shard_degree=2 or more",
    ),
]
FINE = [
    (f"--model.flavor=flux-schnell --optimizer.state_dtype=8bit {TP}=4 {SHARD}=6", 24),
    (f"--model.flavor=flux-schnell --optimizer.state_dtype=8bit {SHARD}=7", 7),
    (f"--model.flavor=flux-schnell --optimizer.state_dtype=bfloat16 {TP}=8", 8),
    (f"{TP}=8", 8),
    (f"{CP}=8", 8),
    (f"{CP}=16 {METHOD}=allgather", 16),
    (f"{CP}=4 {TP}=2", 8),
    (f"{TP}=2 {SHARD}=4", 8),
    (f"{SHARD}=3", 3),  # where tensor parallel is off, uneven shards are fine
    (f"{CP}=4 --training.img_size=32", 4),
    (f"{CP}=4 --encoder.max_t5_encoding_len=20", 4),
    ("--training.global_batch_size=24", 1),
    (f"--training.global_batch_size=64 {CP}=2 {REPLICATE}=2", 8),
    ("--training.global_batch_size=24", None),  # unless the run turns out to have more than 3 processes
    (f"{REPLICATE}=-1 {SHARD}=1", 4),
    (f"{REPLICATE}=3", 9),
    (f"{REPLICATE}=3", None),
    (f"{CP}=2 {METHOD}=ring", 2),
    (f"{METHOD}=ring --compile.enable --encoder.mask_padding", 1),  # nobody to pass anything on to
    (f"{CP}=2 {METHOD}=ring --compile.enable --compile.components=loss", 2),
    (f"{CP}=2 {METHOD}=allgather --compile.enable --encoder.mask_padding", 2),
    ("--activation_checkpoint.selective_ac_option=op", None),
    ("--activation_checkpoint.selective_ac_option=1", None),
    ("--activation_checkpoint.mode=memory_budget --compile.enable", None),
    ("--model.converters=quantize.linear.mx", None),
    ("--model.converters=quantize.linear.float8 --training.local_batch_size=4 --training.img_size=32", 1),
    ("--training.local_batch_size=6 --training.img_size=32", 1),
    (f"--model.converters=quantize.linear.float8 {SHARD}=2", 2),
    (
        f"--model.converters=quantize.linear.float8 {FLOAT8}.enable_fsdp_float8_all_gather "
        f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp",
        None,
    ),
    (f"--model.converters=quantize.linear.float8 {FLOAT8}.enable_fsdp_float8_all_gather", 2),
    (f"{FLOAT8}.recipe_name=rowwise {FLOAT8}.enable_fsdp_float8_all_gather", None),  # nothing is converted
]


@pytest.mark.parametrize(("line", "world_size", "message"), FAULTS)
def test_fault(line, world_size, message):
    with pytest.raises(ConfigError) as caught:
        parse(line.split(), world_size)
    assert f"command line: {message}" in str(caught.value).splitlines()


@pytest.mark.parametrize(("line", "world_size"), FINE)
def test_fine(line, world_size):
    assert parse(line.split(), world_size)[1] == []


def test_one_slip_gives_few_messages():
    """A second message about the same key may only be another rule that it breaks."""
    rules = {}
    for line, world_size, message in FAULTS:
        with pytest.raises(ConfigError) as caught:
            parse(line.split(), world_size)
        rules[message] = len(str(caught.value).splitlines())
    assert max(rules.values()) <= 2 and sum(count == 1 for count in rules.values()) >= len(rules) - 3, rules


@pytest.mark.parametrize("flavor", ["flux-dev", "flux-tiny"])
def test_findings_name_keys_that_are_there_in_one_line(flavor):
    config = parse([f"--model.flavor={flavor}"])[0]
    degrees = {"data_parallel_shard_degree": 5, "context_parallel_degree": 7, "tensor_parallel_degree": 5}
    broken = replace(
        config,
        parallelism=replace(config.parallelism, **degrees, context_parallel_method="ring"),
        encoder=replace(config.encoder, mask_padding=True),
    )
    found = [*find_layout_faults(broken, 3), *find_technique_faults(broken)]
    assert len(found) >= 5
    for names, message in found:
        assert set(names) <= KEYS.keys()
        assert "\n" not in message and any(name in message for name in names)


def test_the_number_of_processes_is_a_matter_of_the_run():
    """A file may fix a layout; it is checked against the processes only where their number is known."""
    options = [f"{SHARD}=2", f"{CP}=2"]
    assert parse(options)[0] == parse(options, 4)[0]
    with pytest.raises(ConfigError, match="must be the number of processes, which is 8"):
        parse(options, 8)


def test_a_layout_is_judged_where_it_was_written(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[parallelism]\ncontext_parallel_degree = 2\ntensor_parallel_degree = 3\n")
    with pytest.raises(ConfigError) as caught:
        parse(["--job.config_file", str(file)], 6)
    (error,) = str(caught.value).splitlines()
    assert error.startswith(f"{file}:3: parallelism.tensor_parallel_degree=3 must divide num_heads")
