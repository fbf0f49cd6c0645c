# SPDX-License-Identifier: Apache-2.0
"""State: the step that only makes it, which buffers are whole on every rank, and the same bits on all of them."""

import hashlib
from collections.abc import Callable, Iterator
from typing import get_args

import pytest
import torch
from models import WAYS, fsdp, hsdp, local, mesh, models, set_gradients_of_both, tensor_parallel
from pieces import Recording, fused_layers, gathered, options_of, set_gradients, stack, strips
from scaled_momentum import SCALED, registered
from side_by_side import legal
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.options import WeightDecayMethodT


DECAYS = get_args(WeightDecayMethodT)
PAIRS = [(method, decay) for method in METHODS for decay in DECAYS if legal(method, {"weight_decay_method": decay})]

each_mode = pytest.mark.parametrize("mode", ["layer_sharded", "duplicated", "distributed"])
each_method = pytest.mark.parametrize("method", METHODS)


# ------------------------------------------------------------------------------------------------- making the state


def made_by(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    """Checks that a step makes the state and changes nothing."""
    before = [local(p).clone() for p in params]
    optimizer.step()
    assert all(torch.equal(local(p), W) for p, W in zip(params, before, strict=True))
    for p in params:
        assert {"momentum_buffer", "step"} < optimizer.state[p].keys()
        assert not any(local(value).any() for value in optimizer.state[p].values())


@each_mode
@pytest.mark.parametrize(("method", "decay"), PAIRS)
def test_a_rate_and_gradients_of_zero_make_the_state_only(
    method: str, decay: str, mode: str, group: ProcessGroup
) -> None:
    pairs = strips([(24, 10), (3, 18)]) + fused_layers(1) + [stack(dim) for dim in (0, 1)]
    options = {"moment2_method": method, "weight_decay_method": decay, "weight_decay": 0.5, "bias_correction": True}
    params = [pair.piece for pair in pairs]
    optimizer = AdaptiveMuon(params, lr=0.0, tp_group=group, tp_mode=mode, **options)
    for p in params:
        p.grad = torch.zeros_like(p)
    made_by(optimizer, params)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("method", "decay"), [pair for pair in PAIRS if pair[1] in ("independent", "l2", "adaptive")])
def test_of_dtensors_too(method: str, decay: str, way: Callable[[nn.Module], None]) -> None:
    params = [p for p in models(way)[1].parameters() if p.ndim == 2]
    options = {"moment2_method": method, "weight_decay_method": decay, "weight_decay": 0.5, "bias_correction": True}
    optimizer = AdaptiveMuon(params, lr=0.0, **options)
    for p in params:
        p.grad = torch.zeros_like(p)
    made_by(optimizer, params)


@each_mode
@pytest.mark.parametrize(("method", "decay"), PAIRS)
def test_a_gradient_on_one_rank_is_a_step_on_all(method: str, decay: str, mode: str, group: ProcessGroup) -> None:
    """Of that matrix: the one beside it, whose gradient is zero everywhere, is left as it is."""
    pairs, last = strips([(24, 12)] * 2), dist.get_rank() == dist.get_world_size() - 1
    moved, still = (pair.piece for pair in (pairs[0], pairs[3]))
    options = {"moment2_method": method, "weight_decay_method": decay, "weight_decay": 0.5, "bias_correction": True}
    optimizer = AdaptiveMuon([moved, still], lr=0.0, tp_group=group, tp_mode=mode, **options)
    before = [p.detach().clone() for p in (moved, still)]
    for p in (moved, still):
        p.grad = torch.zeros_like(p)
    if last:
        moved.grad[-1, -1] = 2  # type: ignore[index]
    optimizer.step()
    assert optimizer.state[moved]["step"] == 1 and not optimizer.state[still]["step"]
    # The rate is zero: what changes is V, and W by the one decay without a rate.
    factor = 0.5 if decay == "independent" else 1.0
    assert torch.equal(moved, factor * before[0]) and torch.equal(still, before[1])
    V = optimizer.state[moved]["moment2_buffer"]
    assert bool(V.any()) or method == "adamuon"  # of which every rank has a shard
    assert not optimizer.state[still]["moment2_buffer"].any()
    if decay != "l2":
        assert bool(optimizer.state[moved]["momentum_buffer"].any()) is last


def test_a_rank_without_experts_counts_a_first_step_at_a_rate_of_zero(group: ProcessGroup) -> None:
    """A warmup begins with one. The count of any rank may be that of a checkpoint."""
    experts, other = nn.Parameter(torch.ones(1 if dist.get_rank() == 0 else 0, 4, 6)), nn.Parameter(torch.ones(4, 6))
    experts.muon_stacked, experts.partition_dim = True, 0  # type: ignore[attr-defined]
    for gradient, steps in ((0.0, 0), (1.0, 1)):
        optimizer = AdaptiveMuon([experts, other], lr=0.0, tp_group=group, bias_correction=True)
        for p in (experts, other):
            p.grad = torch.full_like(p, gradient)
        optimizer.step()
        assert all(optimizer.state[p]["step"] == steps for p in (experts, other))


