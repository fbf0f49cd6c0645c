# SPDX-License-Identifier: Apache-2.0
"""How a step rounds stochastically to bfloat16: up or down by chance, so that the mean over many steps is the number itself.

The noise is no generator's. It is a hash of the step, of the parameter's place in the optimizer, and of the row and the
column in the whole matrix. So every sharding rounds alike, replicas stay the same, and a resumed run goes on as before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch

from emerging_optimizers.adaptive_muon.checks import refusal
from emerging_optimizers.adaptive_muon.kernels.usable import kernels_usable
from emerging_optimizers.adaptive_muon.noise import MULTIPLIERS, Noise, hashed
from emerging_optimizers.adaptive_muon.parameters import parameter_name
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices, local_of, offset_of
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout
from emerging_optimizers.adaptive_muon.sharding.matrices import MatrixBatch


__all__ = [
    "Purpose",
    "Rounding",
    "RoundingOptions",
    "check_rounding",
    "make_keys",
    "make_rounding",
    "noise_of",
]

# What is rounded; each has noise of its own. "decay" is a decay that is rounded before the update.
Purpose = Literal["weight", "momentum", "decay", "scalar"]
_PURPOSES: tuple[Purpose, ...] = ("weight", "momentum", "decay", "scalar")

# One for rows, one for columns: digits of pi.
_SEEDS = 0x243F6A88, 0x05A308D3
_32_BITS = 2**32 - 1


@dataclass(frozen=True, eq=False)
class Rounding:
    """How a step rounds.

    Args:
        places: The place of each parameter in the optimizer.
        weights: Whether bfloat16 weights are rounded stochastically.
        steps_on_device: Whether the step count is on the device, where no step may read it.
    """

    places: Mapping[torch.Tensor, int]
    weights: bool
    steps_on_device: bool

    def noise(
        self,
        purpose: Purpose,
        params: Sequence[torch.Tensor],
        states: Sequence[Mapping[str, torch.Tensor]],
        batch: MatrixBatch,
    ) -> Noise | None:
        """Return the noise for a batch of matrices of some parameters; None where nothing is rounded stochastically."""
        if purpose == "momentum":
            stochastic = states[0]["momentum_buffer"].dtype == torch.bfloat16
        else:
            stochastic = self.weights and params[0].dtype == torch.bfloat16
        if not stochastic:
            return None
        local = as_matrices(params[0])
        number = _PURPOSES.index(purpose)
        blocks = [0 if matrix.block is None else matrix.block + 1 for matrix in batch.matrices]
        keys = make_keys(
            [(number, self.places[params[place]], block) for place, block in zip(batch.places, blocks, strict=True)],
            [states[place]["step"] for place in batch.places],
            local.device,
            steps_on_device=self.steps_on_device,
        )
        if local.ndim > 2:
            # The members' stacks may be different parts of the whole ones.
            firsts = [matrix.first for matrix in batch.matrices]
            experts = torch.arange(max(firsts) + local.size(0), dtype=torch.int32, device=local.device)
            keys = hashed(keys[..., None] + torch.stack([experts[first:][: local.size(0)] for first in firsts]))
        own = batch.layout.own if isinstance(batch.layout, ShardedLayout) else None
        return Noise(keys) if own is None else Noise(keys, own.top, own.left)


class RoundingOptions(Protocol):
    """The options that concern rounding."""

    @property
    def stochastic_rounding(self) -> bool:
        """Whether bfloat16 weights are rounded stochastically."""

    @property
    def momentum_dtype(self) -> str:
        """The name of the momentum's dtype; one in bfloat16 is rounded stochastically."""

    @property
    def rounds_stochastically(self) -> bool:
        """Whether one or the other is."""


def make_rounding(
    param_groups: Sequence[dict[str, Any]], options: RoundingOptions, *, steps_on_device: bool
) -> Rounding | None:
    """Return how a step of an optimizer with these groups rounds; None where nothing is rounded stochastically."""
    if not options.rounds_stochastically:
        return None
    places = {p: place for place, p in enumerate(p for group in param_groups for p in group["params"])}
    return Rounding(places, options.stochastic_rounding, steps_on_device)


