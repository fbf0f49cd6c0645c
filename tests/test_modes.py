# SPDX-License-Identifier: Apache-2.0
"""A step is the same whatever modes of torch are around it, and leaves them as it found them."""

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, get_args

import pytest
import torch
from side_by_side import each_method, legal, normal
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.options import WeightDecayMethodT
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NSAlgorithmT
from emerging_optimizers.adaptive_muon.orthogonalize.precision import matmul_precision


SHAPES = [(40, 24), (24, 40), (24, 40), (200, 420), (7,)]


@contextmanager
def set_for_a_while(set_to: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


def set_default_device(device: str | None) -> None:
    torch.set_default_device(device)
    if device is None:  # torch 2.9 and older leave a None there, which torch.get_default_device() stumbles over
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)


def deterministic() -> AbstractContextManager[None]:
    return set_for_a_while(torch.use_deterministic_algorithms, True, False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "a default device": lambda: torch.device("meta"),
    "the default device, set": lambda: set_for_a_while(set_default_device, "meta", None),
    "default dtype float64": lambda: set_for_a_while(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype float16": lambda: set_for_a_while(torch.set_default_dtype, torch.float16, torch.float32),
    "deterministic": deterministic,
    "anomaly detection": torch.autograd.detect_anomaly,
    "precision high": lambda: set_for_a_while(torch.set_float32_matmul_precision, "high", "highest"),
    "precision medium": lambda: set_for_a_while(torch.set_float32_matmul_precision, "medium", "highest"),
}


def trained(mode: Callable[[], AbstractContextManager[Any]], **options: Any) -> tuple[list[torch.Tensor], Any]:
    """Weights and state after steps inside a mode, the last one outside again."""
    params = [nn.Parameter(normal(shape, i)) for i, shape in enumerate(SHAPES)]
    params[0].muon_blocks = (16, 16, 8)
    if options.get("capturable"):  # torch's AdamW is not on a CPU
        optimizer: Any = AdaptiveMuon(params[:-1], lr=0.05, **options)
    else:
        optimizer = HybridAdaptiveMuon(params, lr=0.05, **options)
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = normal(p.shape, 10 * step + i)
        with mode() if step < 3 else nullcontext():
            optimizer.step()
    return [p.detach() for p in params], optimizer.state_dict()["state"]


def adamw_steps(mode: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Whether torch's AdamW can make a step inside a mode."""
    p = nn.Parameter(torch.ones(3))
    p.grad, optimizer = torch.ones(3), torch.optim.AdamW([p])
    try:
        with mode():
            optimizer.step()
    except RuntimeError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"moment2_method": "adamuon", "ns_algorithm": "standard", "fp32_matmul_prec": "highest"},
        {"moment2_method": "normuon", "ns_algorithm": "gram", "fp32_matmul_prec": "high", "nesterov": True},
        {"moment2_method": "namo", "weight_decay_method": "adaptive", "bias_correction": True},
        {"moment2_method": "namo_d", "fp32_matmul_prec": "highest", "capturable": True},
    ],
    ids=lambda options: options["moment2_method"],
)
def test_a_step_is_the_same_inside_a_mode(mode: str, options: dict[str, Any]) -> None:
    """Bit for bit, weights and state, whose dtypes and devices are the same too."""
    if "default device" in mode and not options.get("capturable") and not adamw_steps(MODES[mode]):
        pytest.skip("torch 2.9's AdamW, and older ones', count their steps on the default device")
    weights, state = trained(nullcontext, **options)
    inside, state_inside = trained(MODES[mode], **options)
    assert all(map(torch.equal, weights, inside))
    if mode == "default dtype float64":  # torch's AdamW counts in the default dtype
        for each in state_inside.values():
            each.update({"step": each["step"].float()} if "exp_avg" in each else {})
    torch.testing.assert_close(state_inside, state, atol=0, rtol=0)
    assert not any(value.is_inference() for each in state_inside.values() for value in each.values())


def test_parameters_made_in_inference_mode_are_updated_there() -> None:
    with torch.inference_mode():
        p = nn.Parameter(normal((4, 6)))
        p.grad = normal((4, 6), 1)
        AdaptiveMuon([p]).step()
        assert not torch.equal(p, normal((4, 6)))


