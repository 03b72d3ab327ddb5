"""Context parallelism: the ranks of a mesh axis share the tokens of one sample, and only attention notices.

Each of the p ranks holds `[its text tokens, its image tokens]`, 1/p of each, with their own positions. Attention is
full and knows positions through the rotated queries and keys alone, so tokens may follow each other in any order, as
long as keys, values and mask keep the same one.

| method    | what a layer does                                   | receives, forward | limit                   |
|---|---|---|---|
| ulysses   | exchanges tokens for heads and back                 | 4 (p - 1) / p     | p divides the heads     |
| allgather | fetches all keys and values, keeps its queries      | 2 (p - 1)         | none                    |
| ring      | sees keys and values pass by, one rank's at a time  | 2 (p - 1)         | no mask                 |

Received per rank, in units of its share of the queries. Ring is the one that never holds the keys and values of all.
Buffers have tokens as their first dim, so that what ranks send follows each other without another copy.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from parallel.group import Group, make_group, wait
from parallel.names import find_modules

_EFFICIENT_ALIGNMENT = 32  # CUDA's memory-efficient attention pads its log-sum-exp to a multiple of it


def apply_context_parallel(model: nn.Module, attention: str, group: DeviceMesh, method: str) -> None:
    """Puts the method's attention in the place of every module whose name matches the pattern `attention`, in place.

    Args:
        model: its attention modules have no parameters and are called (q_BSNK, k_BSNK, v_BSNK, mask_BS).
        attention: pattern of module names (parallel/names.py).
        group: one-dimensional mesh of the ranks that share a sample.
        method: ulysses, allgather or ring. The first two keep the module that was there and call it with more tokens.
    """
    builder = {"ulysses": UlyssesAttention, "allgather": AllGatherAttention, "ring": RingAttention}[method]
    for name, inner in find_modules(model, [attention]).items():
        assert not list(inner.parameters()), f"{name} has parameters, whose names would change"
        model.set_submodule(name, builder(inner, make_group(group)))


def shard_sequence(
    tensors: Mapping[str, Tensor | None], names: Collection[str], mesh: DeviceMesh | None
) -> dict[str, Any]:
    """This rank's chunk along dim 1 of the named tensors; the others, and None, as they are.

    Args:
        tensors: by name; not all of `names` need be there.
        names: of what has tokens along dim 1.
        mesh: the ranks that share a sample; None: this one alone, and nothing changes.

    Raises:
        ValueError: a length is no multiple of the number of ranks.
    """
    if mesh is None:
        return dict(tensors)
    group = make_group(mesh)
    return {name: _chunk(name, x, group) if name in names and x is not None else x for name, x in tensors.items()}


def gather_sequence(x: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """All ranks' chunks along dim 1, put together again: undoes `shard_sequence` on every rank."""
    return x if mesh is None else make_group(mesh).gather(x.transpose(0, 1)).transpose(0, 1)


