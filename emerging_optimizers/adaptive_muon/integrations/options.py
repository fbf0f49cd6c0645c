# SPDX-License-Identifier: Apache-2.0
"""What a configuration file says of adaptive_muon, and the optimizer of a model made from it."""

from dataclasses import dataclass, fields
from typing import Optional

from torch import nn
from torch.optim.optimizer import ParamsT

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon


__all__ = ["AdaptiveMuonOptions"]

# Where a key's name is not that of HybridAdaptiveMuon's argument.
_RENAMED = {"eps": "scalar_eps", "moment2_eps": "eps"}


@dataclass
class AdaptiveMuonOptions:
    """The keys of a configuration file. Those that a stock AdamW has keep the meaning they have there.

    Attributes:
        moment2_method: "adamuon", "normuon", "namo" or "namo_d".
        momentum: Decay rate of the matrices' momentum, in [0, 1).
        beta2: Decay rate of the matrices' second moment, in [0, 1).
        nesterov: Whether to look ahead.
        weight_decay: Weight decay coefficient, of the AdamW part also.
        weight_decay_method: The matrices' "decoupled", "independent", "l2", "palm" or "adaptive".
        bias_correction: Whether the adaptive scale is corrected for the averages having started at zero. None: for
            "namo_d" only.
        namo_d_clamp: c in (0, 1] of "namo_d".
        moment2_eps: Small constant of the adaptive scale, > 0: AdaptiveMuon's ``eps``.
        scale_mode: "spectral", "shape_scaling" or "unit_rms_norm".
        extra_scale_factor: Further factor on the matrices' update.
        coefficient_type: Newton-Schulz coefficient set.
        num_ns_steps: Number of Newton-Schulz iterations.
        ns_algorithm: How they are computed: "auto", "gram" or "standard".
        fp32_matmul_prec: Precision of their products: "medium", "high" or "highest".
        use_syrk: Whether to use Triton kernels for symmetric products, see ``AdaptiveMuon``.
        tp_mode: How a matrix in pieces is orthogonalized: "layer_sharded", "duplicated", "distributed", "blockwise".
        max_bytes_in_flight: What a rank may send and receive at once, in bytes.
        betas: Decay rates of the AdamW part.
        eps: Small constant of the AdamW part.
        scalar_lr: Learning rate of the AdamW part. None: that of the matrices.
        scalar_weight_decay: Weight decay coefficient of the AdamW part. None: that of the matrices.
        routes: Name pattern (as in ``fnmatch``) to "adaptive_muon" or "adamw", before all other rules.
    """

    # The types are those that OmegaConf's structured configs know.
    moment2_method: str = "adamuon"
    momentum: float = 0.95
    beta2: float = 0.95
    nesterov: bool = False
    weight_decay: float = 0.01
    weight_decay_method: str = "decoupled"
    bias_correction: Optional[bool] = None  # noqa: UP045
    namo_d_clamp: float = 0.75
    moment2_eps: float = 1e-8
    scale_mode: str = "spectral"
    extra_scale_factor: float = 1.0
    coefficient_type: str = "quintic"
    num_ns_steps: int = 5
    ns_algorithm: str = "auto"
    fp32_matmul_prec: str = "medium"
    use_syrk: bool = False
    tp_mode: str = "layer_sharded"
    max_bytes_in_flight: int = 2**30
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    scalar_lr: Optional[float] = None  # noqa: UP045
    scalar_weight_decay: Optional[float] = None  # noqa: UP045
    routes: Optional[dict[str, str]] = None  # noqa: UP045

    def make_optimizer(self, model: nn.Module, params: ParamsT, lr: float) -> HybridAdaptiveMuon:
        """Makes the optimizer of a model whose parameters a framework has put into groups.

        Args:
            model: The model that owns the parameters: its modules decide where each goes.
            params: Parameters, or groups of them in HybridAdaptiveMuon's words.
            lr: Learning rate of the matrices.

        Raises:
            ValueError: As :meth:`~emerging_optimizers.adaptive_muon.HybridAdaptiveMuon.from_model`.
        """
        chosen = {field.name: getattr(self, field.name) for field in fields(AdaptiveMuonOptions)}
        arguments = {_RENAMED.get(name, name): value for name, value in chosen.items()}
        return HybridAdaptiveMuon.from_model(model, lr, params=params, **arguments)