def test_state_made_in_inference_mode_goes_on_outside() -> None:
    """Also of a parameter that is updated beside one that is an inference tensor."""
    p = nn.Parameter(normal((4, 6)))
    with torch.inference_mode():
        q = nn.Parameter(normal((4, 6)))
        for each in (p, q):
            each.grad = normal((4, 6), 1)
        AdaptiveMuon([q]).step()
        optimizer = AdaptiveMuon([p, q])
        optimizer.step()
    q.grad = None
    optimizer.step()
    assert not torch.equal(p, normal((4, 6)))


# Torch's precision, set in ways that contradict each other or not.
SETTINGS = [
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'; torch.backends.mkldnn.set_flags(_fp32_precision='tf32')",
    "torch.backends.cudnn.fp32_precision = 'ieee'",
    "torch.backends.cudnn.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.set_flags(_fp32_precision='ieee')",
    "torch.backends.mkldnn.set_flags(_fp32_precision='none'); torch.backends.cudnn.fp32_precision = 'none'",
]
PRECISION_TEST = """
import os, sys, torch, traceback, warnings
torch.set_num_threads(1)
from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.orthogonalize.precision import matmul_precision
warnings.simplefilter("ignore")
keys = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]
def read():
    try: old = torch.get_float32_matmul_precision()
    except RuntimeError: old = "contradicted"
    return old, [torch._C._get_fp32_precision_getter(*key) for key in [("generic", "all"), *keys]]
def all_settings():  # also what each follows: in a child, where it can be tried
    seen, (end, start) = [read()], os.pipe()
    child = os.fork()
    if not child:
        for general in ("ieee", "tf32", "none"):
            torch.backends.fp32_precision = general
            seen.append(read())
            for backend in ("cuda", "mkldnn"):
                for value in ("ieee", "tf32", "none"):
                    torch._C._set_fp32_precision_setter(backend, "all", value)
                    seen.append(read())
        os.write(start, repr(seen).encode())
        os._exit(0)
    os.waitpid(child, 0)
    seen = os.read(end, 65536).decode()
    os.close(end), os.close(start)
    return seen
def weights(precision, algorithm):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(120, 200))
    optimizer = AdaptiveMuon([p], lr=0.1, moment2_method="namo", fp32_matmul_prec=precision, ns_algorithm=algorithm)
    for _ in range(2):
        p.grad = torch.randn(120, 200)
        optimizer.step()
    return p.detach()
cases = [(p, a) for p in ("highest", "high", "medium") for a in ("auto", "gram", "standard")]
plain = [weights(*case) for case in cases]
def check(line):
    exec(line)
    before = all_settings()
    for case, expected in zip(cases, plain):
        assert torch.equal(weights(*case), expected), (line, case)
        assert all_settings() == before, (line, case, all_settings(), before)
    for wanted in ("highest", "high", "medium"):
        with matmul_precision(wanted):
            assert torch.get_float32_matmul_precision() == wanted
        assert all_settings() == before, (line, wanted)
for line in sys.argv[1:]:  # each by itself, in a process that has nothing set
    child = os.fork()
    if not child:
        try:
            check(line)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, line
for line in sys.argv[1:]:  # one after the other
    check(line)
"""


