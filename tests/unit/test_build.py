"""What a run runs on and leaves, as far as it can be told without one."""

import pytest
import torch
from safetensors.torch import load_file

import build
from build import build_run_layout, export_weights, measure_peaks
from config.parse import load_config
from parallel.degrees import Degrees
from parallel.mesh import Layout
from tests.distributed.ranks import run_ranks
from training.peaks import Peaks

TINY = "--job.config_file=train_configs/flux_tiny.toml"
TWO_RANKS = [TINY, "--parallelism.tensor_parallel_degree=2"]


def measure_on(rank: int, world_size: int) -> Peaks:
    build.measure_matmul = lambda device, dtype: rank + 1.5  # in a process of its own
    return measure_peaks(build_run_layout(load_config(TWO_RANKS, world_size, quiet=True), world_size), torch.float32)


def test_what_all_processes_can_compute_is_added_up():
    assert run_ranks(measure_on, 2) == [Peaks(matmul=4.0, datasheet=None)] * 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_weight_too_large_for_the_exports_format_is_told(tmp_path, dtype):
    config = load_config([TINY, f"--checkpoint.export_dtype={dtype}"], quiet=True)
    layout = Layout(Degrees(), torch.device("cpu"))
    path = tmp_path / "x.safetensors"
    if dtype == "float16":
        with pytest.raises(ValueError, match=r"img_in\.weight reaches 7e\+04, too large for float16"):
            export_weights(config, layout, path, 1, {"img_in.weight": torch.tensor([1.0, 7e4])})
        assert not path.exists()
    export_weights(config, layout, path, 1, {"img_in.weight": torch.tensor([1.0, -6e4])})
    assert load_file(path)["img_in.weight"].dtype == getattr(torch, dtype)
