# SPDX-License-Identifier: Apache-2.0
"""Starts the tests of tests/automodel, of NeMo Automodel with FSDP2, in two processes.

To run some of them by hand: ``torchrun --nproc_per_node 2 -m pytest -x tests/automodel -k yaml``.
"""

from pathlib import Path

import pytest
from torchrun import run_in_processes


def test_in_two_processes() -> None:
    pytest.importorskip("nemo_automodel", reason="needs pip install '.[automodel]'")
    imports = "import nemo_automodel.recipes._typed_config, transformers.models.llama.modeling_llama"
    run_in_processes([Path(__file__).parent / "automodel"], 2, imports)