def check_rounding(group: dict[str, Any], options: RoundingOptions, *, scalar: bool = False) -> None:
    """Raise a ``ValueError`` if a parameter of a group, AdamW's if scalar, has a dtype that cannot be rounded as in options."""
    if not options.rounds_stochastically:
        return
    momentum_dtype = options.momentum_dtype
    for index, p in enumerate(group["params"]):
        if options.stochastic_rounding and p.dtype == torch.float16:
            raise refusal(
                f"with stochastic_rounding=True weights in 16 bit must be in bfloat16; {parameter_name(group, index)} is in",
                p.dtype,
                "Convert it to bfloat16, or pass stochastic_rounding=False.",
            )
        if not scalar and momentum_dtype != "float32" and p.dtype == torch.float64:
            raise refusal(
                f'with momentum_dtype="{momentum_dtype}" weights must not be in float64; '
                f"{parameter_name(group, index)} is in",
                p.dtype,
                'Convert it to float32, or pass momentum_dtype="float32", which is float64 for it.',
            )


def noise_of(p: torch.Tensor, place: int, step: torch.Tensor, *, capturable: bool) -> Noise:
    """Return the noise for what this process holds of a parameter of any shape, its last dimension taken for columns.

    Args:
        p: The parameter. Of a DTensor the noise is that of the shard's place in it.
        place: Its place among the parameters of its optimizer.
        step: Its step count.
        capturable: Whether no step may read the count, which is on the device. One that is there is never read.
    """
    local, device = local_of(p), local_of(p).device
    prefix, on_device = (_PURPOSES.index("scalar"), place, 0), capturable or step.device.type != "cpu"
    keys = make_keys([prefix], [step], device, steps_on_device=on_device)
    row = torch.zeros(1, dtype=torch.int32, device=device)
    for size, own, first in zip(p.shape[:-1], local.shape[:-1], offset_of(p)[:-1], strict=True):
        row = (row[:, None] * size + torch.arange(first, first + own, dtype=torch.int32, device=device)).flatten()
    return Noise(keys, 0, (*offset_of(p), 0)[p.ndim - 1] if p.ndim else 0, row)


def make_keys(
    prefixes: Sequence[tuple[int, ...]], steps: Sequence[torch.Tensor], device: torch.device, *, steps_on_device: bool
) -> torch.Tensor:
    """Return the keys of each prefix and step, int32, of shape ``(2, prefixes)``.

    Args:
        prefixes: Numbers that tell apart what is rounded.
        steps: The step count of each.
        device: Where the keys are to be.
        steps_on_device: Whether the step counts are there, and must not be read.
    """
    chains = [[_chained(seed, *prefix) for prefix in prefixes] for seed in _SEEDS]
    if steps_on_device:
        return hashed(_table(chains, device) + torch.stack([*steps]).to(torch.int32))
    counts = [int(step) for step in steps]
    return _table([[_hash(key + n) for key, n in zip(chain, counts, strict=True)] for chain in chains], device)


def _hash(x: int) -> int:
    """Return the hash of one number, 0 to 2**32 - 1."""
    x &= _32_BITS
    for bits, multiplier in zip((16, 15), MULTIPLIERS, strict=True):
        x = (x ^ (x >> bits)) * multiplier & _32_BITS
    return x ^ (x >> 15)


@lru_cache(maxsize=2**16)
def _chained(*numbers: int) -> int:
    """Return the hash of several numbers in their order."""
    key = 0
    for number in numbers:
        key = _hash(key + number)
    return key


def _table(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Return numbers from 0 to 2**32 - 1 as int32 on a device, without waiting for it."""
    signed = [[number - 2**32 if number >= 2**31 else number for number in row] for row in rows]
    if device.type == "cpu":
        return torch.tensor(signed, dtype=torch.int32)
    flat = [number for row in signed for number in row]
    if kernels_usable(device):
        from emerging_optimizers.adaptive_muon.kernels.addresses import table_of

        table = table_of(flat, device).to(torch.int32)
    else:
        table = torch.stack([torch.full((), number, dtype=torch.int32, device=device) for number in flat])
    return table.flatten()[: len(flat)].view(len(rows), -1)
