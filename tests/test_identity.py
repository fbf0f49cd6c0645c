# SPDX-License-Identifier: Apache-2.0
"""A parameter's identity: its own for as long as it exists, and no other parameter's."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.identity import give_key, identity, key_of


@pytest.mark.parametrize(
    "make", [lambda: nn.Parameter(torch.ones(2, 2)), lambda: torch.ones(2, 2, requires_grad=True)]
)
def test_a_copy_has_another_identity(make):
    p = make()
    assert key_of(p) == ""
    own = identity(p)
    assert identity(p) == own == (id(p), key_of(p))
    for copied in (copy.deepcopy(p), pickle.loads(pickle.dumps(p)), make()):
        assert identity(copied) != own and identity(p) == own
    assert key_of(pickle.loads(pickle.dumps(p))) == key_of(p), "by which an optimizer that is pickled too finds it"
    assert give_key(p) != own[1] and identity(p) != own


def test_a_parameter_at_the_address_of_another_has_another_identity():
    seen = set()
    for _ in range(100):
        seen.add(identity(nn.Parameter(torch.ones(2, 2))))
    assert len(seen) == 100


def test_it_keeps_nothing_alive():
    p = nn.Parameter(torch.ones(2, 2))
    identity(p)
    gone = weakref.ref(p)
    del p
    gc.collect()
    assert gone() is None


def test_what_is_swapped_in_has_another_identity():
    """Also where an optimizer takes it for what was there: it may be sharded in another way."""
    model = nn.Linear(3, 3)
    optimizer = HybridAdaptiveMuon.from_model(model)
    before, described = identity(model.weight), optimizer.describe()
    torch.utils.swap_tensors(model.weight, nn.Parameter(torch.zeros(3, 3)))
    assert optimizer.describe() == described
    assert identity(model.weight)[0] == before[0] and identity(model.weight) != before
