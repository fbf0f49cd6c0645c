# SPDX-License-Identifier: Apache-2.0
"""The modes of torch in which a step runs, whatever modes are around it."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from emerging_optimizers.adaptive_muon.checks import require


__all__ = ["check_capture", "loss_of", "plain_modes"]


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """Return the loss of a step's closure, evaluated with gradients enabled; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@contextmanager
def plain_modes(params: Collection[torch.Tensor]) -> Iterator[None]:
    """Leave autocast, inference mode and gradients for the time of a step of these parameters.

    Autocast would round the products of a step, and state made in inference mode could not be updated outside of it.
    Parameters that are inference tensors themselves can only be updated in inference mode, which then stays.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.no_grad())
        if torch.is_inference_mode_enabled() and not any(p.is_inference() for p in params):
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())  # inference mode's own setting went with it
        for kind in {p.device.type for p in params}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield


def check_capture(
    param_groups: Iterable[dict[str, Any]], states: Mapping[torch.Tensor, dict[str, Any]], capturable: bool
) -> None:
    """Raise a ``ValueError`` in the capture of a CUDA graph whose replays would not be steps.

    They would keep the step count and the rate of now for good, or make new state each time. An optimizer that has loaded
    its state and not stepped would also compile its kernels and copy indices from the host, which no capture may do.

    Args:
        param_groups: The optimizer's groups.
        states: The states of their parameters; empty if the optimizer has not stepped.
        capturable: Whether steps may be captured.
    """
    params = [p for group in param_groups for p in group["params"]]
    if not (any(p.is_cuda for p in params) and torch.cuda.is_current_stream_capturing()):
        return
    require(
        capturable,
        "capturable must be True for a step that is captured in a CUDA graph",
        capturable,
        "Pass capturable=True, and lr as a tensor on the GPU if it changes.",
    )
    new = [tuple(p.shape) for p in params if p.grad is not None and not states.get(p)]
    require(
        not new,
        "no parameter must make its first step when a CUDA graph captures it",
        new,
        "Make one step with their gradients before the capture.",
    )
