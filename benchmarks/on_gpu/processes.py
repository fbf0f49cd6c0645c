# SPDX-License-Identifier: Apache-2.0
"""Ranks on one machine that share one device, and what they measure."""

import multiprocessing
import os
import queue
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from on_gpu.record import RAISED, Record, failure
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
    results: Any = context.Queue()
    heard: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "ranks"
        arguments = (world, backend, str(meeting), record.device, cases, sizes, results)
        ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(world)]
        for each in ranks:
            each.start()
        while time.monotonic() < until:
            alive = any(each.is_alive() for each in ranks)
            try:
                title, result = results.get(timeout=0.2)
            except queue.Empty:
                if alive:
                    continue
                break
            heard[title].append(result)
            if len(heard[title]) == world:
                record.note(title, _joined(heard[title]), quiet=True)
        for each in ranks:
            each.kill()
            each.join()
    unfinished = {title: each for title, each in heard.items() if len(each) < world}
    for title, each in unfinished.items():
        told = next((result for result in each if RAISED in result), {})
        record.note(title, {RAISED: f"{len(each)} of {world} ranks finished"} | told)
    codes = [each.exitcode for each in ranks]
    if any(codes):
        raise RuntimeError(f"the ranks must end with 0 within {seconds:.0f} s; they ended with {codes}")
    return {"exit codes": codes, "cases": len(heard)}


def _joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The error of the first rank that has one, or the largest of each number."""
    errors = [result for result in results if RAISED in result]
    return errors[0] if errors else {key: max(result[key] for result in results) for key in results[0]}


def _rank(
    rank: int, world: int, backend: str, meeting: str, device: torch.device, cases: Cases, sizes: Any, results: Any
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
        results.put((title, result))
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
    results.close()
    results.join_thread()
    os._exit(0)  # without Python's clean-up, in which a gloo group that something still refers to may abort
