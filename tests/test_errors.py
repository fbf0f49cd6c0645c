# SPDX-License-Identifier: Apache-2.0
"""Bad input: each is refused with the rule, the value and the remedy, and changes nothing."""

import copy
import math
import re
from decimal import Decimal
from typing import get_args

import pytest
import torch
from torch import nn

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon, Moment2MethodT


METHODS = get_args(Moment2MethodT)


def matrix(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    p = nn.Parameter(torch.randn(*(shape or (4, 3)), generator=generator).to(dtype))
    p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return p


BAD = [
    ({"moment2_method": "adam"}, "moment2_method", "'adam'", "namo_d"),
    ({"scale_mode": "rms"}, "scale_mode", "'rms'", "spectral"),
    ({"coefficient_type": "quartic"}, "coefficient_type", "'quartic'", "polar_express"),
    ({"coefficient_type": "custom"}, "coefficient_type", "'custom'", "quintic"),
    ({"weight_decay_method": "gentle"}, "weight_decay_method", "'gentle'", "decoupled"),
    ({"fp32_matmul_prec": "low"}, "fp32_matmul_prec", "'low'", "highest"),
    ({"lr": -1e-3}, "lr must be >= 0", "-0.001", "Use about 1e-"),
    ({"lr": "1e-3"}, "lr must be >= 0", "'1e-3' as text.", "Use about 1e-"),
    ({"lr": Decimal("0.02")}, "lr must be >= 0", "Decimal('0.02')", "Use about 1e-"),
    ({"momentum": torch.tensor([0.9])}, "momentum must be in [0, 1)", "tensor([0.9000])", "0.95"),
    ({"beta2": torch.tensor([0.9])}, "beta2 must be in [0, 1)", "tensor([0.9000])", "0.99"),
    ({"eps": Decimal("1e-8")}, "eps must be > 0", "Decimal('1E-8')", "1e-8"),
    ({"extra_scale_factor": [0.2]}, "extra_scale_factor must be finite", "[0.2]", "1.0"),
    ({"eps": None}, "eps must be > 0", "None", "1e-8"),
    ({"lr": torch.tensor([0.1, 0.2])}, "lr must be >= 0", "tensor([0.1000, 0.2000])", "Use about 1e-"),
    ({"lr": math.nan}, "lr must be >= 0", "nan", "Use about 1e-"),
    ({"lr": math.inf}, "lr must be >= 0", "inf", "Use about 1e-"),
    ({"momentum": 1.0}, "momentum must be in [0, 1)", "1.0", "0.95"),
    ({"momentum": -0.1}, "momentum must be in [0, 1)", "-0.1", "0.95"),
    ({"weight_decay": -0.1}, "weight_decay must be >= 0", "-0.1", "0 for none"),
    ({"beta2": 1.0}, "beta2 must be in [0, 1)", "1.0", "0.99"),
    ({"beta2": -0.5}, "beta2 must be in [0, 1)", "-0.5", "0.99"),
    ({"eps": 0.0}, "eps must be > 0", "0.0", "1e-8"),
    ({"eps": -1e-8}, "eps must be > 0", "-1e-08", "1e-8"),
    ({"eps": 1e-50}, "eps must be > 0", "1e-50", "1e-8"),
    ({"namo_d_clamp": 0.0}, "namo_d_clamp must be in (0, 1]", "0.0", "0.75"),
    ({"namo_d_clamp": 1.5}, "namo_d_clamp must be in (0, 1]", "1.5", "0.75"),
    ({"namo_d_clamp": 1.5, "moment2_method": "namo_d"}, "namo_d_clamp must be in (0, 1]", "1.5", "0.75"),
    ({"num_ns_steps": 0}, "num_ns_steps must be", "0", "5"),
    ({"num_ns_steps": 2.5}, "num_ns_steps must be", "2.5", "5"),
    ({"extra_scale_factor": math.nan}, "extra_scale_factor must be finite", "nan", "1.0"),
    ({"extra_scale_factor": -math.inf}, "extra_scale_factor must be finite", "-inf", "1.0"),
    ({"extra_scale_factor": "0.2"}, "extra_scale_factor must be finite", "'0.2' as text.", "1.0"),
    ({"namo_d_clamp": "0.5"}, "namo_d_clamp must be in (0, 1]", "'0.5'", "0.75"),
    ({"weight_decay_method": "l2", "moment2_method": "namo"}, "falsify", "'l2'", "decoupled"),
    ({"weight_decay_method": "l2", "moment2_method": "namo_d"}, "falsify", "'l2'", "decoupled"),
    ({"weight_decay_method": "adaptive", "moment2_method": "adamuon"}, "adaptive", "'adaptive'", "decoupled"),
    ({"weight_decay_method": "adaptive", "moment2_method": "normuon"}, "adaptive", "'adaptive'", "decoupled"),
    ({"tp_mode": "sharded"}, "tp_mode", "'sharded'", "layer_sharded"),
    ({"tp_group": 4}, "tp_group must be a torch.distributed.ProcessGroup", "4", "None where nothing is split."),
    ({"layout_fn": {}}, "layout_fn must be a function", "{}", "None"),
    ({"layout_fn": lambda p: 0}, "layout_fn must return", "0", "None for the usual rules."),
    ({"blocks_fn": (2, 2)}, "blocks_fn must be a function", "(2, 2)", "muon_blocks"),
    ({"blocks_fn": lambda p: (3, 2)}, "whose sum divides its 4 rows", "(3, 2)", "rows of each block"),
    ({"blocks_fn": lambda p: (4, 0)}, "positive row counts", "(4, 0)", "rows of each block"),
    ({"blocks_fn": lambda p: ()}, "positive row counts", "()", "rows of each block"),
    ({"blocks_fn": lambda p: (2.0, 2.0)}, "positive row counts", "(2.0, 2.0)", "rows of each block"),
    ({"max_bytes_in_flight": 0}, "max_bytes_in_flight must be", "0", "2**30"),
    ({"max_bytes_in_flight": "1GB"}, "max_bytes_in_flight must be", "'1GB'.", "2**30"),
]


# The same in every process, as pytest-xdist asks of names, and the address of a function is not.
NAMES = [re.sub(r" at 0x\w+", "", str(options)) for options, *_ in BAD]


@pytest.mark.parametrize("make", [AdaptiveMuon, HybridAdaptiveMuon])
@pytest.mark.parametrize(("options", "rule", "value", "remedy"), BAD, ids=NAMES)
def test_bad_option_is_refused_at_construction(make, options, rule, value, remedy):
    with pytest.raises(ValueError) as error:
        make([matrix()], **options)
    for part in (rule, f"got {value}", remedy):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"scalar_lr": -1},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"betas": 0.9},
        {"scalar_eps": None},
        {"scalar_lr": Decimal("1e-3")},
        {"scalar_eps": Decimal("1e-8")},
    ],
    ids=str,
)
def test_bad_adamw_option_is_refused_at_construction(options):
    with pytest.raises(ValueError, match=next(iter(options)) + r".*, got .*\. Use .*\.$"):
        HybridAdaptiveMuon([matrix(), matrix(3)], **options)


