# SPDX-License-Identifier: Apache-2.0
"""The device's ceilings, and symmetric products: the library's against our kernel."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from on_gpu.record import Record
from on_gpu.sizes import Sizes
from on_gpu.timing import event_ms, graph_ms

from emerging_optimizers.adaptive_muon.orthogonalize.precision import sums_in_float32
from emerging_optimizers.adaptive_muon.orthogonalize.symmetric_kernel import symmetric_product_on_cuda


BETA, ALPHA = 0.5, -2.0


class Product(NamedTuple):
    """A product of the iteration: of a batch of matrices with their transposes, or of squares with a square added."""

    batch: int
    n: int
    k: int
    kind: str

    @property
    def title(self) -> str:
        """Its shape and kind."""
        return f"{self.batch} x {self.n} x {self.k} {self.kind}"

    def operands(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return S, T and P or None, of random numbers, in float16."""
        generator = torch.Generator(device).manual_seed(1)
        shape = (self.batch, self.k, self.n) if self.kind == "gram of tall" else (self.batch, self.n, self.k)
        X = torch.randn(shape, device=device, generator=generator) / self.k**0.5
        if self.kind == "square":
            X = (X + X.mT).half()
            return X, X, X
        X = X.half()
        return (X.mT, X, None) if self.kind == "gram of tall" else (X, X.mT, None)


def products(sizes: Sizes) -> Iterator[Product]:
    """Yield the products to measure."""
    for batch, n, k in sizes.products:
        for kind in ("gram of wide", "square" if n == k else "gram of tall"):
            yield Product(batch, n, k, kind)


def run(record: Record, sizes: Sizes) -> None:
    """Measure the ceilings and all products."""
    device = record.device
    record.measure("ceiling: copy", lambda: copied(sizes.copied, device), about=5)
    record.measure("ceiling: product", lambda: multiplied(sizes.side, device), about=5)
    for each in products(sizes):
        record.measure(f"product {each.title}, torch", partial(measured, each, by_torch, device), about=5)
        name = f"product {each.title}, our kernel"
        record.measure(name, partial(measured, each, by_our_kernel, device), about=15, needs_gpu=True)


def copied(elements: int, device: torch.device) -> dict[str, float]:
    """Return the bandwidth of a copy within the device: bytes read and bytes written."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    ms = event_ms(lambda: target.copy_(source), device)
    return {"ms": ms, "bytes_per_second": 2 * source.nbytes / ms * 1e3}


def multiplied(side: int, device: torch.device) -> dict[str, float]:
    """Return the rate of a product of two float16 matrices."""
    a, b = (torch.randn(side, side, device=device).half() for _ in range(2))
    out = torch.empty_like(a)
    ms = graph_ms(lambda: torch.mm(a, b, out=out), device)
    return {"ms": ms, "flops_per_second": 2 * side**3 / ms * 1e3}


def by_torch(S: torch.Tensor, T: torch.Tensor, plus: torch.Tensor | None, out: torch.Tensor) -> None:
    """Compute all of the product, by cuBLAS on a GPU."""
    if plus is None:
        torch.bmm(S, T, out=out)
    else:
        torch.baddbmm(plus, S, T, beta=BETA, alpha=ALPHA, out=out)


def by_our_kernel(S: torch.Tensor, T: torch.Tensor, plus: torch.Tensor | None, out: torch.Tensor) -> None:
    """Compute half of the product, and mirror it."""
    scales = (1.0, 1.0) if plus is None else (BETA, ALPHA)
    symmetric_product_on_cuda(S, T, plus, out, *scales)


def measured(of: Product, compute: Callable[..., None], device: torch.device) -> dict[str, Any]:
    """Return the milliseconds of a product, its rate as if all of it were computed, and its error against float64."""
    S, T, plus = of.operands(device)
    out = torch.full((of.batch, of.n, of.n), torch.nan, device=device, dtype=torch.float16)
    with sums_in_float32():
        compute(S, T, plus, out)
        exact = S.double() @ T.double()
        exact = exact if plus is None else BETA * plus.double() + ALPHA * exact
        error = ((out.double() - exact).norm() / exact.norm()).item()
        asymmetry = ((out - out.mT).abs().max() / out.abs().max()).item()
        del exact
        ms = graph_ms(lambda: compute(S, T, plus, out), device)
    rate = 2 * of.batch * of.n**2 * of.k / ms * 1e3
    return {"ms": ms, "flops_per_second": rate, "error": error, "asymmetry": asymmetry}
