"""A T5 that is split over ranks gives the same features as a whole one, and no rank holds more than its share."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from flux.conditioner import Sharding, build_conditioner
from flux.config import Encoder
from flux.data.tokenizers import build_tokenizer
from flux.spec import SPECS
from parallel.data_parallel import apply_frozen_fsdp
from parallel.shards import copy_full_, full_tensor, local_bytes
from tests.distributed.ranks import run_ranks

TINY = SPECS["flux-tiny"].transformer
SECTION = Encoder(dtype="float32", max_t5_encoding_len=24)
PROMPTS = ["a small red circle in the top left", "a blue square", ""]
RANKS = 2
SAME = 1e-6  # gathered weights are the same bits and the products the same: only the order of sums may differ
DIFFERENT = 1e-2  # features have unit size


@dataclass(frozen=True)
class Share:
    """What a rank has."""

    txt_BLE: np.ndarray
    pooled_BV: np.ndarray
    t5_bytes: int  # held, the embedding counted once
    t5_parameters: int
    clip_bytes: int
    clip_parameters: int
    whole_weights: bool  # the parts of all ranks are the weights of the whole model
    freed: bool  # after the forward pass the rank holds its own part again
    offloaded: set[bool]  # what FSDP says of each parameter
    ahead: list[int]  # blocks that are gathered while one runs


def encode(conditioner, test_mode: bool, seed: int = 0):
    tokens = build_tokenizer(SECTION, test_mode)(PROMPTS)
    torch.manual_seed(seed)
    return conditioner.encode(tokens)


def split_encode(
    rank: int,
    world_size: int,
    test_mode: bool,
    copies: int,
    dtype: str,
    is_forgetful: bool = False,
    cpu_offload: bool = False,
) -> Share:
    mesh = init_device_mesh("cpu", (copies, world_size // copies), mesh_dim_names=("dp_replicate", "replica"))

    def forget(parameter: torch.Tensor, full: torch.Tensor) -> None:
        copy_full_(parameter, full if rank == 0 else torch.zeros_like(full))

    section = replace(SECTION, dtype=dtype, cpu_offload=cpu_offload)
    split = partial(apply_frozen_fsdp, mesh=mesh, cpu_offload=cpu_offload)
    sharding = Sharding(split, forget if is_forgetful else copy_full_)
    whole = build_conditioner(section, TINY, test_mode, "cpu")
    split = build_conditioner(section, TINY, test_mode, "cpu", sharding)
    same = all(
        name == other and torch.equal(full_tensor(parameter), wanted)
        for (name, parameter), (other, wanted) in zip(
            split.t5.named_parameters(), whole.t5.named_parameters(), strict=True
        )
    )
    before = held(split.t5)
    cond = encode(split, test_mode)
    encode(split, test_mode)  # a second time, from freed weights
    assert not any(parameter.requires_grad for parameter in split.t5.parameters()) and not split.t5.training
    states = [module._get_fsdp_state() for module in (*split.t5.encoder.block, split.t5)]
    return Share(
        txt_BLE=cond.txt_BLE.float().numpy(),
        pooled_BV=cond.pooled_BV.float().numpy(),
        t5_bytes=held(split.t5),
        t5_parameters=sum(parameter.numel() for parameter in split.t5.parameters()),
        clip_bytes=held(split.clip),
        clip_parameters=sum(parameter.numel() for parameter in split.clip.parameters()),
        whole_weights=same,
        freed=held(split.t5) == before,
        offloaded={one.offload_to_cpu for state in states for one in state._fsdp_param_group.fsdp_params},
        ahead=[len(state._states_to_forward_prefetch) for state in states],
    )


def held(model: nn.Module) -> int:
    """Bytes of this rank, also of what only a second name leads to."""
    return sum(local_bytes(parameter) for parameter in set(model.parameters()))


@pytest.mark.parametrize("test_mode", [False, True], ids=["files", "test mode"])
def test_a_split_t5_gives_the_same_features(test_mode):
    cond = encode(build_conditioner(SECTION, TINY, test_mode, "cpu"), test_mode)
    for share in run_ranks(split_encode, RANKS, test_mode, 1, "float32"):
        assert np.abs(share.txt_BLE - cond.txt_BLE.numpy()).max() <= SAME
        assert np.abs(share.pooled_BV - cond.pooled_BV.numpy()).max() <= SAME
        assert share.whole_weights and share.freed
        # Rows divide evenly here, but for the few of the position bias.
        assert share.t5_bytes == pytest.approx(4 * share.t5_parameters / RANKS, rel=1e-3)
        assert share.clip_bytes == 4 * share.clip_parameters, "CLIP is small and whole everywhere"
        assert share.offloaded == {False}
        *blocks, last, root = share.ahead
        assert set(blocks) <= {1} and last == root == 0


def test_a_rank_that_keeps_nothing_is_seen():
    cond = encode(build_conditioner(SECTION, TINY, False, "cpu"), False)
    for share in run_ranks(split_encode, RANKS, False, 1, "float32", True):
        assert np.abs(share.txt_BLE - cond.txt_BLE.numpy()).max() > DIFFERENT
        assert not share.whole_weights


def test_each_copy_of_the_model_has_a_whole_t5():
    """Two copies of the weights on two ranks: nothing is split, nothing differs, in the encoders' dtype."""
    section = replace(SECTION, dtype="bfloat16")
    cond = encode(build_conditioner(section, TINY, False, "cpu"), False)
    for share in run_ranks(split_encode, RANKS, False, RANKS, "bfloat16"):
        assert np.array_equal(share.txt_BLE, cond.txt_BLE.float().numpy())
        assert share.t5_bytes == 2 * share.t5_parameters and share.whole_weights


@pytest.mark.parametrize("test_mode", [False, True], ids=["files", "test mode"])
@pytest.mark.parametrize("ranks", [1, RANKS])
def test_weights_in_the_cpus_memory_give_the_same_bits(ranks, test_mode):
    plain = run_ranks(split_encode, ranks, test_mode, 1, "float32")
    offloaded = run_ranks(split_encode, ranks, test_mode, 1, "float32", False, True)
    for share, other in zip(offloaded, plain, strict=True):
        assert np.array_equal(share.txt_BLE, other.txt_BLE) and share.t5_bytes == other.t5_bytes
        assert share.offloaded == {True} and share.whole_weights and share.freed
