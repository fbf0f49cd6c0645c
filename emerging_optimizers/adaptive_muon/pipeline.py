# SPDX-License-Identifier: Apache-2.0
"""How the rounds of a step follow one another: while one is worked on, messages of its neighbors are on their way."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange import Exchange, LocalExchange
from emerging_optimizers.adaptive_muon.exchange.plan import Round
from emerging_optimizers.adaptive_muon.planner import Planner
from emerging_optimizers.adaptive_muon.sharding.comparison import AllChanged, Flag
from emerging_optimizers.adaptive_muon.sharding.dtensor import local_of
from emerging_optimizers.adaptive_muon.update import BatchUpdate, StepRule


__all__ = ["RoundUpdate", "knock", "pipelined"]


class RoundUpdate:
    """A round that has begun: the momentum is averaged, and shards are on their way if they are sent.

    Args:
        one: The round.
        flag: What its first message carries beside; or None.
        rule: What a step does.
        param_groups: The optimizer's parameter groups.
        params: The parameters of the plan, by their places in it.
        gradients: Their gradients; of DTensors what this rank holds.
        states: Their states.
    """

    def __init__(
        self,
        one: Round,
        flag: Flag | None,
        rule: StepRule,
        param_groups: Sequence[dict[str, Any]],
        params: Sequence[torch.Tensor],
        gradients: Mapping[torch.Tensor, torch.Tensor],
        states: Mapping[torch.Tensor, dict[str, torch.Tensor]],
    ) -> None:
        self._updates = []
        for batch in one.batches:
            members, group = [params[i] for i in batch.members], param_groups[batch.group]
            Gs, of_members = [gradients[p] for p in members], [states[p] for p in members]
            self._updates.append(BatchUpdate(rule, group, members, Gs, of_members, batch.matrices))
        shards = [of_batch for update in self._updates for of_batch in update.begin()]
        if one.process_group is None:
            self.exchange: Exchange = LocalExchange(shards)
        else:
            assert one.mode is not None
            self.exchange = one.mode.exchange(one.process_group, shards, flag)

    def finish(self) -> None:
        """Wait for the results; average V, and decay and update W."""
        results = iter(self.exchange.results())
        for update in self._updates:
            update.finish([next(results) for _ in update.batches])


class _Rehearsal(RoundUpdate):
    """A round that leaves V and W as they are."""

    @override
    def finish(self) -> None:
        self.exchange.results()


def pipelined(
    rounds: Sequence[Round], begun: Callable[[Round, Flag | None], RoundUpdate], flag: Flag | None = None
) -> None:
    """Take rounds of the same process group through all their phases.

    While a round is orthogonalized, the shards of the next one and the results of the one before are on their way. No
    other message is then: each is released before the next of its kind is made. All ranks send in this order.

    Args:
        rounds: The rounds.
        begun: Begins a round.
        flag: What the first message carries beside.
    """
    following: RoundUpdate | None = None
    previous: RoundUpdate | None = None
    for one, after in zip_longest(rounds, rounds[1:]):
        current, following = following or begun(one, flag), None
        flag = None
        current.exchange.assemble()
        if after is not None and current.exchange.sends_shards:
            following = begun(after, None)
        if previous is not None:
            previous.exchange.relay()
        current.exchange.orthogonalize()
        if previous is not None:
            previous.finish()
        current.exchange.send_results()
        previous = current
        if not current.exchange.sends_results:
            current.finish()
            previous = None
        del current  # else what it holds would be kept until the next has begun
    if previous is not None:
        previous.exchange.relay()
        previous.finish()


def knock(process_group: ProcessGroup, planner: Planner, rule: StepRule, param_groups: list[dict[str, Any]]) -> bool:
    """Take part in the others' step of a process group, with zeros and a raised flag: see :mod:`.sharding.comparison`.

    Nothing of this rank changes.

    Args:
        process_group: The process group, in which this rank's gradients have changed.
        planner: The planner of the steps.
        rule: What a step does.
        param_groups: The optimizer's parameter groups.

    Returns:
        Whether the gradients of all ranks have changed in the same way. If not, the others have made a wrong step, and
        will find out at the beginning of their next one. This rank will, too.

    Raises:
        ValueError: If ranks have gradients of different parameters, on all ranks.
    """
    sharding, state_format = planner.state_format.sharding, planner.state_format
    plan = planner.as_agreed(process_group, param_groups)

    def begun(one: Round, flag: Flag | None) -> RoundUpdate:
        members = [plan.params[i] for batch in one.batches for i in batch.members]
        gradients = {p: torch.zeros_like(local_of(p.detach())) for p in members}
        states = {p: state_format.new_state(p) for p in members}
        return _Rehearsal(one, flag, rule, param_groups, plan.params, gradients, states)

    rounds = plan.rounds[process_group]
    if not rounds:  # no rank sends anything
        sharding.agree(process_group, param_groups)
        return True
    try:
        pipelined(rounds, begun, sharding.flag(process_group, param_groups))
    except AllChanged:
        return True
    return False
