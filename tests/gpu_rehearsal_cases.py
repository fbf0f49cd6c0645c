# SPDX-License-Identifier: Apache-2.0
"""What two ranks measure in tests/test_gpu_rehearsal.py: they start from a module of its own."""

import os

from torch import distributed as dist


def raises():
    raise ValueError("on both ranks")


def ends():
    """The process of one rank."""
    if dist.get_rank() == 1:
        os._exit(3)
    return {}


def cases(device, sizes):
    def works():
        return {"rank": dist.get_rank()}

    yield from (("works", works), ("raises", raises), ("works again", works), ("ends", ends))
