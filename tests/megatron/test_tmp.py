import pytest, os
from models import gpt, optimizer_of, parallel, train
from emerging_optimizers.adaptive_muon.integrations.megatron import register
def test_x():
    register()
    import torch
    for method in ("adamuon","normuon","namo","namo_d"):
        for lr in (1e-2, 1e-3, 3e-4):
            losses = {}
            for tp in 1, 2, 4:
                with parallel(tp):
                    model = gpt()
                    losses[tp] = train(model, optimizer_of(model, method, lr=lr), range(10))
            if torch.distributed.get_rank() == 0:
                print("RES", method, lr, losses[1][0], losses[1][-1], *["%.1e" % max(abs(a/b-1) for a,b in zip(losses[t], losses[1])) for t in (2,4)], flush=True)
