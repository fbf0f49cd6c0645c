# SPDX-License-Identifier: Apache-2.0
"""How ``optim.name: adaptive_muon`` is there in NeMo after ``pip install``: the entry point that Lightning calls.

It stands beside the package ``emerging_optimizers.adaptive_muon`` and not in it, since Lightning calls it in every
``Trainer``, of programs without NeMo also: importing this module imports nothing else.
"""

import logging
import sys
from typing import Any


__all__ = ["lightning_callbacks"]


def lightning_callbacks() -> list[Any]:
    """Register adaptive_muon where NeMo is in use: the entry point of ``lightning.pytorch.callbacks_factory``.

    Returns:
        The callbacks that Lightning adds to a ``Trainer``. Where NeMo is in use, there is one, which writes the
        optimizer's diagnostics if it measures; else there is none.
    """
    if "nemo.core.optim.optimizers" in sys.modules:
        try:
            from emerging_optimizers.adaptive_muon.integrations.nemo import diagnostics_callback, register

            register()
            return [diagnostics_callback()]
        except Exception as error:  # a Trainer that never asked for adaptive_muon must not fail for it
            logging.getLogger(__name__).warning("NeMo's optim.name adaptive_muon is not available: %s", error)
    return []
