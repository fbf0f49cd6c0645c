# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the CPU's results, no synchronization, CUDA graphs, and matrices of more than 2^31 elements."""

import pytest
import torch
from on_cuda import OPTIONS, distance, first_step, give_gradients, needs_cuda, no_synchronization, on, replays_equal
from triton.runtime.autotuner import Autotuner

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.orthogonalize.symmetric_kernel import symmetric_product_on_cuda
from emerging_optimizers.triton_kernels import syrk


pytestmark = needs_cuda


@pytest.fixture(autouse=True)
def _one_configuration(monkeypatch):
    """Upstream's kernel tries up to 180 configurations for each size, which takes minutes."""
    for kernel in vars(syrk).values():
        if isinstance(kernel, Autotuner):
            monkeypatch.setattr(kernel, "configs", kernel.configs[:1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("algorithm", ["auto", "gram", "standard"])
@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-3), ("high", 0.1), ("medium", 0.1)])
@pytest.mark.parametrize("use_syrk", [False, True])
def test_walks_the_cpus_path(method, algorithm, precision, tolerance, use_syrk):
    """Compared by the distance moved. Of adamuon an entry near zero, divided by itself, moves as far as any other."""
    begin, params, others = on("cpu"), on("cpu"), on("cuda")
    options = OPTIONS | {"moment2_method": method, "ns_algorithm": algorithm}
    # The CPU's path in full precision is the one that both precisions stand for.
    optimizers = [
        AdaptiveMuon(params, fp32_matmul_prec="highest", **options),
        AdaptiveMuon(others, fp32_matmul_prec=precision, use_syrk=use_syrk, **options),
    ]
    for step in range(3):
        for each, optimizer in zip((params, others), optimizers, strict=True):
            give_gradients(each, step)
            optimizer.step()
    assert distance(params, others, begin) <= (0.3 if method == "adamuon" else tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decay", ["decoupled", "palm", "independent", "cautious"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("precision", "use_syrk"), [("highest", False), ("medium", False), ("medium", True)])
def test_a_step_never_waits_for_the_device(method, decay, dtype, precision, use_syrk):
    params = on("cuda", dtype)
    options = OPTIONS | {"moment2_method": method, "weight_decay_method": decay, "fp32_matmul_prec": precision}
    optimizer = AdaptiveMuon(params, use_syrk=use_syrk, **options)
    give_gradients(params, 0)
    optimizer.step()
    with no_synchronization():
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("use_syrk", [False, True])
def test_a_step_in_a_graph(method, use_syrk):
    """Replays count on, and follow the rate and the gradients."""
    params, others, rate = on("cuda"), on("cuda"), torch.tensor(0.02, device="cuda")
    options = OPTIONS | {"moment2_method": method, "use_syrk": use_syrk}
    plain = AdaptiveMuon(params, **options)
    captured = AdaptiveMuon(others, capturable=True, **(options | {"lr": rate}))
    replays_equal(plain, captured, params, others, rate)
    assert {int(captured.state[q]["step"]) for q in others} == {4}


def test_a_graph_without_capturable_is_refused():
    """Before anything is launched, so that the capture ends well."""
    params = on("cuda")
    optimizer = AdaptiveMuon(params, lr=0.02)
    give_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(ValueError, match="capturable=True"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_made_in_the_capture(method):
    """As in a captured training step, whose gradients have addresses that no earlier step has seen."""
    params, others = on("cuda"), on("cuda")
    plain = AdaptiveMuon(params, moment2_method=method, **OPTIONS)
    captured = AdaptiveMuon(others, moment2_method=method, capturable=True, **OPTIONS)
    inputs = [torch.randn(p.shape, device="cuda") for p in params]
    for p, q, x in zip(params, others, inputs, strict=True):
        p.grad, q.grad = x.clone(), x.clone()
    plain.step()
    first_step(captured)
    captured.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for q, x in zip(others, inputs, strict=True):
            q.grad = x * 2
        captured.step()
    captured.zero_grad()
    torch.cuda.empty_cache()
    garbage = [torch.full((1 << 20,), 7, dtype=torch.int64, device="cuda") for _ in range(8)]
    for step in range(3):
        for p, x in zip(params, inputs, strict=True):
            x.add_(step)
            p.grad = x * 2
        plain.step()
        graph.replay()
    del garbage
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("batch", "n", "k"), [(3, 256, 128), (12, 768, 3072), (1, 1024, 1024), (1, 4096, 4096)], ids=str
)
@pytest.mark.parametrize("tall", [False, True])
def test_the_kernel_on_sizes_of_models(batch, n, k, tall):
    X = torch.randn(batch, *((k, n) if tall else (n, k)), device="cuda").half() / k**0.5
    S, T = (X.mT, X) if tall else (X, X.mT)
    P = torch.randn(batch, n, n, device="cuda").half()
    P += P.mT.clone()
    out = torch.full_like(P, torch.nan)
    symmetric_product_on_cuda(S, T, P, out, 0.5, -2.0, 3.0)
    expected = 0.5 * P.double() - 2 * S.double() @ T.double() + 3 * torch.eye(n, device="cuda")
    torch.testing.assert_close(out.double(), expected, atol=4e-3, rtol=1e-3)


needs_70_gb = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 70 * 2**30,
    reason="needs 70 GB of GPU memory",
)


@needs_70_gb
@pytest.mark.parametrize("method", ["namo_d", "normuon"])
def test_more_than_2_to_the_31_elements(method):
    """Both halves of a matrix that is twice the same go the same way; bfloat16, for it all to fit."""
    torch.cuda.empty_cache()
    half = torch.randn(2**25 + 64, 32, device="cuda", dtype=torch.bfloat16)
    p = torch.nn.Parameter(torch.zeros(2 * len(half), 32, device="cuda", dtype=torch.bfloat16))
    p.grad = torch.cat([half, half])
    assert p.numel() > 2**31
    AdaptiveMuon([p], lr=1.0, moment2_method=method).step()
    assert p[-1000:].norm() > 0
    torch.testing.assert_close(p[: len(half)], p[len(half) :], atol=0, rtol=1e-2)


@needs_70_gb
def test_the_kernel_on_more_than_2_to_the_31_elements():
    torch.cuda.empty_cache()
    rows = 320  # the last of which begin beyond 2^31
    X = torch.zeros(1, rows, 2**23 + 64, device="cuda", dtype=torch.float16)
    X[:, :, -64:] = torch.randn(1, rows, 64, device="cuda")
    out = torch.empty(1, rows, rows, device="cuda", dtype=torch.float16)
    symmetric_product_on_cuda(X, X.mT, None, out, 1.0, 1.0)
    tail = X[:, :, -64:].double()
    torch.testing.assert_close(out.double(), tail @ tail.mT, atol=5e-2, rtol=1e-2)
