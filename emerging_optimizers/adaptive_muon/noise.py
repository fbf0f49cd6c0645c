# SPDX-License-Identifier: Apache-2.0
"""Numbers in bfloat16 by chance: noise that is a hash of keys, rows and columns, and how it rounds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


__all__ = ["LARGEST", "MULTIPLIERS", "Noise", "hashed", "round_into", "rounded"]

# Of the 32-bit hash with the least bias that Wellons found, https://github.com/skeeto/hash-prospector: shifts by 16, 15, 15.
MULTIPLIERS = 0x21F0AAAD, 0x735A2D97
LARGEST = torch.finfo(torch.bfloat16).max
# How many elements are rounded at once: their temporaries fit the cache of a CPU's core.
_AT_ONCE = {"cpu": 2**16}


@dataclass(frozen=True, eq=False)
class Noise:
    """The noise for a batch of matrices, or of this rank's shards of them.

    Args:
        keys: int32, of shape ``(2, batch, ...)``: for the rows and the columns of every matrix.
        top: The first row of the shard in the whole matrix.
        left: The first column.
        rows: The number of every row, where they do not follow one another.
    """

    keys: torch.Tensor
    top: int = 0
    left: int = 0
    rows: torch.Tensor | None = None

    def at(self, members: slice, rows: range, columns: int) -> torch.Tensor:
        """Return the noise for some rows of some members' shards: 0 to 65535, int32, ``(members, ..., rows, columns)``."""
        device = self.keys.device
        row = torch.arange(self.top + rows.start, self.top + rows.stop, dtype=torch.int32, device=device)
        if self.rows is not None:
            row = self.rows[rows.start : rows.stop]
        column = torch.arange(self.left, self.left + columns, dtype=torch.int32, device=device)
        of_rows, of_columns = self.keys[:, members]
        return mixed(of_rows[..., None] + row, of_columns[..., None] + column)


def round_into(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor], noise: Noise | None) -> None:
    """Round values into tensors of one shape in place: stochastically with noise, which bfloat16 takes, else to nearest.

    Args:
        tensors: Shape ``(..., rows, columns)``.
        values: In float32 where there is noise. One that is the tensor itself is not rounded.
        noise: Of the batch that the tensors are.
    """
    if noise is None:
        for tensor, value in zip(tensors, values, strict=True):
            if tensor is not value:
                tensor.copy_(value)
        return
    *lead, rows, columns = values[0].shape
    most = _AT_ONCE.get(values[0].device.type, 2**24)
    height = max(1, most // max(1, columns * torch.Size(lead).numel()))
    members = max(1, most // max(1, values[0].numel()))
    for first in range(0, len(values), members):
        chosen = slice(first, min(first + members, len(values)))
        for top in range(0, rows, height):
            part = range(top, min(top + height, rows))
            cut = (..., slice(part.start, part.stop), slice(None))
            result = rounded(torch.stack([value[cut] for value in values[chosen]]), noise.at(chosen, part, columns))
            torch._foreach_copy_([tensor[cut] for tensor in tensors[chosen]], [*result.unbind(0)])


def rounded(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return float32 values rounded to neighbors in bfloat16, by noise from 0 to 65535, which is overwritten.

    The upper neighbor is as likely as the value is near to it. What bfloat16 has, infinities and NaN stay as they are, and
    nothing is rounded beyond the largest finite number.
    """
    noise.mul_(values.abs() < LARGEST)
    # bfloat16 is the upper half of float32; what is carried out of the lower half goes to the next in magnitude.
    bits = noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16))
    return torch.where(values.isnan(), values, bits.view(torch.float32))


def mixed(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return 16 random bits, as int32, for each pair of a row's and a column's number ``(..., rows)``, ``(..., columns)``."""
    x = hashed(rows)[..., :, None] + hashed(columns)[..., None, :]
    # Only the upper half is taken, which the last shift of the hash would not change much.
    return _shifted(_stirred(x), 16)


def hashed(x: torch.Tensor) -> torch.Tensor:
    """Return the hash of int32 numbers; no two have the same."""
    x = _stirred(x.clone())
    return x.bitwise_xor_(_shifted(x, 15))


def _stirred(x: torch.Tensor) -> torch.Tensor:
    """Return the hash without its last shift, in place."""
    for bits, multiplier in zip((16, 15), MULTIPLIERS, strict=True):
        x.bitwise_xor_(_shifted(x, bits)).mul_(multiplier)
    return x


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int32 numbers shifted to the right as if they had no sign."""
    return (x >> bits).bitwise_and_(2 ** (32 - bits) - 1)
