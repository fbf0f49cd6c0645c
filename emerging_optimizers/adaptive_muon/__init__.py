# SPDX-License-Identifier: Apache-2.0
from emerging_optimizers.adaptive_muon.versions import require_supported_upstream


require_supported_upstream()  # before an import that another version may not have

# isort: split

from emerging_optimizers.adaptive_muon.exchange import TensorParallelModeT
from emerging_optimizers.adaptive_muon.hybrid import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import Moment2MethodT
from emerging_optimizers.adaptive_muon.optimizer import AdaptiveMuon
from emerging_optimizers.adaptive_muon.options import WeightDecayMethodT
from emerging_optimizers.adaptive_muon.sharding.blocks import ColumnBlocks
from emerging_optimizers.adaptive_muon.sharding.layout import Layout, Piece, Split
from emerging_optimizers.registry import _OPTIMIZERS


__all__ = [
    "AdaptiveMuon",
    "ColumnBlocks",
    "HybridAdaptiveMuon",
    "Layout",
    "Moment2MethodT",
    "Piece",
    "Split",
    "TensorParallelModeT",
    "WeightDecayMethodT",
]

# Upstream's own class of this name was entered when our class imported it, and register_optimizer refuses a name
# twice.
_OPTIMIZERS["adaptive_muon"] = AdaptiveMuon
