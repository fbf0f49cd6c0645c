# SPDX-License-Identifier: Apache-2.0
"""Runs pytest in several processes, as torchrun does, of which one imports what takes long, and the others are copies.

Arguments: the number of processes; the statements that import it; the arguments of pytest.
"""

import os
import signal
import sys

import pytest
from torch import distributed as dist


def rank(number: int, processes: int, port: str, arguments: list[str]) -> None:
    """Becomes a rank, in the environment that torchrun makes, and ends with pytest's exit code."""
    numbers = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
    os._exit(pytest.main(arguments))


def main() -> int:
    """Starts the ranks, and ends those that are left when one fails."""
    processes, imports, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    exec(imports, {})
    running, (ports, port) = set(), os.pipe()
    for number in range(processes):
        if not (child := os.fork()):
            rank(number, processes, os.read(ports, 5).decode(), arguments)
        running.add(child)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # after the forks: it has threads
    os.write(port, processes * f"{store.port:05}".encode())
    failed = False
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)  # they may wait for the one that has failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
