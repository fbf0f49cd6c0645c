# SPDX-License-Identifier: Apache-2.0
"""Sharded and shared matrices against whole ones: gloo ranks on one device, and one NCCL rank that really sends."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from communication import MODES, Traffic
from on_gpu.processes import Case, run_ranks
from on_gpu.record import Record, worst
from on_gpu.sizes import Sizes
from on_gpu.steps import captured
from torch import distributed as dist
from torch.nn import Parameter

from emerging_optimizers.adaptive_muon import AdaptiveMuon, Piece
from emerging_optimizers.adaptive_muon.moment2 import METHODS


OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
STEPS = 3
PADDING = 8
# Bytes of less than a matrix: every round has one matrix of each owner.
LITTLE = 1


def run(record: Record, sizes: Sizes) -> None:
    """Run the one rank, then 2 and 4."""
    backend = "nccl" if record.device.type == "cuda" else "gloo"
    runs = [(f"one {backend} rank", 1, backend, padded_cases, 60.0)]
    runs += [(f"{world} gloo ranks", world, "gloo", strip_cases, 100.0) for world in sizes.worlds]
    for title, world, by, cases, most in runs:

        def ranks(world: int = world, by: str = by, cases: Any = cases, most: float = most) -> dict[str, Any]:
            return run_ranks(record, world, by, cases, sizes, min(most, record.seconds_left))

        record.measure(title, ranks, about=30)


# ------------------------------------------------------------------------------------------------------- strips of rows


def strip_cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Yield all modes, methods and precisions."""
    for mode in MODES:
        for method in METHODS:
            for precision in sizes.precisions:
                title = f"{dist.get_world_size()} ranks, {mode}, {method}, {precision}"
                yield title, partial(strips, device, sizes, mode, method, precision)
    for method in METHODS:
        title = f"{dist.get_world_size()} ranks, {{}}, {method}, {sizes.precisions[0]}"
        yield title.format("rounds"), partial(strips, device, sizes, MODES[0], method, sizes.precisions[0], LITTLE)
        yield title.format("replicas"), partial(replicas, device, sizes, method, sizes.precisions[0])
    yield f"{dist.get_world_size()} ranks, without a gradient", partial(without_a_gradient, device, sizes)


def strips(
    device: torch.device, sizes: Sizes, mode: str, method: str, precision: str, most: int = 2**30
) -> dict[str, float]:
    """Return how far this rank's strips, of rows and of columns in turn, are from the whole matrices after some steps."""
    how = {"tp_group": dist.group.WORLD, "tp_mode": mode, "max_bytes_in_flight": most}
    return beside_whole(device, sizes, method, precision, _strip, **how)


def replicas(device: torch.device, sizes: Sizes, method: str, precision: str) -> dict[str, float]:
    """Return how far matrices that all ranks hold, and share the work on, are from those of a rank that does it all."""
    return beside_whole(device, sizes, method, precision, lambda whole, _: whole, replica_group=dist.group.WORLD)


def beside_whole(
    device: torch.device,
    sizes: Sizes,
    method: str,
    precision: str,
    part: Callable[[torch.Tensor, int], torch.Tensor],
    **how: Any,
) -> dict[str, float]:
    """Return how far parts of matrices, whose optimizer has further options, are from the whole ones after some steps."""
    generator = torch.Generator().manual_seed(0)
    begin = [torch.randn(shape, generator=generator).to(device) for shape in sizes.sharded]
    whole = [Parameter(each.clone()) for each in begin]
    own = [Parameter(part(each, index).clone()) for index, each in enumerate(begin)]
    for index, p in enumerate(own if "tp_group" in how else ()):
        p.partition_dim = index % 2  # type: ignore[attr-defined]
    options = OPTIONS | {"moment2_method": method, "fp32_matmul_prec": precision}
    optimizers = [AdaptiveMuon(whole, **options), AdaptiveMuon(own, **options, **how)]
    for _ in range(STEPS):
        for index, (p, q) in enumerate(zip(whole, own, strict=True)):
            p.grad = torch.randn(p.shape, generator=generator).to(device)
            q.grad = part(p.grad, index).clone()
        for optimizer in optimizers:
            optimizer.step()
    expected = [part(p.detach(), index) for index, p in enumerate(whole)]
    started = [part(each, index) for index, each in enumerate(begin)]
    return {"distance": worst(map(distance, own, expected, started))}


