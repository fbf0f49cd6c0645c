# SPDX-License-Identifier: Apache-2.0
"""How a batch of matrices is measured in a step: what each rank sends of its shards, and what is kept of whole matrices."""

import math
from collections.abc import Mapping, Sequence

import torch

from emerging_optimizers.adaptive_muon.diagnostics.store import VALUES, Measuring
from emerging_optimizers.adaptive_muon.exchange.measures import MAXIMA, SUMS, new_measures
from emerging_optimizers.adaptive_muon.identity import identity
from emerging_optimizers.adaptive_muon.moment2 import sum_of_squared_products, sum_of_squares, sums_of_products
from emerging_optimizers.adaptive_muon.orthogonalize.batches import as_batch, batch_size
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout
from emerging_optimizers.adaptive_muon.sharding.matrices import MatrixBatch


__all__ = ["BatchMeasures", "measures_of"]

# In measures: what is known before O, the error of O, and what belongs to the step before.
_BEFORE, _ERROR, _CARRIED = slice(0, 4), slice(4, 5), slice(5, 9)
_MINIMUM = len(SUMS) + MAXIMA.index("scale_min")
# In values: what shards know after O, and among these the update and D.
_LATE, _UPDATE, _MEAN, _LEAST, _MOST = slice(4, 8), *(VALUES.index(name) for name in VALUES[4:8])


def measures_of(
    measuring: Measuring | None,
    params: Sequence[torch.Tensor],
    batch: MatrixBatch,
    *,
    per_element: bool,
    observes_O: bool,
) -> "BatchMeasures | None":
    """Return how a batch of matrices is measured; None where it is not in this step.

    Args:
        measuring: What the step measures.
        params: Parameters.
        batch: Matrices of them.
        per_element: Whether D has an entry for every element.
        observes_O: Whether the method receives sums of squares of O.
    """
    if measuring is None:
        return None
    layout = batch.layout
    split = isinstance(layout, ShardedLayout) and layout.is_split
    # All ranks decide the same: the layout, the method and the mode are the same on them.
    late = split and (per_element or not (measuring.assembles or observes_O))
    if not (measuring.measures or (late and measuring.carries)):
        return None
    return BatchMeasures(measuring, params, batch, per_element=per_element, late=late)