# --------------------------------------------------------------------------------------------------------- where V is


def hashed(*tensors: torch.Tensor) -> str:
    """A hash of the bits of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("way", [fsdp, hsdp, tensor_parallel])
@each_method
def test_a_vector_is_a_plain_tensor_and_whole_on_all_ranks(method: str, way: Callable[[nn.Module], None]) -> None:
    """V with an entry per element is sharded as the weight is."""
    whole, sharded, places = models(way, hidden=14)
    pairs = [(p, q) for p, q in zip(whole.parameters(), sharded.parameters(), strict=True) if p.ndim == 2]
    optimizers = [AdaptiveMuon([*params], **options_of(method)) for params in zip(*pairs, strict=True)]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        set_gradients_of_both(pairs, places, generator)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in pairs:
        expected, state = (optimizer.state[of] for optimizer, of in zip(optimizers, (p, q), strict=True))
        assert state.keys() == expected.keys()
        names = {name for name in state if name.startswith("moment2_buffer")}
        assert len(names) == (3 if hasattr(p, "muon_blocks") and method != "adamuon" else 1)
        for name in sorted(names):  # in the same order on all ranks
            V = state[name]
            assert V.shape == expected[name].shape  # of a DTensor that of the whole
            if method == "adamuon":
                assert local(V).shape == local(q).shape
                assert getattr(V, "placements", None) == getattr(q, "placements", None)
            else:
                assert type(V) is torch.Tensor
                assert len({*gathered(hashed(V))}) == 1, "bits of V differ between ranks"


@each_method
def test_experts_of_a_rank_keep_their_vs_there(method: str) -> None:
    """Of a stack that is sharded along its experts, V is a DTensor that is sharded along them too."""
    size = dist.get_world_size()
    over_two = mesh((max(size // 2, 1), min(size, 2)), ("ep", "tp"))
    whole = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(3))
    for placements in ([Shard(0), Shard(0)], [Shard(0), Shard(1)], [Shard(0), Shard(2)]):
        p = nn.Parameter(distribute_tensor(whole, over_two, placements))
        p.muon_stacked = True  # type: ignore[attr-defined]
        p.grad = distribute_tensor(whole.flip(0), over_two, placements)
        optimizer = AdaptiveMuon([p], **options_of(method))
        optimizer.step()
        V = optimizer.state[p]["moment2_buffer"]
        assert isinstance(V, DTensor) and V.size(0) == 4 and V.to_local().size(0) == p.to_local().size(0)
        if method == "adamuon":
            assert V.placements == p.placements
            continue
        assert {placement.dim for placement in V.placements if placement.is_shard()} == {0}
        whole_sizes = {*V.to_local().shape[1:]} - {1}
        assert whole_sizes <= {12, 20}, "V of an expert must be whole"


# --------------------------------------------------------------------------------------------- the same bits everywhere


@pytest.fixture
def methods() -> Iterator[None]:
    with registered():
        yield


@each_mode
@pytest.mark.parametrize("method", [*METHODS, *SCALED])
def test_all_ranks_have_the_same_bits(method: str, mode: str, group: ProcessGroup, methods: None) -> None:
    """Of V, and of the sums of squares that D is made of, after every step; of 16-bit iterations too."""
    pairs = strips(dtypes=(torch.float32, torch.bfloat16, torch.float64)) + fused_layers(2)
    pairs += [stack(dim) for dim in (1, 2)]
    pairs = [pair for pair in pairs if pair.piece.partition_dim >= 0]  # type: ignore[attr-defined]
    own = {"moment2_buffer"} if METHODS[method]().kept_dims(2, 1) == (-2, -1) else set()
    for precision in ("highest", "medium"):
        options = {**options_of(method), "fp32_matmul_prec": precision}
        optimizer = Recording([pair.piece for pair in pairs], tp_group=group, tp_mode=mode, **options)
        for step in range(3):
            set_gradients(pairs, step)
            optimizer.step()
            Vs = [
                value
                for pair in pairs
                for key, value in sorted(optimizer.state[pair.piece].items())
                if key.startswith("moment2_buffer") and key not in own
            ]
            assert bool(Vs) == bool(optimizer.sums) == (not own)
            found = gathered([hashed(*Vs), hashed(*optimizer.sums)])
            assert all(of_rank == found[0] for of_rank in found), "bits differ between ranks"