@pytest.mark.skipif(not hasattr(torch._C, "_get_fp32_precision_getter"), reason="torch has one set of switches only")
def test_precision_settings_change_nothing_and_stay() -> None:
    """By torch's older and newer switches: same bits, and the user's settings kept."""
    done = subprocess.run(
        [sys.executable, "-c", PRECISION_TEST, *SETTINGS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_users_function_is_called_in_the_precision_set_now() -> None:
    seen = []

    class Own(AdaptiveMuon):
        def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            seen.append(torch.get_float32_matmul_precision())
            return super().orthogonalize(p, grad, **kwargs)

    p = nn.Parameter(normal((4, 6)))
    p.grad = normal((4, 6), 1)
    optimizer = Own([p], fp32_matmul_prec="high")
    optimizer.step()
    optimizer.fp32_matmul_prec = "medium"
    optimizer.step()
    plain = AdaptiveMuon([p], fp32_matmul_prec="medium")
    plain.scaled_orthogonalize_fn = lambda x: seen.append(torch.get_float32_matmul_precision()) or x
    plain.step()
    assert seen == ["high", "medium", "medium"] and torch.get_float32_matmul_precision() == "highest"


def test_a_precision_that_is_set_later_holds() -> None:
    """As for upstream's class, which reads it in every step."""
    weights = []
    for at_first in ("highest", "medium"):
        p = nn.Parameter(normal((40, 60)))
        p.grad = normal((40, 60), 1)
        optimizer = AdaptiveMuon([p], lr=0.1, ns_algorithm="standard", fp32_matmul_prec=at_first)
        optimizer.fp32_matmul_prec = "medium"
        optimizer.step()
        weights.append(p.detach())
    assert torch.equal(*weights)


def test_threads_that_step_side_by_side_leave_the_precision_as_it_was() -> None:
    """In precisions of their own, and every one goes its own way to the last bit."""
    precisions, results = ("highest", "high", "medium", "medium"), {}

    def train(index: int) -> None:
        options = {"fp32_matmul_prec": precisions[index], "ns_algorithm": "standard", "moment2_method": "namo"}
        results[index] = trained(nullcontext, **options)[0]

    def together(indices: list[int]) -> dict[int, list[torch.Tensor]]:
        results.clear()
        threads = [threading.Thread(target=train, args=[index]) for index in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return dict(results)

    alone = {index: together([index])[index] for index in range(4)}
    for _ in range(5):
        for index, weights in together([*range(4)]).items():
            assert all(map(torch.equal, weights, alone[index]))
        assert torch.get_float32_matmul_precision() == "highest"
        # torch 2.6 has the old switch alone.
        assert getattr(torch.backends.cuda.matmul, "fp32_precision", "none") in ("none", "ieee")


def test_threads_that_need_the_same_precision_have_it_together() -> None:
    """As ranks that are threads must, which wait for each other in a step's all-reduces; each may need another inside."""
    both = threading.Barrier(2, timeout=60)
    seen = []

    def wait_inside() -> None:
        with matmul_precision("medium"):
            both.wait()
            with matmul_precision("highest"):
                both.wait()
                seen.append(torch.get_float32_matmul_precision())
            both.wait()
            seen.append(torch.get_float32_matmul_precision())

    threads = [threading.Thread(target=wait_inside) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == ["highest"] * 2 + ["medium"] * 2 and torch.get_float32_matmul_precision() == "highest"


def test_an_error_inside_leaves_the_precision_as_it_was() -> None:
    with pytest.raises(RuntimeError, match="stop"), matmul_precision("medium"):
        raise RuntimeError("stop")
    assert torch.get_float32_matmul_precision() == "highest"


# ------------------------------------------------------------------------------------------------ a compiled step


BACKENDS = ["eager", "inductor"]


def weights_if_moved(model: nn.Module, before: nn.Module) -> list[torch.Tensor]:
    """The weights of a model, all of which must have changed."""
    assert not any(map(torch.equal, model.parameters(), before.parameters()))
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [AdaptiveMuon, HybridAdaptiveMuon])
def test_a_compiled_step_is_the_step(make: Any, backend: str) -> None:
    """Compiled by itself, or in a compiled function that makes the gradients too."""

    def train(how: str) -> list[torch.Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))
        optimizer = make(model.parameters(), lr=1e-2, moment2_method="namo_d")
        step = torch.compile(optimizer.step, backend=backend) if how == "step" else optimizer.step

        def one(x: torch.Tensor) -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            step()

        one = torch.compile(one, backend=backend) if how == "train step" else one
        before = copy.deepcopy(model)
        for index in range(4):
            one(normal((4, 8), index))
        return weights_if_moved(model, before)

    plain = train("plain")
    for how in ("step", "train step"):
        for compiled, expected in zip(train(how), plain, strict=True):
            torch.testing.assert_close(compiled, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("make", [AdaptiveMuon, HybridAdaptiveMuon])
def test_no_graph_of_a_step_is_compiled(make: Any) -> None:
    """Each set of matrices that has gradients would have one of its own."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    params = [nn.Parameter(normal((4, 6), 0)), nn.Parameter(normal((5, 6), 1)), nn.Parameter(normal((6,), 2))]
    optimizer = make([p for p in params if p.ndim == 2 or make is HybridAdaptiveMuon])
    step = torch.compile(optimizer.step, backend="eager")
    for count in (1, 3):
        for p in params[:count]:
            p.grad = torch.ones_like(p)
        step()
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [AdaptiveMuon, HybridAdaptiveMuon])
def test_a_compiled_lightning_module_steps_in_manual_optimization(make: Any, backend: str) -> None:
    """Where the module's own training step, which is compiled, calls backward and the optimizer."""
    pl = pytest.importorskip("lightning.pytorch")
    steps = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.layers = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))

        def training_step(self, batch: torch.Tensor, index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.layers(batch).square().mean())
            optimizer.step()
            steps.append(index)

        def configure_optimizers(self) -> Any:
            return make(self.parameters(), lr=1e-2, moment2_method="namo_d")

    def train(compiled: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        module = Module()
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, barebones=True)
        loader = torch.utils.data.DataLoader(normal((16, 8), 1), batch_size=4)
        steps.clear()
        before = copy.deepcopy(module)
        trainer.fit(torch.compile(module, backend=backend) if compiled else module, loader)
        assert len(steps) == 4
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) is compiled
        return weights_if_moved(module, before)

    for compiled, expected in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(compiled, expected, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- making the state

DECAYS = ["decoupled", "independent", "palm", "adaptive", "cautious"]


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("biases", [False, True])
def test_making_the_state_moves_and_counts_nothing(decay: str, capturable: bool, lr: Any, biases: bool) -> None:
    """Torch's checkpoints do it by a step at rate zero with gradients of zero."""
    if biases and (capturable or isinstance(lr, torch.Tensor)):
        pytest.skip("torch's AdamW is not capturable on a CPU")
    model = nn.Sequential(nn.Linear(8, 6, bias=biases), nn.Linear(6, 4, bias=biases))
    options = {"weight_decay_method": decay, "moment2_method": "namo", "bias_correction": True}
    make = HybridAdaptiveMuon if biases else AdaptiveMuon
    optimizer = make(model.parameters(), lr=lr, weight_decay=0.5, capturable=capturable, **options)
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), atol=0, rtol=0)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    assert all("momentum_buffer" in optimizer.state[p] for p in matrices)
    assert all(not value.any() for p in matrices for value in optimizer.state[p].values())