class BatchMeasures:
    """Measures a batch of matrices.

    Where only the shards together know the update, which is where D has an entry per element, or O is whole on no rank,
    each rank keeps its part. The messages of the next step carry it, and the values are complete then.

    Args:
        measuring: What the step measures.
        params: Parameters.
        batch: Matrices of them.
        per_element: Whether D has an entry for every element.
        late: Whether the update's values are complete one step later.
    """

    def __init__(
        self,
        measuring: Measuring,
        params: Sequence[torch.Tensor],
        batch: MatrixBatch,
        *,
        per_element: bool,
        late: bool,
    ) -> None:
        self.measures = measuring.measures
        self.sums_O = self.measures and not (per_element or late)  # whether it needs the sums of squares of O
        self._late, self._carries, self._per_element = late, late and measuring.carries, per_element
        self._store = measuring.store
        members = [*zip(batch.matrices, batch.places, strict=True)]
        self._keys = [(identity(params[place]), matrix.block) for matrix, place in members]
        self._size = math.prod(batch.matrices[0].shape(params[batch.places[0]]))

    def begin(
        self,
        Gs: Sequence[torch.Tensor],
        M_prime: torch.Tensor,
        Ws: Sequence[torch.Tensor],
        known: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Return the partial measures of this rank's shards.

        Args:
            Gs: The gradients.
            M_prime: M', shape ``(batch, ..., rows, columns)``.
            Ws: The weights before the step.
            known: The sums of squares of "gradient" and "momentum" that the method observes.
        """
        measures = new_measures(M_prime)
        if self.measures:
            number = batch_size(M_prime.shape[1:], M_prime.device)  # large matrices are not copied into one tensor
            for start in range(0, len(Gs), number):
                members = slice(start, start + number)
                G, W = as_batch(Gs[members]), as_batch([W.detach() for W in Ws[members]])
                M = M_prime[members]
                pairs = {"gradient": (0, 0), "momentum": (1, 1), "product": (0, 1)}
                unknown = [name for name in pairs if name not in known]
                found = dict(zip(unknown, sums_of_products((G, M), [pairs[name] for name in unknown]), strict=True))
                found |= {name: sums[members].sum((-2, -1), keepdim=True) for name, sums in known.items()}
                of_W = sum_of_squares(W, (), M.dtype)
                measures[members, ..., _BEFORE] = torch.cat([*(found[name] for name in pairs), of_W], -1)
        if self._carries:
            last = self._store.awaiting.take(self._keys, lambda: _nothing(measures))
            measures[..., 0, _CARRIED] = last[..., _LATE]
            measures[..., _MINIMUM].neg_()
        return measures

    def finish(
        self,
        measures: torch.Tensor,
        O: torch.Tensor,
        D: torch.Tensor,
        local_D: torch.Tensor,
        *,
        scaled: torch.Tensor | None,
        of_O: torch.Tensor | None,
        clamped: torch.Tensor | None,
        factor: float | torch.Tensor,
    ) -> None:
        """Keep what is known of the whole matrices.

        Args:
            measures: Their measures.
            O: This rank's shards of O.
            D: The adaptive scale with bias correction: whole, unless it has an entry per element.
            local_D: D of these shards.
            scaled: What has scaled M' before, if that is instead of D.
            of_O: The sums of squares of the whole O along what D keeps, if they are known.
            clamped: The share of D's entries that a clamp has moved.
            factor: The factor of D O in the update.
        """
        if self._carries:
            self._complete(measures[..., 0, :])
        if not self.measures:
            return
        like = measures[..., 0, :1]
        if of_O is None:
            squares = sum_of_squared_products(local_D.expand_as(O), O)
        else:
            squares = (D.square() * of_O).sum((-2, -1))
        of_scale = self._of_scale(D if scaled is None else scaled, O, like)
        share = torch.zeros_like(like) if clamped is None else clamped.view(like.shape)
        rest = [torch.zeros_like(like) + value for value in (factor, self._size, self._store.step_on(like.device))]
        columns = [measures[..., 0, _BEFORE], squares.view(like.shape), *of_scale, measures[..., 0, _ERROR], share]
        values = torch.cat([*columns, *rest], -1)
        if self._late:
            self._store.awaiting.put(self._keys, values)
        else:
            self._store.put(self._keys, values, self._store.steps + 1)

    def _of_scale(self, D: torch.Tensor, O: torch.Tensor, like: torch.Tensor) -> list[torch.Tensor]:
        """Return D's mean, least and largest; of shards that only together have it, the sum instead of the mean."""
        if not D.numel():  # an empty shard
            return [torch.zeros_like(like), torch.full_like(like, torch.inf), torch.full_like(like, -torch.inf)]
        sums = self._late and self._per_element
        total = D.sum((-2, -1)) if sums else D.mean((-2, -1))
        return [each.to(like.dtype).view(like.shape) for each in (total, D.amin((-2, -1)), D.amax((-2, -1)))]

    def _complete(self, totals: torch.Tensor) -> None:
        """Complete the values of the step before, of matrices that were measured then."""
        awaiting = self._store.awaiting
        values = awaiting.take(self._keys, lambda: _nothing(totals.unsqueeze(-2))).clone()
        update, scale, least, most = totals[..., _CARRIED].unbind(-1)
        values[..., _UPDATE] = update
        if self._per_element:
            values[..., _MEAN], values[..., _LEAST], values[..., _MOST] = scale / self._size, -least, most
        had = [index for index, key in enumerate(self._keys) if key in awaiting]
        if had:
            # not values[had], which would copy the list to the device and wait for it
            found = values if len(had) == len(self._keys) else torch.stack([values[index] for index in had])
            self._store.put([self._keys[index] for index in had], found, self._store.steps)


def _nothing(measures: torch.Tensor) -> torch.Tensor:
    """Return the values of matrices that were not measured."""
    return measures.new_full((*measures.shape[:-2], len(VALUES)), torch.nan)