def test_maximize_in_a_group_is_refused():
    for make in (AdaptiveMuon, HybridAdaptiveMuon):
        with pytest.raises(ValueError, match="maximize must not be set.*got True. Negate the loss."):
            make([{"params": [matrix()], "maximize": True}])
        make([{"params": [matrix()], "maximize": False}])


class OwnOrthogonalize(AdaptiveMuon):
    """A subclass as upstream documents it."""

    def orthogonalize(self, p, grad, **kwargs):
        return super().orthogonalize(p, grad, **kwargs)


def test_a_mode_that_would_pass_over_an_own_orthogonalize_is_refused():
    refused = 'must not be replaced in a tp_mode that calls neither, got .distributed.. Use tp_mode="layer_sharded"'
    with pytest.raises(ValueError, match=refused):
        OwnOrthogonalize([matrix()], tp_mode="distributed")
    for mode in ("layer_sharded", "duplicated", "blockwise"):
        OwnOrthogonalize([matrix()], tp_mode=mode)

    for name, function in (
        ("scaled_orthogonalize_fn", torch.clone),
        ("orthogonalize", lambda p, grad, **kwargs: grad),
    ):
        p = matrix()
        p.grad, before = torch.ones_like(p), p.detach().clone()
        optimizer = AdaptiveMuon([p], tp_mode="distributed")
        plain = getattr(optimizer, name)
        setattr(optimizer, name, function)
        with pytest.raises(ValueError, match=refused):
            optimizer.step()
        assert torch.equal(p, before) and not optimizer.state
        setattr(optimizer, name, plain)
        optimizer.step()
        assert not torch.equal(p, before)


def test_orthogonalize_put_on_an_instance_is_called():
    p = matrix()
    p.grad, before = torch.ones_like(p), p.detach().clone()
    optimizer = AdaptiveMuon([p], lr=0.5, weight_decay=0.0, moment2_method="namo")
    optimizer.orthogonalize = lambda p, grad, **kwargs: torch.zeros_like(grad)
    optimizer.step()
    assert torch.equal(p, before)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="beta3"):
        HybridAdaptiveMuon([matrix()], beta3=0.9)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (nn.Linear(2, 2), "from_model"),
        ({"params": []}, "got a dict"),
        (torch.ones(2, 2), "got a Tensor"),
        ([{"lr": 1.0}], "must have params"),
        ([{"params": ("a", matrix())}], "got str"),
        ([{"params": {matrix()}}], "params must have an order"),
        ([{"params": [matrix()], "scalar_learning_rate": 1.0}], "scalar_lr, scalar_eps"),
        ([], "empty parameter list"),
    ],
    ids=["model", "dict", "tensor", "no params", "a name alone", "set", "unknown scalar_", "nothing"],
)
def test_params_of_another_form_are_refused(params, text):
    with pytest.raises((TypeError, ValueError), match=text):
        HybridAdaptiveMuon(params)