PAIRS = [
    (method, decay)
    for method in METHODS
    for decay in get_args(WeightDecayMethodT)
    if legal(method, {"weight_decay_method": decay})
]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("method", "decay"), PAIRS)
def test_a_rate_and_gradients_of_zero_make_the_state_only(method: str, decay: str, capturable: bool) -> None:
    """Once: with the state there, the same is a step."""
    options = {"weight_decay_method": decay, "moment2_method": method, "bias_correction": True}
    p, fused = nn.Parameter(normal((6, 4))), nn.Parameter(normal((6, 4), 1))
    fused.muon_blocks = (1, 2)
    optimizer = AdaptiveMuon([p, fused], lr=0.0, weight_decay=0.5, capturable=capturable, **options)
    before = [p.detach().clone(), fused.detach().clone()]
    for each in (p, fused):
        each.grad = torch.zeros_like(each)
    optimizer.step()
    assert torch.equal(p, before[0]) and torch.equal(fused, before[1])
    assert all(optimizer.state[each]["momentum_buffer"].shape == (6, 4) for each in (p, fused))
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())
    optimizer.step()
    assert all(state["step"] == 1 for state in optimizer.state.values())
    assert torch.equal(p, before[0] * (0.5 if decay == "independent" else 1))


def test_a_zero_gradient_at_a_rate_above_zero_is_a_step() -> None:
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.zeros(4, 6)
    optimizer = AdaptiveMuon([p], lr=0.5, weight_decay=0.5, moment2_method="namo_d")
    optimizer.step()
    assert torch.equal(p, torch.full((4, 6), 0.75)) and optimizer.state[p]["step"] == 1


