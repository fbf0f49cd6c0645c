# SPDX-License-Identifier: Apache-2.0
from typing import get_args

import torch
import torch.nn as nn
from absl import flags, logging
from absl.testing import absltest, parameterized

from emerging_optimizers import utils
from emerging_optimizers.orthogonalized_optimizers import moment2, muon_utils
from emerging_optimizers.orthogonalized_optimizers.adaptive_muon import AdaptiveMuon, Moment2MethodT
from emerging_optimizers.orthogonalized_optimizers.muon import get_muon_scale_factor


flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "Device to run tests on")
flags.DEFINE_integer("seed", None, "Random seed for reproducible tests")

FLAGS = flags.FLAGS
MOMENT2_METHODS = get_args(Moment2MethodT)
RATIOS = ("namo", "namo_d")


def setUpModule() -> None:
    if FLAGS.seed is not None:
        logging.info("Setting random seed to %d", FLAGS.seed)
        torch.manual_seed(FLAGS.seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(FLAGS.seed)


def random_grads(shape, steps):
    return [torch.randn(shape, device=FLAGS.device) for _ in range(steps)]


def weights_after(grads, initial, **kwargs):
    """Weights after each step of AdaptiveMuon."""
    param = nn.Parameter(initial.clone())
    optimizer = AdaptiveMuon([param], **{"fp32_matmul_prec": "highest", **kwargs})
    weights = []
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        weights.append(param.detach().clone())
    return weights


def reference_weights(
    grads, initial, *, lr, momentum, weight_decay, nesterov, moment2_method, beta2, correct_bias, clamp, decay_method
):
    """The papers' formulas in float64, without the orthogonalization, which is the optimizer's own."""
    eps, weight = 1e-8, initial.double()
    rows, columns = weight.shape
    exp_avg, second, weights = torch.zeros_like(weight), 0.0, []
    for step, grad in enumerate((grad.double() for grad in grads), start=1):
        exp_avg = momentum * exp_avg + (1 - momentum) * grad
        ahead = momentum * exp_avg + (1 - momentum) * grad if nesterov else exp_avg
        with utils.fp32_matmul_precision("highest"):
            orth = muon_utils.newton_schulz(ahead.float(), steps=5, coefficient_type="quintic").double()
        if moment2_method == "adamuon":
            second = beta2 * second + (1 - beta2) * orth**2
            scale = 1 / (second.sqrt() + eps)
        elif moment2_method == "normuon":
            mean = (orth**2).mean(dim=1 if rows >= columns else 0, keepdim=True)
            second = beta2 * second + (1 - beta2) * mean
            inverse = second.clamp_min(eps) ** -0.5
            scale = inverse * orth.norm() / (inverse * orth).norm()
        elif moment2_method == "namo":
            second = beta2 * second + (1 - beta2) * (grad**2).sum()
            scale = ahead.norm() / (second.sqrt() + eps)
        else:
            second = beta2 * second + (1 - beta2) * (grad**2).sum(dim=0)
            ratio = (ahead**2).sum(dim=0).sqrt() / (second.sqrt() + eps)
            scale = ratio.clamp(clamp * ratio.mean(), ratio.mean() / clamp)
        if correct_bias:
            scale = (
                scale
                * {
                    "adamuon": (1 - beta2**step) ** 0.5,
                    "normuon": 1.0,
                    "namo": (1 - beta2**step) ** 0.5 / (1 - momentum**step),
                    "namo_d": (1 - beta2**step) ** 0.5 / (1 - momentum**step),
                }[moment2_method]
            )
        weight = weight * (1 - lr * weight_decay * (scale if decay_method == "adaptive" else 1.0))
        weight = weight - lr * get_muon_scale_factor(rows, columns, mode="spectral") * scale * orth
        weights.append(weight)
    return weights


class AdaptiveMuonMoment2Test(parameterized.TestCase):
    @parameterized.product(
        shape=[(8, 16), (16, 8), (33, 65)],
        moment2_method=MOMENT2_METHODS,
        nesterov=[True, False],
        correct_bias=[True, False],
        decay_method=["decoupled", "adaptive"],
    )
    def test_follows_the_papers(self, shape, moment2_method, nesterov, correct_bias, decay_method) -> None:
        """Test every option against the formulas in float64."""
        if decay_method == "adaptive" and moment2_method not in RATIOS:
            self.skipTest("adaptive decay is for namo and namo_d")
        initial, grads = torch.randn(shape, device=FLAGS.device), random_grads(shape, 5)
        common = {
            "lr": 0.01,
            "momentum": 0.9,
            "weight_decay": 0.5,
            "nesterov": nesterov,
            "moment2_method": moment2_method,
            "beta2": 0.95,
            "correct_bias": correct_bias,
        }
        actual = weights_after(grads, initial, weight_decay_method=decay_method, namo_d_clamp=0.9, **common)
        expected = reference_weights(grads, initial, clamp=0.9, decay_method=decay_method, **common)
        for mine, reference in zip(actual, expected, strict=True):
            moved = (reference - initial.double()).norm()
            self.assertLess((mine.double() - reference).norm(), 1e-4 * moved)

    @parameterized.parameters(
        {"moment2_method": "adamuon", "corrected": False},
        {"moment2_method": "normuon", "corrected": False},
        {"moment2_method": "namo", "corrected": False},
        {"moment2_method": "namo_d", "corrected": True},
    )
    def test_default_of_correct_bias_is_the_methods(self, moment2_method, corrected) -> None:
        """Test that None means what the method's source does."""
        initial, grads = torch.randn(6, 9, device=FLAGS.device), random_grads((6, 9), 3)
        kwargs = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "moment2_method": moment2_method}
        default = weights_after(grads, initial, **kwargs)
        explicit = weights_after(grads, initial, correct_bias=corrected, **kwargs)
        torch.testing.assert_close(default[-1], explicit[-1], atol=0.0, rtol=0.0)

    @parameterized.parameters(*RATIOS)
    def test_constant_gradient_has_scale_one(self, moment2_method) -> None:
        """Test that without noise the corrected ratio of signal to noise is one from the first step on."""
        grad = torch.randn(8, 12, device=FLAGS.device)
        param = nn.Parameter(torch.zeros_like(grad))
        optimizer = AdaptiveMuon(
            [param],
            lr=1.0,
            momentum=0.9,
            weight_decay=0.0,
            moment2_method=moment2_method,
            correct_bias=True,
            namo_d_clamp=0.1,
            scale_mode="shape_scaling",
            fp32_matmul_prec="highest",
        )
        with utils.fp32_matmul_precision("highest"):
            orth = muon_utils.newton_schulz(grad, steps=5, coefficient_type="quintic")
        for step in range(1, 5):
            param.grad = grad.clone()
            optimizer.step()
            torch.testing.assert_close(param.detach(), -step * orth, atol=1e-4, rtol=1e-4)

    def test_clamp_of_one_gives_every_column_the_mean(self) -> None:
        """Test that with c = 1 the update keeps the direction of the orthogonalized momentum."""
        grad = torch.randn(8, 12, device=FLAGS.device) * torch.logspace(-2, 2, 12, device=FLAGS.device)
        kwargs = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "beta2": 0.9, "moment2_method": "namo_d"}
        update = weights_after([grad], torch.zeros_like(grad), namo_d_clamp=1.0, **kwargs)[0]
        with utils.fp32_matmul_precision("highest"):
            orth = muon_utils.newton_schulz(grad, steps=5, coefficient_type="quintic")
        ratios = -update / orth
        torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios), atol=0.0, rtol=1e-4)

    @parameterized.parameters(
        {"moment2_method": "adamuon", "expected": (6, 9)},
        {"moment2_method": "normuon", "expected": (1, 9)},
        {"moment2_method": "namo", "expected": (1,)},
        {"moment2_method": "namo_d", "expected": (1, 9)},
    )
    def test_state_shapes(self, moment2_method, expected) -> None:
        param = nn.Parameter(torch.randn(6, 9, device=FLAGS.device))
        param.grad = torch.randn_like(param)
        optimizer = AdaptiveMuon([param], lr=0.1, momentum=0.9, weight_decay=0.0, moment2_method=moment2_method)
        optimizer.step()
        self.assertEqual(tuple(optimizer.state[param]["moment2_buffer"].shape), expected)

    @parameterized.parameters(*MOMENT2_METHODS)
    def test_resumes_from_a_checkpoint(self, moment2_method) -> None:
        """Test that a run that is stopped and resumed walks the same path, step count included."""
        grads = random_grads((6, 9), 4)
        kwargs = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "moment2_method": moment2_method}
        kwargs |= {"correct_bias": True, "fp32_matmul_prec": "highest"}
        whole = weights_after(grads, torch.ones(6, 9, device=FLAGS.device), **kwargs)[-1]

        param = nn.Parameter(torch.ones(6, 9, device=FLAGS.device))
        optimizer = AdaptiveMuon([param], **kwargs)
        for index, grad in enumerate(grads):
            if index == 2:
                saved = optimizer.state_dict()
                optimizer = AdaptiveMuon([param], **kwargs)
                optimizer.load_state_dict(saved)
            param.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(param.detach(), whole, atol=0.0, rtol=0.0)

    def test_state_without_step_count_is_refused_with_correct_bias(self) -> None:
        """Test that a state that was saved without bias correction is not taken for a new one."""
        param = nn.Parameter(torch.ones(6, 9, device=FLAGS.device))
        kwargs = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "moment2_method": "namo"}
        optimizers = [AdaptiveMuon([param], correct_bias=correct_bias, **kwargs) for correct_bias in (False, True)]
        for first, second in (optimizers, optimizers[::-1]):
            param.grad = torch.randn_like(param)
            first.step()
            second.load_state_dict(first.state_dict())
            before = param.detach().clone()
            if first is optimizers[0]:
                with self.assertRaisesRegex(ValueError, "number of steps"):
                    second.step()
                torch.testing.assert_close(param.detach(), before, atol=0.0, rtol=0.0)
                second.state.clear()
            else:
                second.step()
                self.assertNotIn("step", second.state[param])

    def test_subclass_that_skips_init(self) -> None:
        """Test subclasses that set attributes themselves, as that of Megatron-Core's main branch does."""

        class Subclass(AdaptiveMuon):
            def __init__(self, params):
                super(AdaptiveMuon, self).__init__(
                    params,
                    0.1,
                    0.9,
                    0.0,
                    nesterov=False,
                    weight_decay_method="decoupled",
                    fp32_matmul_prec="highest",
                    scaled_orthogonalize_fn=lambda grad: grad,
                )
                self.scale_mode, self.extra_scale_factor, self.moment2_method = "spectral", 1.0, "namo"
                for group in self.param_groups:
                    group.setdefault("beta2", 0.9)
                    group.setdefault("eps", 1e-8)

        param = nn.Parameter(torch.randn(6, 9, device=FLAGS.device))
        before = param.detach().clone()
        param.grad = torch.randn_like(param)
        Subclass([param]).step()
        self.assertFalse(torch.equal(param.detach(), before))

    @parameterized.parameters(
        {"changes": {"moment2_method": "unknown"}, "error": ValueError, "message": "unknown"},
        {"changes": {"namo_d_clamp": 0.0}, "error": ValueError, "message": "namo_d_clamp"},
        {"changes": {"namo_d_clamp": 1.5}, "error": ValueError, "message": "namo_d_clamp"},
        {"changes": {"weight_decay_method": "l2"}, "error": ValueError, "message": "incompatible"},
        {
            "changes": {"weight_decay_method": "adaptive", "moment2_method": "adamuon"},
            "error": ValueError,
            "message": "adaptive",
        },
        {"changes": {"tp_mode": "blockwise"}, "error": ValueError, "message": "tp_mode"},
    )
    def test_bad_arguments_are_refused_at_construction(self, changes, error, message) -> None:
        param = nn.Parameter(torch.randn(6, 9, device=FLAGS.device))
        kwargs = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "moment2_method": "namo_d", **changes}
        with self.assertRaisesRegex(error, message):
            AdaptiveMuon([param], **kwargs)

    def test_methods_are_those_of_the_type(self) -> None:
        self.assertSetEqual(set(moment2.METHODS), set(MOMENT2_METHODS))


if __name__ == "__main__":
    absltest.main()
