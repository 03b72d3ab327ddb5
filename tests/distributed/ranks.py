"""Runs a function on several processes of this machine: torchrun's world, started ten times faster.

Ranks are forked from a server that has imported torch and run nothing; forking from a process that has computed already
can lock up in its thread pools.
"""

import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, device: str = "cpu"
) -> list[Any]:
    """What `function(rank, world_size, *args)` returns on every rank, in the order of ranks.

    Args:
        function: of a module, so that another process can import it; torch.distributed is initialized when it runs.
        timeout: seconds; a run that hangs fails.
        device: "cpu" with gloo, or "cuda" with NCCL and a GPU for each rank.

    Raises:
        RuntimeError: a rank failed or did not answer; the text holds the first traceback.
    """
    results = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            CONTEXT.Process(
                target=_run, args=(function, rank, world_size, f"{folder}/store", results, timeout, device, args)
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(results, world_size, timeout)
        finally:
            for process in ranks:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(results: Any, world_size: int, timeout: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < world_size:
        try:
            rank, value, failure = results.get(timeout=timeout)
        except queue.Empty:
            missing = sorted(set(range(world_size)) - set(answers))
            raise RuntimeError(f"ranks {missing} of {world_size} did not answer in {timeout} s") from None
        if failure:
            raise RuntimeError(f"rank {rank} of {world_size} failed:\n{failure}")
        answers[rank] = value
    return [answers[rank] for rank in range(world_size)]


def _run(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    results: Any,
    timeout: float,
    device: str,
    args: tuple,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        dist.init_process_group(
            "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        value = function(rank, world_size, *args)
        if dist.is_initialized():
            dist.barrier()  # a rank that has left already breaks the connections that others still make
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    else:
        results.put((rank, value, None))
