# SPDX-License-Identifier: Apache-2.0
"""Parameters of three and more dimensions that are matrices: stacks of experts, and the weights of convolutions."""

from dataclasses import dataclass

from torch import nn

from emerging_optimizers.adaptive_muon.options import SplitOptions
from emerging_optimizers.adaptive_muon.parameters import FormT, is_matrix
from emerging_optimizers.adaptive_muon.routing.convolutions import in_convolution
from emerging_optimizers.adaptive_muon.routing.experts import in_experts


__all__ = ["EXPERTS", "FLATTENS", "Form", "find_forms"]

# The reason of a stack of experts that no switch asks for.
EXPERTS = "3-D, a stack of experts; stacked_experts=True makes each a matrix"
# The end of that of a convolution.
FLATTENS = "flatten_conv=True takes the convolution for one"


@dataclass(frozen=True)
class Form:
    """What a parameter of three or more dimensions is, where a switch takes it for a matrix or for several.

    Args:
        kind: "stack" of matrices, or one that is "flattened" to (out, all the rest).
        shape: The outputs and the inputs of a matrix.
        transposed: Whether the matrices of a stack are stored as (in, out).
    """

    kind: FormT
    shape: tuple[int, int]
    transposed: bool = False

    @property
    def text(self) -> str:
        """What it is, for a person."""
        rows, columns = self.shape
        return "stack of hidden matrices" if self.kind == "stack" else f"convolution, a matrix of {rows} x {columns}"


def find_forms(model: nn.Module, switches: SplitOptions) -> tuple[dict[nn.Parameter, Form], dict[nn.Parameter, str]]:
    """Return the forms of the parameters that a switch is for, and why others that are recognized are no matrices."""
    forms: dict[nn.Parameter, Form] = {}
    reasons: dict[nn.Parameter, str] = {}
    for module in model.modules():
        for p, shape, transposed in in_experts(module):
            if switches.stacked_experts:
                forms[p] = Form("stack", shape, transposed)
            else:
                reasons[p] = EXPERTS
        for p, shape, reason in in_convolution(module):
            if not switches.flatten_conv or reason:
                reasons[p] = f"{p.ndim}-D, not a matrix; {reason or FLATTENS}"
            elif not is_matrix(p):  # tagged muon_stacked, which decides
                forms[p] = Form("flattened", shape)
    return forms, reasons
