"""Faults that have happened in trainers of this kind, to show that the comparison of layouts sees them.

Each function breaks one thing in the process that calls it.
"""

import os
from dataclasses import replace

import build
import flux.data.dataset
import flux.model
import parallel.context_parallel
import parallel.modulation_parallel
import parallel.parallelize
from flux.rng import keyed_generator


def noise_by_rank() -> None:
    """Every rank draws from a seed of its own."""
    rank = int(os.environ["RANK"])
    flux.data.dataset.keyed_generator = lambda seed, stream, place: keyed_generator(seed + rank, stream, place)


def times_by_rank() -> None:
    """Only the times differ, also between ranks that share a sample."""
    rank = int(os.environ["RANK"])
    flux.data.dataset.keyed_generator = lambda seed, stream, place: keyed_generator(
        seed + rank * stream.endswith("timestep"), stream, place
    )


def causal_attention() -> None:
    """A wrapper whose default is the language model's."""
    plain = flux.model.F.scaled_dot_product_attention

    class Functional:
        def __getattr__(self, name):
            return getattr(__import__("torch").nn.functional, name)

        @staticmethod
        def scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=False):
            return plain(q, k, v, attn_mask=attn_mask, is_causal=True)

    flux.model.F = Functional()


def gradients_stay_on_their_rank() -> None:
    """Data parallel is only applied to shards, so that replicas train by themselves."""
    parallel.parallelize.apply_fsdp = lambda *arguments: None


def keys_of_this_rank_only() -> None:
    """Tokens meet only those of their own rank."""
    parallel.context_parallel.AllGatherAttention.forward = lambda self, *tensors: self.inner(*tensors)


def rows_split_in_one_piece() -> None:
    """Tensor parallel takes packed queries, keys and values for one matrix."""
    plain = build.make_plan
    build.make_plan = lambda config: replace(plain(config), column=dict.fromkeys(plain(config).column, 1))


def gradients_are_means() -> None:
    """FSDP's own division by the number of ranks, on top of a loss that is divided already."""
    from torch.distributed.fsdp import FSDPModule

    FSDPModule.set_gradient_divide_factor = lambda self, factor: None
    FSDPModule.set_force_sum_reduction_for_comms = lambda self, enable: None


def modulation_stays_in_its_copy() -> None:
    """Gradients of weights that are not gathered are forgotten where copies add theirs up."""
    parallel.modulation_parallel.Group.sum = lambda group, gradient: gradient


def modulation_gradients_are_means() -> None:
    """They are divided by the number of ranks, which FSDP does by itself."""
    join = parallel.modulation_parallel._Join
    plain = join.backward

    def divided(ctx, gradient):
        return plain(ctx, gradient / (ctx.owner.copies.size * ctx.owner.shards.size))

    join.backward = staticmethod(divided)


def modulation_of_other_samples() -> None:
    """Outputs are put together in the order of another rank's samples."""
    exchange = parallel.modulation_parallel.Group.exchange
    parallel.modulation_parallel.Group.exchange = lambda group, x: exchange(group, x).flip(0)