# ------------------------------------------------------------------------------------------------- state and pickles


class Wrapped(torch.Tensor):
    """A weight that is a subclass of Tensor and makes new ones of its kind, as those of float8 training."""


@each_method
def test_state_is_of_plain_tensors(method: str) -> None:
    p = nn.Parameter(normal((4, 6)).as_subclass(Wrapped))
    plain = nn.Parameter(normal((4, 6)))
    for each in (p, plain):
        each.grad = normal((4, 6), 1)
        optimizer = AdaptiveMuon([each], moment2_method=method)
        optimizer.step()
        assert {type(value) for value in optimizer.state[each].values()} == {torch.Tensor}
    assert torch.equal(p.detach().as_subclass(torch.Tensor), plain)


@each_method
def test_a_loaded_subclass_is_plain_again(method: str) -> None:
    p = nn.Parameter(normal((4, 6)))
    p.grad = normal((4, 6), 1)
    optimizer = AdaptiveMuon([p], moment2_method=method)
    optimizer.step()
    state = optimizer.state_dict()
    for key, value in state["state"][0].items():
        state["state"][0][key] = value.as_subclass(Wrapped)
    optimizer.load_state_dict(state)
    assert {type(value) for value in optimizer.state[p].values()} == {torch.Tensor}


def test_a_gradient_of_several_tensors_is_refused() -> None:
    """Torch would apply an average in place to the plain state once for each."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    p = nn.Parameter(normal((4, 6)))
    p.grad = two_tensor.TwoTensor(normal((4, 6), 1), normal((4, 6), 1))
    optimizer = AdaptiveMuon([("w", p)])
    with pytest.raises(ValueError, match=r"one tensor each; that of parameter 'w' is, got 'TwoTensor'. Convert"):
        optimizer.step()
    assert torch.equal(p, normal((4, 6))) and not optimizer.state[p]


def test_a_weight_of_several_tensors_is_refused() -> None:
    """Such as one that is quantized in training: it has no update in place. AdamW gets it."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    p = nn.Parameter(two_tensor.TwoTensor(normal((4, 6), 1), normal((4, 6), 1)))
    with pytest.raises(
        ValueError, match=r"each in one tensor; parameter 'w' is, got 'TwoTensor of several tensors'. Use"
    ):
        AdaptiveMuon([("w", p)])
    text = HybridAdaptiveMuon([("w", p)]).describe()
    assert "AdamW: 1 parameters" in text and "TwoTensor of several tensors, which AdaptiveMuon does not take" in text


def a_layout(p: torch.Tensor) -> None:
    return None


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("name", ["layout_fn", "blocks_fn", "scaled_orthogonalize_fn", "pre_weight_update_fn_inplace"])
def test_pickle_names_the_option_that_it_cannot_carry(name: str, hybrid: bool) -> None:
    """Of a function of a module it carries the name; a copy carries any function."""

    def made(function: Any) -> Any:
        options = {name: function} if name.endswith("s_fn") or name == "layout_fn" else {}
        p = nn.Parameter(normal((4, 6)))
        optimizer = HybridAdaptiveMuon([p], **options) if hybrid else AdaptiveMuon([p], **options)
        if not options:
            setattr(optimizer._muon if hybrid else optimizer, name, function)
        return optimizer

    pickle.loads(pickle.dumps(made(a_layout)))
    nameless = made(lambda *_: None)
    copy.deepcopy(nameless)
    with pytest.raises(pickle.PicklingError, match=rf"{name} must be.*<lambda>.*state_dict\(\)"):
        pickle.dumps(nameless)


# -------------------------------------------------------------------------------------------- parameters that went


