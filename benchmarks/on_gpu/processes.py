# SPDX-License-Identifier: Apache-2.0
"""Ranks on one machine that share one device, and what they measure."""

import multiprocessing.connection
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from on_gpu.record import RAISED, Record, failure, worst
from torch import distributed as dist


# A case of a rank: its title, and what measures it.
Case = tuple[str, Callable[[], dict[str, Any]]]
Cases = Callable[[torch.device, Any], Iterator[Case]]

# Ranks that wait for one that failed give up after this time.
_TIMEOUT = timedelta(seconds=20)


def run_ranks(record: Record, world: int, backend: str, cases: Cases, sizes: Any, seconds: float) -> dict[str, Any]:
    """Note what all ranks measured in each case, as soon as the last has: the largest of their numbers.

    Args:
        record: Where to note it.
        world: The number of ranks.
        backend: "gloo" or "nccl".
        cases: Yields the cases in each rank; a function of a module, of the device and the sizes.
        sizes: What is given to it.
        seconds: The time after which the ranks are stopped.

    Returns:
        The exit codes, and the cases that not all ranks finished.
    """
    until = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    heard: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        ranks, pipes = [], []
        for rank in range(world):
            pipe, end = context.Pipe(duplex=False)
            arguments = (rank, world, backend, f"{folder}/ranks", record.device, cases, sizes, end)
            ranks.append(context.Process(target=_rank, args=arguments, daemon=True))
            ranks[-1].start()
            end.close()
            pipes.append(pipe)
        for title, result in _heard(pipes, until):
            heard[title].append(result)
            if len(heard[title]) == world:
                record.note(title, _joined(heard[title]), quiet=True)
        for each in ranks:
            each.join(max(until - time.monotonic(), 1))
            each.kill()
            each.join()
    unfinished = {title: each for title, each in heard.items() if len(each) < world}
    for title, each in unfinished.items():
        told = next((result for result in each if RAISED in result), {})
        record.note(title, {RAISED: f"{len(each)} of {world} ranks finished"} | told)
    codes = [each.exitcode for each in ranks]
    if any(codes):
        raise RuntimeError(f"the ranks must end with 0 within {seconds:.0f} s, got {codes}. See what they printed.")
    return {"exit codes": codes, "cases": len(heard)}


def _heard(pipes: Sequence[Connection], until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the ranks send, until all have ended or the time is over."""
    still = list(pipes)
    while still and (seconds := until - time.monotonic()) > 0:
        for pipe in multiprocessing.connection.wait(still, seconds):
            try:
                yield pipe.recv()
            except EOFError:
                still.remove(pipe)


def _joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The error of the first rank that has one, or the largest of each number."""
    errors = [result for result in results if RAISED in result]
    return errors[0] if errors else {key: worst(result[key] for result in results) for key in results[0]}


def _rank(
    rank: int, world: int, backend: str, meeting: str, device: torch.device, cases: Cases, sizes: Any, end: Connection
) -> None:
    """What one process does."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=_TIMEOUT)
    for title, function in cases(device, sizes):
        try:
            result = function()
        except Exception as error:
            result = failure(error)
        end.send((title, result))
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # without Python's clean-up, in which a gloo group that something still refers to may abort
