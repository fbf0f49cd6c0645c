# SPDX-License-Identifier: Apache-2.0
"""The plan of an optimizer's steps, which is kept as long as it holds."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange import Mode
from emerging_optimizers.adaptive_muon.exchange.plan import Ready, Round, make_plan
from emerging_optimizers.adaptive_muon.state.buffers import StateFormat, check_state, state_only


__all__ = ["Plan", "Planner"]


class Plan(NamedTuple):
    """What a step does."""

    params: list[torch.Tensor]  # which it updates
    # By process group, in an order that does not depend on gradients; those of whole matrices come last. So no weight
    # has changed when the ranks of the first group find out that they disagree.
    rounds: dict[ProcessGroup | None, list[Round]]


class Planner:
    """Makes plans.

    Args:
        state_format: The format of the parameters' state.
        mode: How matrices in shards are orthogonalized.
        max_bytes_in_flight: As :func:`make_plan` takes it.
    """

    def __init__(self, state_format: StateFormat, mode: Mode | None, max_bytes_in_flight: int) -> None:
        self.state_format, self._mode, self._max_bytes_in_flight = state_format, mode, max_bytes_in_flight
        self._sharding = state_format.sharding
        self._last: tuple[list[Ready], dict[ProcessGroup | None, list[Round]]] | None = None

    @property
    def has_planned(self) -> bool:
        """Whether there is a plan of an earlier step."""
        return self._last is not None

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has. Plans are of an optimizer's own parameters."""
        return {**vars(self), "_last": None}

    def plan(
        self,
        param_groups: list[dict[str, Any]],
        states: Mapping[torch.Tensor, dict[str, Any]],
        unchanged: Collection[torch.Tensor] = (),
    ) -> Plan:
        """Return the plan for all parameters with a gradient, except those that stay unchanged. It rarely changes.

        Raises:
            ValueError: If a state does not fit, or ranks are found to have gradients of different parameters.
        """
        params, ready = [], []
        for index, group in enumerate(param_groups):
            for p in group["params"]:
                if p.grad is not None and p not in unchanged and not self._sharding.is_empty(p):
                    params.append(p)
                    ready.append(Ready.of(p, self._sharding.matrices(p), index))
        if self._last is None or self._last[0] != ready or self._sharding.has_to_compare:
            self._last = None  # the one before must not be taken again if something is refused now
            for group in param_groups:
                check_state(group, states, self.state_format)
            self._sharding.compare_gradients(param_groups)
            rounds: dict[ProcessGroup | None, list[Round]] = {
                **{group: [] for group in self._sharding.by_group(param_groups)},
                None: [],
            }
            for one in make_plan(ready, self._mode, self._max_bytes_in_flight):
                rounds[one.process_group].append(one)
            self._last = ready, rounds
        return Plan(params, self._last[1])

    def with_state(
        self,
        param_groups: list[dict[str, Any]],
        states: Mapping[torch.Tensor, dict[str, Any]],
        gradients: Mapping[torch.Tensor, torch.Tensor],
        make_state: Callable[[dict[str, Any]], None],
        plan: Plan,
    ) -> Plan:
        """Make the state of all parameters that have none, and return the plan without those that get nothing else.

        Parameters of process groups in which this rank has to knock must wait. Replicas are compared before.

        Args:
            param_groups: The optimizer's parameter groups.
            states: Their parameters' states.
            gradients: Their parameters' gradients; of DTensors what this rank holds.
            make_state: Makes the state of a group's parameters that have a gradient and need not wait.
            plan: The plan.
        """
        new = any("momentum_buffer" not in states.get(p, ()) for p in gradients)
        if new:
            settled = {p: G for p, G in gradients.items() if not self._sharding.awaits_comparison(p)}
            plan = self.plan(param_groups, states, state_only(param_groups, states, settled, self._sharding))
        self._sharding.compare_replicas(plan.params, param_groups)
        for group in param_groups if new else ():
            make_state(group)
        return plan

    def as_agreed(self, process_group: ProcessGroup, param_groups: list[dict[str, Any]]) -> Plan:
        """Return the plan of the ranks whose gradients are those that all of a process group agreed about."""
        params = self._sharding.agreed(process_group, param_groups)
        numbered = [(p, index) for index, group in enumerate(param_groups) for p in group["params"] if p in params]
        ready = [Ready.of(p, self._sharding.matrices(p), index) for p, index in numbered]
        rounds = make_plan(ready, self._mode, self._max_bytes_in_flight)
        return Plan([p for p, _ in numbered], {process_group: rounds})