def without_a_gradient(device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Return after how many steps all ranks raise because one of them alone has lost a gradient."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(_strip(torch.randn(shape, generator=generator).to(device), 0)) for shape in sizes.sharded]
    for p in params:
        p.partition_dim = 0  # type: ignore[attr-defined]
        p.grad = torch.ones_like(p)
    optimizer = AdaptiveMuon(params, lr=0.02, tp_group=dist.group.WORLD)
    optimizer.step()
    if dist.get_rank() == 0:
        params[-1].grad = None
    for steps in range(1, 4):
        try:
            optimizer.step()
        except ValueError:
            return {"steps until the error": steps}
    raise RuntimeError("a step must raise where one rank has lost a gradient, got three that do not. Check the flags.")


def _strip(whole: torch.Tensor, index: int) -> torch.Tensor:
    """This rank's strip of the matrix with an index."""
    return whole.chunk(dist.get_world_size(), index % 2)[dist.get_rank()]


def distance(one: torch.Tensor, other: torch.Tensor, begin: torch.Tensor) -> float:
    """Return how far two results are apart, relative to how far the second has come."""
    one, other, begin = one.detach().double(), other.detach().double(), begin.double()
    return ((one - other).norm() / (other - begin).norm()).item()


# -------------------------------------------------------------------------------------------------- one rank with padding


def padded_cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Yield all methods, and several rounds, without and with a CUDA graph."""
    for method, most in (*((method, 2**30) for method in METHODS), ("namo", LITTLE)):
        for in_graph in (False, True) if device.type == "cuda" else (False,):
            title = f"one rank, padded{', rounds' if most == LITTLE else ''}, {method}{', graph' if in_graph else ''}"
            yield title, partial(padded, device, sizes, method, in_graph, most)


def padded(device: torch.device, sizes: Sizes, method: str, in_graph: bool, most: int) -> dict[str, float]:
    """Return how far padded matrices, which one rank sends to itself, are from plain ones, and the messages of a step."""
    generator = torch.Generator().manual_seed(0)
    begin = [torch.randn(shape, generator=generator).to(device) for shape in sizes.sharded]
    whole, own = [Parameter(each.clone()) for each in begin], [Parameter(_padded(each, 0.0)) for each in begin]
    group = dist.group.WORLD
    assert group is not None

    def layout(p: torch.Tensor) -> Piece:
        rows, columns = p.size(0) - PADDING, p.size(1)
        return Piece(group, (rows, columns), (0, rows, 0, columns), PADDING)

    options = OPTIONS | {"moment2_method": method, "fp32_matmul_prec": "highest"}
    plain = AdaptiveMuon(whole, **options)
    rate = {"lr": torch.tensor(OPTIONS["lr"], device=device), "capturable": True} if in_graph else {}
    sending = AdaptiveMuon(own, layout_fn=layout, max_bytes_in_flight=most, **(options | rate))

    def give_gradients() -> None:
        for p, q in zip(whole, own, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(device)
            q.grad = _padded(p.grad, 1.0) if q.grad is None else q.grad.copy_(_padded(p.grad, 1.0))

    give_gradients()
    if not in_graph:
        sending.step()  # a graph is preceded by two steps
    with captured(sending, capture_error_mode="thread_local") if in_graph else nullcontext() as graph:
        for _ in range(2 if in_graph else 1):
            plain.step()
        for _ in range(STEPS):
            give_gradients()
            plain.step()
            sending.step() if graph is None else graph.replay()
    with Traffic() as traffic:
        sending.step()
    if not traffic.collectives:
        raise RuntimeError("a step must send messages, got none. Check the padding.")
    plain.step()
    apart = worst(distance(q[:-PADDING], p, each) for p, q, each in zip(whole, own, begin, strict=True))
    return {"distance": apart, "messages": sum(traffic.collectives.values())}


def _padded(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A matrix with rows of a value at its end."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, PADDING), value=value)