@pytest.mark.parametrize("hybrid", [False, True])
def test_torch_can_swap_what_a_parameter_is(hybrid: bool) -> None:
    """Which it refuses where something refers to the parameter weakly."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    params = [p for p in model.parameters() if p.ndim == 2]
    optimizer = HybridAdaptiveMuon.from_model(model) if hybrid else AdaptiveMuon(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with set_for_a_while(torch.__future__.set_swap_module_params_on_conversion, True, False):
            model.zero_grad()
            model.to(torch.float64).to(torch.float32)


# ------------------------------------------------------------------------------------------------------ tiny gradients


@pytest.mark.parametrize("scale", [1e-6, 1e-12], ids=str)
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("algorithm", get_args(NSAlgorithmT))
@each_method
def test_the_size_of_the_gradients_does_not_matter(method: str, algorithm: Any, precision: Any, scale: float) -> None:
    """With eps well below: a loss spike that was clipped must not stall a layer. 1e-12 is not a power of two, so that
    rounding differs, and adamuon divides by small entries of O."""

    def walked(scale: float) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(24, 40))
        options = {"moment2_method": method, "ns_algorithm": algorithm, "fp32_matmul_prec": precision}
        eps = {"adamuon": 1e-2, "normuon": 1e-8}.get(method, 1e-30)  # at 1e-2 no element near zero turns its sign
        optimizer = AdaptiveMuon([p], lr=1.0, weight_decay=0.0, eps=eps, **options)
        for step in range(3):
            p.grad = normal((24, 40), step) * scale
            optimizer.step()
        return p.detach()

    rounding = {"highest": 1e-3 if method == "adamuon" else 1e-4, "medium": 0.3 if method == "adamuon" else 0.05}
    difference = (walked(scale) - walked(1.0)).norm() / walked(1.0).norm()
    assert difference <= rounding[precision]


@pytest.mark.parametrize("make", [AdaptiveMuon, HybridAdaptiveMuon])
def test_a_graph_takes_only_what_can_be_captured(make: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything changes: a replay would keep the step count and the rate of the capture, or make new state."""

    class OnGpu(torch.nn.Parameter):
        is_cuda = True

    p = OnGpu(torch.randn(4, 6))
    before, captures = p.detach().clone(), [True]
    p.grad = torch.randn(4, 6)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures[-1])
    for capturable, match in ((False, "Pass capturable=True"), (True, r"got \[\(4, 6\)\]. Make one step")):
        optimizer = make([p], lr=0.1, capturable=capturable)
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        assert torch.equal(p, before) and not optimizer.state.get(p)
    captures.append(False)
    optimizer.step()
    before = p.detach().clone()
    captures.append(True)
    optimizer.step()
    assert not torch.equal(p, before)


def test_a_graph_refuses_new_state_of_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's AdamW would make it in the graph, and every replay would begin with zeros."""

    class OnGpu(torch.nn.Parameter):
        is_cuda = True

    params = [OnGpu(torch.randn(4, 6)), OnGpu(torch.randn(4))]
    optimizer = HybridAdaptiveMuon(params, lr=0.1, capturable=True)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn(p.shape)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.state[params[0]] = {"momentum_buffer": torch.zeros(4, 6)}
    with pytest.raises(ValueError, match=r"got \[\(4,\)\]. Make one step"):
        optimizer.step()
    assert all(map(torch.equal, params, before)) and not optimizer.state.get(params[1])


@pytest.mark.parametrize("make", [AdaptiveMuon, HybridAdaptiveMuon])
def test_a_capture_of_a_first_step_is_refused(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an optimizer that has loaded its state too. Here the parameters only say that they are on a GPU."""

    class OnGpu(nn.Parameter):
        is_cuda = True

    def made() -> tuple[nn.Parameter, Any]:
        p = OnGpu(torch.ones(4, 3))
        p.grad = torch.ones(4, 3)
        return p, make([p], capturable=True)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _, trained = made()
    trained.step()
    state = trained.state_dict()
    for loaded in (None, state):
        p, optimizer = made()
        if loaded is not None:
            optimizer.load_state_dict(loaded)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(ValueError, match=r"must make its first step .* got \[\(4, 3\)\]. Make one step"):
            optimizer.step()
        assert torch.equal(p, torch.ones(4, 3))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        optimizer.step()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimizer.step()
