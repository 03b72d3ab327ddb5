"""Validation and drawing leave a sharded model as it was: parts, layout, nothing gathered, the next checkpoint."""

from itertools import chain

import pytest

from tests.distributed.layouts import build_trainer
from tests.distributed.legs import BF16, read_tensors
from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import BATCH, REPLICATE

pytestmark = pytest.mark.slow
VALIDATE = (
    "--validation.enable",
    "--validation.steps=2",
    "--validation.local_batch_size=4",
    "--validation.freq=1",
    "--validation.eval_freq=1",
    "--validation.save_img_count=3",
    "--validation.denoising_steps=2",
)
SAVE = ("--ema.enable", "--ema.decay=0.5", "--checkpoint.enable")
ROWS = {"fsdp 2": (2, BATCH(4)), "hsdp 2x2": (4, BATCH(2), REPLICATE(2), *BF16)}


def describe_parts(tensors) -> dict[str, tuple]:
    """Of every tensor: what it is, how it is spread, and the bits that this rank holds."""
    from torch.distributed.tensor import DTensor

    parts = {}
    for name, tensor in tensors.items():
        is_spread = isinstance(tensor, DTensor)
        local = tensor.to_local() if is_spread else tensor
        layout = (tensor.placements, tensor.device_mesh) if is_spread else None
        bits = (local.dtype, tuple(local.shape), local.detach().clone().numpy().tobytes())
        parts[name] = (type(tensor), tensor.requires_grad, tensor.shape, layout, bits)
    return parts


def find_gathered(*models) -> list[str]:
    """The parameters of which more than this rank's part is in memory."""
    from torch.distributed.fsdp import FSDPModule

    found = []
    for module in chain.from_iterable(model.modules() for model in models):
        for group in module._get_fsdp_state()._fsdp_param_groups if isinstance(module, FSDPModule) else ():
            under_way = group._all_gather_result is not None
            for one in group.fsdp_params:
                copies = [*one.all_gather_outputs, *one._unsharded_inner_tensors]
                assert copies, "it has been gathered before"
                if under_way or one.sharded_state.name != "SHARDED" or any(map(stored_bytes, copies)):
                    found.append(one._param_fqn)
    return found


def stored_bytes(tensor) -> int:
    return tensor.untyped_storage().size()


def train(rank: int, world_size: int, folder: str, overrides: tuple[str, ...]) -> list[str]:
    """Two updates, what is configured between them, and a checkpoint. What has changed by that on this rank."""
    trainer = build_trainer(rank, world_size, folder, overrides)
    batches, changed = iter(trainer.loader), []
    trainer.train_step(batches)
    if trainer.evaluator is not None:
        held = dict(trainer.model.named_parameters()), trainer.ema
        before = [describe_parts(tensors) for tensors in held]
        trainer.evaluator.evaluate(trainer.step, samples=0)
        held_now = dict(trainer.model.named_parameters()), trainer.ema
        for was, tensors, old in zip(before, held_now, held, strict=True):
            now = describe_parts(tensors)
            assert was.keys() == now.keys()
            changed += [name for name in now if now[name] != was[name] or tensors[name] is not old[name]]
        changed += find_gathered(trainer.model, trainer.encoders.conditioner.t5)
    trainer.train_step(batches)
    trainer.save()
    trainer.checkpointer.finish()
    trainer.checkpointer.close()
    return changed


@pytest.mark.parametrize("name", ROWS)
def test_a_sharded_model_is_left_as_it_was(name, tmp_path):
    processes, *options = ROWS[name]
    for run, extra in (("with", VALIDATE), ("without", ())):
        (tmp_path / run).mkdir()
        found = run_ranks(train, processes, str(tmp_path / run), (*options, *SAVE, *extra))
        assert found == [[]] * processes
    assert len(list((tmp_path / "with" / "img").iterdir())) == 2
    ours, theirs = (read_tensors(tmp_path / run / "checkpoint" / "step-2") for run in ("with", "without"))
    assert ours.keys() == theirs.keys()
    kinds = {kind: sum(name.startswith(kind) for name in ours) for kind in ("ema.", "optimizer.state.", "")}
    assert kinds["ema."] and kinds["optimizer.state."] and len(ours) == kinds[""]
    assert [name for name in ours if ours[name].numpy().tobytes() != theirs[name].numpy().tobytes()] == []


def train_without_reshard(rank: int, world_size: int, folder: str, overrides: tuple[str, ...]) -> list[str]:
    import evaluate

    evaluate.reshard = lambda model: None
    return train(rank, world_size, folder, overrides)


def train_with_a_nudge(rank: int, world_size: int, folder: str, overrides: tuple[str, ...]) -> list[str]:
    from evaluate import Evaluator

    validate = Evaluator.validate

    def nudge(self, *arguments):
        figures = validate(self, *arguments)
        bias = dict(self.model.named_parameters())["final_layer.linear.bias"].to_local()
        bias.data[:1] *= 1 + 2**-23  # the last bit
        return figures

    Evaluator.validate = nudge
    return train(rank, world_size, folder, overrides)


# A gathered parameter is another tensor than before, and one that takes memory.
@pytest.mark.parametrize(("fault", "times"), [(train_without_reshard, 2), (train_with_a_nudge, 1)])
def test_control_what_is_left_behind_is_seen(fault, times, tmp_path):
    options = (BATCH(4), *VALIDATE, "--validation.eval_freq=0", "--checkpoint.enable")
    found = run_ranks(fault, 2, str(tmp_path), options)
    assert [names.count("final_layer.linear.bias") for names in found] == [times, times]
