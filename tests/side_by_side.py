# SPDX-License-Identifier: Apache-2.0
"""What the tests that run two optimizers side by side have in common."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS


each_method = pytest.mark.parametrize("method", METHODS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def legal(method: str, options: dict[str, Any]) -> bool:
    """Whether a method takes the weight decay among the options."""
    kind, decay = METHODS[method], options.get("weight_decay_method")
    return kind.adaptive_decay if decay == "adaptive" else not kind.reads_gradient if decay == "l2" else True


def normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random numbers of their own for each seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smooth(method: str) -> dict[str, float]:
    """Options with which rounding stays small.

    "adamuon" divides every element of O by about its own size. Of an element that is near zero, rounding is then as
    large as the element, or turns the sign. An eps of the order of O keeps that small.
    """
    return {"eps": 1e-2} if method == "adamuon" else {}


def noting(seen: list[tuple[int, ...]], factor: float) -> type[AdaptiveMuon]:
    """A class whose own functions note the shapes that they get, of which the second multiplies the update."""

    class Own(AdaptiveMuon):
        def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            seen.append(tuple(grad.shape))
            return super().orthogonalize(p, grad, **kwargs)

        def pre_weight_update_fn_inplace(self, p: torch.Tensor, update: torch.Tensor) -> None:
            seen.append(tuple(update.shape))
            update.mul_(factor)

    return Own


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the largest element."""
    assert one.shape == other.shape and one.dtype == other.dtype
    return float((one - other).detach().abs().max() / other.detach().abs().max().clamp_min(1e-30))


def assert_same(left: tuple[Any, list[Any]], right: tuple[Any, list[Any]]) -> None:
    """Checks that two optimizers with their parameters have the same weights and state, bit for bit.

    Which is promised for the same operations on tensors of the same shapes and strides, and for no others.
    """
    (one, ones), (other, others) = left, right
    assert all(torch.equal(p, q) for p, q in zip(ones, others, strict=True))
    torch.testing.assert_close(one.state_dict()["state"], other.state_dict()["state"], atol=0, rtol=0)


def saved(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer's state_dict after a round trip through torch.save with safe loading."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_resumes(left: tuple[Any, list[Any]], right: tuple[Any, list[Any]], walk: Callable[..., None]) -> None:
    """Checks that an optimizer that loads the state of another after two steps goes the other's way, bit for bit."""
    (optimizer, params), (resumed, others) = left, right
    walk(optimizer, range(2))
    walk(resumed, range(7, 8))  # something else, to be overwritten
    resumed.load_state_dict(saved(optimizer))
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    assert_same(left, right)
    for each in (optimizer, resumed):
        walk(each, range(2, 4))
    assert_same(left, right)
