"""One small all-reduce along every axis of the mesh, before anything is built on them."""

import json
import threading
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel.mesh import Layout

SECONDS = 60.0  # for one of them: the first on a GPU sets up the connections
SPARE_SECONDS = 5.0  # for the answers of ranks that have waited as long as this one
WEIGHT_AXES, SAMPLE_AXES = ("dp_replicate", "fsdp", "tp"), ("dp", "cp")
ALL = "all"
OK, LATE = "ok", "did not end in time"


def list_groups(layout: Layout) -> dict[str, ProcessGroup]:
    """This rank's group along each axis that has several ranks, and the one of all."""
    if layout.degrees.world == 1:
        return {}
    assert layout.weights is not None and layout.samples is not None
    axes = {name: layout.weights[name] for name in WEIGHT_AXES} | {name: layout.samples[name] for name in SAMPLE_AXES}
    groups = {name: axis.get_group() for name, axis in axes.items() if axis.size() > 1}
    assert dist.group.WORLD is not None
    return {**groups, ALL: dist.group.WORLD}


def check_axes(layout: Layout, machines: Sequence[str], seconds: float = SECONDS) -> None:
    """Sums a number along every axis, and compares. All ranks must call it.

    Args:
        machines: the host of every rank; needed on rank 0 only.
        seconds: longest time for one axis.

    Raises:
        RuntimeError: on all ranks that can still be reached, with the axis, its ranks and their hosts. A machine or its
            network is at fault, and another one may do.
    """
    fault = None
    for axis, group in list_groups(layout).items():
        outcome, is_over = _try(layout, group, seconds)
        if outcome != OK and fault is None:
            fault = [axis, dist.get_process_group_ranks(group), outcome]
        if not is_over:
            break  # nor would the others end: this rank has not left the first
    answers = layout.gather_texts("axes/answers", json.dumps(fault) if fault else OK, seconds + SPARE_SECONDS)
    if complaint := layout.from_rank_0("axes/complaint", lambda: _explain(answers, machines)):
        raise RuntimeError(complaint)


def _try(layout: Layout, group: ProcessGroup, seconds: float) -> tuple[str, bool]:
    """What came out of one all-reduce, and whether the connection can be used further."""
    ranks = dist.get_process_group_ranks(group)
    wanted = float(sum(rank + 1 for rank in ranks))
    outcomes: list[tuple[str, bool]] = []

    def reduce() -> None:
        try:
            value = torch.tensor(layout.rank + 1.0, dtype=torch.float64, device=layout.device)
            dist.all_reduce(value, group=group)
            found = value.item()
        except Exception as error:  # whatever a backend raises
            outcomes.append((f"failed ({' '.join(str(error).split())[:200]})", False))
        else:
            outcomes.append((OK if found == wanted else f"gave {found:g} instead of {wanted:g}", True))

    # In a thread of its own: setting up connections takes no time limit, and one that is set on a group of GPUs ends
    # the process without a word about the axis.
    thread = threading.Thread(target=reduce, name="all-reduce", daemon=True)
    thread.start()
    thread.join(seconds)
    return outcomes[0] if outcomes else (LATE, False)


def _explain(answers: Sequence[str], machines: Sequence[str]) -> str:
    """The first axis at fault, in the order in which they are tried: the later ones fail because of it."""
    faults = [json.loads(answer) for answer in answers if answer not in (OK, "")]
    silent = [rank for rank, answer in enumerate(answers) if not answer]
    if not faults and not silent:
        return ""
    missing = f"{_name(silent, machines)} did not answer" if silent else ""
    if not faults:
        return f"the all-reduces along the axes did not end: {missing}: look at that machine, or leave it out"
    order = [*WEIGHT_AXES, *SAMPLE_AXES, ALL]
    # Of one axis, what a rank has seen says more than that others have waited for it.
    axis, ranks, outcome = min(faults, key=lambda fault: (order.index(fault[0]), fault[2] == LATE, fault[1]))
    what = "of all ranks" if axis == ALL else f"along {axis}"
    return (
        f"an all-reduce {what}, {_name(ranks, machines)}, {outcome}{f', and {missing}' if missing else ''}: look at "
        "the GPUs of these machines and the network between them, or leave them out"
    )


def _name(ranks: Sequence[int], machines: Sequence[str]) -> str:
    """Such as `ranks 0, 1 on node-a, ranks 2, 3 on node-b`; long lists are cut in the middle."""
    hosts = list(dict.fromkeys(machines[rank] for rank in ranks))
    texts = []
    for host in hosts if len(hosts) <= 8 else [*hosts[:7], hosts[-1]]:
        there = [str(rank) for rank in ranks if machines[rank] == host]
        texts.append(f"rank{'s' if len(there) > 1 else ''} {', '.join(there)} on {host}")
    if len(hosts) > 8:
        texts.insert(-1, f"{len(hosts) - 8} more machines")
    return ", ".join(texts)
