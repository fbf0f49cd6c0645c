# SPDX-License-Identifier: Apache-2.0
"""Who takes part: our methods, upstream's, torch's, and any other library that is installed and known here."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch.optim import Optimizer

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.orthogonalized_optimizers import Muon
from emerging_optimizers.orthogonalized_optimizers import adaptive_muon as upstream


Make = Callable[[list[torch.Tensor]], Optimizer]

LR = 1e-3
COMMON: dict[str, Any] = {"lr": LR, "momentum": 0.95, "weight_decay": 0.01}


def contestants(precision: str, algorithms: list[str]) -> Iterator[tuple[str, Make]]:
    """Yields the name of every contestant and what makes it, of parameters.

    Args:
        precision: ``fp32_matmul_prec`` of those that have it. torch.optim.Muon always iterates in bfloat16.
        algorithms: The ``ns_algorithm`` to take part with; "auto" has no name of its own.
    """
    for algorithm in algorithms:
        for method in METHODS:
            options = COMMON | {"fp32_matmul_prec": precision, "moment2_method": method, "ns_algorithm": algorithm}
            name = f"ours {method}" + (f" ({algorithm})" if algorithm != "auto" else "")
            yield name, lambda params, options=options: AdaptiveMuon(params, **options)
    for method in get_args(upstream.Moment2MethodT):
        options = COMMON | {"fp32_matmul_prec": precision, "moment2_method": method}
        yield f"upstream {method}", lambda params, options=options: upstream.AdaptiveMuon(params, **options)
    yield "upstream Muon", lambda params: Muon(params, **COMMON, fp32_matmul_prec=precision)
    if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
        yield "torch Muon", lambda params: torch.optim.Muon(params, lr=LR)
    yield "torch AdamW", lambda params: torch.optim.AdamW(params, lr=LR, fused=True)
    if find_spec("dion"):
        from dion import NorMuon

        yield "dion NorMuon", lambda params: NorMuon(params, lr=LR)
    if find_spec("heavyball"):
        from heavyball import Muon as HeavyMuon

        yield "heavyball Muon", lambda params: HeavyMuon(params, lr=LR)
    if find_spec("pytorch_optimizer"):
        from pytorch_optimizer import AdaMuon

        yield "pytorch_optimizer AdaMuon", lambda params: AdaMuon([{"params": params, "use_muon": True}], lr=LR)


def twin(name: str) -> str:
    """Returns the name of upstream's optimizer that a contestant is compared with: its own method, or NAMO's."""
    theirs = f"upstream {name.removeprefix('ours ').split()[0]}"
    return theirs if theirs.removeprefix("upstream ") in get_args(upstream.Moment2MethodT) else "upstream namo"
