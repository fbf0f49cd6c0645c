# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core: AdaptiveMuon as Megatron's ``adaptive_muon``."""

from emerging_optimizers.adaptive_muon.integrations.megatron.arguments import add_adaptive_muon_args
from emerging_optimizers.adaptive_muon.integrations.megatron.optimizer import TensorParallelAdaptiveMuon, register


__all__ = ["TensorParallelAdaptiveMuon", "add_adaptive_muon_args", "register"]