@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
@pytest.mark.parametrize("shape", [(4, 3), (4,)], ids=["matrix", "bias"])
@pytest.mark.parametrize("make", [AdaptiveMuon, HybridAdaptiveMuon])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_given_twice_is_refused(make, shape, named):
    """As tied weights are, where the parameters of two modules are joined."""
    p, other = matrix(*shape), matrix(3, 3)
    if make is AdaptiveMuon and p.ndim < 2:
        pytest.skip("matrices only")
    params = [("a.weight", p), ("c.weight", other), ("b.weight", p)] if named else [p, other, p]
    text = "once; repeated is, got .*" + ("'b.weight'" if named else "parameter . of its group") + ".* Remove it"
    with pytest.raises(ValueError, match=text):
        make(params)
    optimizer = make([matrix(2, 2)] if not named else [("d.weight", matrix(2, 2))])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": params})
    assert optimizer.state_dict() == before


GROUPS = [
    {"lr": "1e-3"},
    {"nesterov": True},
    {"lr": -1.0},
    {"momentum": 2.0},
    {"beta2": 1.0},
    {"eps": 0.0},
    {"weight_decay": -1},
    {"moment2_method": "namo"},
]


@pytest.mark.parametrize("options", GROUPS, ids=str)
def test_bad_group_is_refused_and_leaves_the_optimizer_as_it_was(options):
    optimizer = AdaptiveMuon([matrix()])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=next(iter(options))):
        optimizer.add_param_group({"params": [matrix(5, 2)], **options})
    assert optimizer.state_dict() == before


@pytest.mark.parametrize(
    ("shape", "text"), [((3,), "(3,)"), ((8, 3, 3, 3), "(8, 3, 3, 3)"), ((2, 3, 4), "(2, 3, 4)"), ((), "()")]
)
def test_what_is_not_a_matrix_is_refused_by_name_and_shape(shape, text):
    p = nn.Parameter(torch.zeros(shape))
    for params, name in (([matrix(), p], "parameter 1 "), ([("a", matrix()), ("conv.weight", p)], "'conv.weight'")):
        with pytest.raises(ValueError) as error:
            AdaptiveMuon(params)
        for part in (name, text, "AdamW"):
            assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_what_is_not_a_real_float_is_refused(dtype):
    p = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"in one tensor; .* is, got '{dtype}'.*bfloat16"):
        AdaptiveMuon([p])


def test_lazy_matrix_is_taken_and_looked_at_again():
    linear, conv = nn.LazyLinear(3, bias=False), nn.LazyConv1d(3, 2, bias=False)
    optimizer = AdaptiveMuon([linear.weight])
    linear(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert optimizer.state[linear.weight]["momentum_buffer"].shape == (3, 5)
    optimizer = AdaptiveMuon([conv.weight])
    conv(torch.ones(1, 5, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"\(3, 5, 2\).*AdamW"):
        optimizer.step()


def sparse(p):
    p.grad = p.grad.to_sparse()


def complexified(p):
    p.grad, p.data = None, p.data.to(torch.complex64)
    p.grad = torch.zeros_like(p)


def flattened(p):
    p.grad, p.data = None, p.data.flatten()
    p.grad = torch.zeros_like(p)


@pytest.mark.parametrize("spoil", [sparse, complexified, flattened])
@pytest.mark.parametrize("hybrid", [False, True], ids=["AdaptiveMuon", "HybridAdaptiveMuon"])
@pytest.mark.parametrize("method", METHODS)
def test_refused_step_changes_nothing(method, hybrid, spoil):
    """The spoiled matrix comes last, in a second group: everything before it must be as it was."""
    params = [matrix(), matrix(3, 4), matrix(6)]
    last = matrix(4, 4)
    groups = [{"params": params if hybrid else params[:2]}, {"params": [last]}]
    optimizer = (HybridAdaptiveMuon if hybrid else AdaptiveMuon)(groups, moment2_method=method)
    optimizer.step()
    spoil(last)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    weights = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"got .*\. [A-Z].*\.$"):
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    torch.testing.assert_close(optimizer.state_dict()["state"], state, atol=0, rtol=0)


def test_complex_gradients_of_the_adamw_part_are_taken():
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = HybridAdaptiveMuon([matrix(), p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p != 1).all()


def test_refused_scalar_gradient_changes_no_matrix():
    embedding, linear = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)
    optimizer = HybridAdaptiveMuon.from_model(nn.Sequential(embedding, linear))
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    weight = linear.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'0.weight' is, got .*sparse_coo.*sparse=False"):
        optimizer.step()
    assert torch.equal(linear.weight, weight) and not optimizer.state


@pytest.mark.parametrize("dim", [2, -2, "rows", 0.5])
def test_partition_dim_must_be_a_dimension(dim):
    p = matrix()
    p.partition_dim = dim
    with pytest.raises(
        ValueError, match=r"partition_dim of parameter 0 of its group must be .*Use 0 to split the rows"
    ):
        AdaptiveMuon([p])


def test_partition_dim_of_one_process_is_a_whole_matrix():
    """As Megatron tags a parameter also where there is no tensor parallelism."""
    p, q = matrix(), matrix()
    p.partition_dim = 0
    for each in (p, q):
        AdaptiveMuon([each]).step()
    assert torch.equal(p, q)