class UlyssesAttention(nn.Module):
    """Exchanges tokens for heads: each rank attends with all tokens and 1/p of the heads (arXiv 2309.14509)."""

    def __init__(self, inner: nn.Module, group: Group):
        super().__init__()
        self.inner, self.group = inner, group

    def forward(self, q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        ranks, tokens, heads = self.group.size, q_BSNK.shape[1], q_BSNK.shape[2]
        assert heads % ranks == 0, f"{heads} heads cannot be shared by {ranks} ranks"
        by_rank = [x_BSNK.unflatten(2, (ranks, -1)).permute(2, 1, 0, 3, 4) for x_BSNK in (q_BSNK, k_BSNK, v_BSNK)]
        qkv_S3BNK = self.group.exchange(torch.stack(by_rank, dim=2).flatten(0, 1))
        q_BSNK, k_BSNK, v_BSNK = (x_SBNK.transpose(0, 1) for x_SBNK in qkv_S3BNK.unbind(1))
        attn_BSNK = self.inner(q_BSNK, k_BSNK, v_BSNK, _gather_mask(mask_BS, self.group))

        attn_SBNK = self.group.exchange(attn_BSNK.transpose(0, 1))  # now S: all heads' tokens of this rank
        return attn_SBNK.unflatten(0, (ranks, tokens)).permute(2, 1, 0, 3, 4).flatten(2, 3)


class AllGatherAttention(nn.Module):
    """Fetches the keys and values of all ranks; each rank attends with its own queries."""

    def __init__(self, inner: nn.Module, group: Group):
        super().__init__()
        self.inner, self.group = inner, group

    def forward(self, q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        kv_S2BNK = self.group.gather(torch.stack((k_BSNK.transpose(0, 1), v_BSNK.transpose(0, 1)), dim=1))
        k_BSNK, v_BSNK = (x_SBNK.transpose(0, 1) for x_SBNK in kv_S2BNK.unbind(1))
        return self.inner(q_BSNK, k_BSNK, v_BSNK, _gather_mask(mask_BS, self.group))


class RingAttention(nn.Module):
    """Keys and values go from rank to rank, and what each of them adds is merged (arXiv 2310.01889).

    The module that was there is not called: merging needs the log-sum-exp of the logits, which it does not return.
    Runs on CPU and on CUDA. The CUDA kernels are tested, on one device, wherever the tests find one.
    """

    def __init__(self, inner: nn.Module, group: Group):
        super().__init__()
        self.group = group

    def forward(self, q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        assert mask_BS is None, "ring attention has no mask"
        return _Ring.apply(q_BSNK, k_BSNK, v_BSNK, self.group)


class _Ring(torch.autograd.Function):
    """While a block of keys and values is attended to, the next one is already on its way."""

    @staticmethod
    def forward(ctx: Any, q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, group: Group) -> Tensor:
        kv = torch.stack((k_BSNK, v_BSNK))
        attn_BSNK, lse_BNS = attend_nothing(q_BSNK)
        for step in range(group.size):
            arriving = group.start_passing_on(kv) if step < group.size - 1 else kv
            attn_BSNK, lse_BNS = merge(attn_BSNK, lse_BNS, *attend_block(q_BSNK, kv[0], kv[1]))
            kv = wait(arriving)
        attn_BSNK = attn_BSNK.to(q_BSNK.dtype)
        ctx.save_for_backward(q_BSNK, k_BSNK, v_BSNK, attn_BSNK, lse_BNS)
        ctx.group = group
        return attn_BSNK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSNK: Tensor) -> tuple[Tensor | None, ...]:
        """A block's gradient travels with it, one step behind, and is home after p steps."""
        q_BSNK, k_BSNK, v_BSNK, attn_BSNK, lse_BNS = ctx.saved_tensors
        group, grad_BSNK = ctx.group, grad_BSNK.contiguous()
        kv = torch.stack((k_BSNK, v_BSNK))
        dq_BSNK, dkv = (torch.zeros_like(x, dtype=lse_BNS.dtype) for x in (q_BSNK, kv))
        for step in range(group.size):
            arriving = group.start_passing_on(kv) if step < group.size - 1 else kv
            dq, dk, dv = attend_block_backward(grad_BSNK, q_BSNK, kv[0], kv[1], attn_BSNK, lse_BNS)
            dq_BSNK += dq
            dkv = wait(dkv)
            dkv[0] += dk
            dkv[1] += dv
            dkv = group.start_passing_on(dkv)
            kv = wait(arriving)
        dk_BSNK, dv_BSNK = wait(dkv).to(k_BSNK.dtype).unbind()
        return dq_BSNK.to(q_BSNK.dtype), dk_BSNK, dv_BSNK, None


def attend_block(q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys: attn_BSNK, and lse_BNS, the log of the sum of exponentials of the logits."""
    qkv_BNSK = [x_BSNK.transpose(1, 2) for x_BSNK in (q_BSNK, k_BSNK, v_BSNK)]
    if q_BSNK.device.type == "cpu":
        attn_BNSK, lse_BNS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv_BNSK)
    else:
        attn_BNSK, lse_BNS, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*qkv_BNSK, None, True)
    return attn_BNSK.transpose(1, 2), lse_BNS[..., : q_BSNK.shape[1]]


def attend_block_backward(
    grad_BSNK: Tensor, q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, attn_BSNK: Tensor, lse_BNS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What some of the keys add to dq_BSNK, and their own dk_BSNK and dv_BSNK.

    `attn_BSNK` and `lse_BNS` are those of ALL keys: with them the kernel finds each key's true share of the softmax.
    """
    grad, q, k, v, attn = (x.transpose(1, 2) for x in (grad_BSNK, q_BSNK, k_BSNK, v_BSNK, attn_BSNK))
    if q_BSNK.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, attn, lse_BNS, 0.0, False
        )
    else:
        lse = F.pad(lse_BNS, (0, -lse_BNS.shape[-1] % _EFFICIENT_ALIGNMENT), value=torch.inf)
        no_dropout = torch.zeros((), dtype=torch.int64, device=q_BSNK.device)  # its seed and offset
        grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, attn, lse, no_dropout, no_dropout, 0.0, [True, True, True, False]
        )
    dq, dk, dv = (x_BNSK.transpose(1, 2) for x_BNSK in grads[:3])
    return dq, dk, dv


def attend_nothing(q_BSNK: Tensor) -> tuple[Tensor, Tensor]:
    """attn_BSNK and lse_BNS of no keys at all, in the precision in which blocks are merged: at least fp32."""
    batch, tokens, heads, _ = q_BSNK.shape
    dtype = torch.promote_types(q_BSNK.dtype, torch.float32)
    lse_BNS = torch.full((batch, heads, tokens), -torch.inf, dtype=dtype, device=q_BSNK.device)
    return torch.zeros_like(q_BSNK, dtype=dtype), lse_BNS


def merge(attn_BSNK: Tensor, lse_BNS: Tensor, more_BSNK: Tensor, more_lse_BNS: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from attention to each, in the precision of the first."""
    share_BSN1 = torch.sigmoid(more_lse_BNS - lse_BNS).transpose(1, 2)[..., None]  # the second's, of the softmax
    return torch.lerp(attn_BSNK, more_BSNK.to(attn_BSNK.dtype), share_BSN1), torch.logaddexp(lse_BNS, more_lse_BNS)


def _chunk(name: str, x: Tensor, group: Group) -> Tensor:
    if x.shape[1] % group.size:
        raise ValueError(
            f"parallelism.context_parallel_degree={group.size} must divide the {x.shape[1]} tokens of {name}: "
            "use a degree, picture size and text length that fit"
        )
    return x.chunk(group.size, dim=1)[group.rank]


def _gather_mask(mask_BS: Tensor | None, group: Group) -> Tensor | None:
    return None if mask_BS is None else group.gather(mask_BS.transpose(0, 1)).transpose(0, 1)
