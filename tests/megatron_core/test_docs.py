# SPDX-License-Identifier: Apache-2.0
"""The script of the documentation's page on Megatron runs as it stands."""

import re
from pathlib import Path
from typing import Any

from models import gpt, parallel, train


PAGE = Path(__file__).parents[2] / "docs" / "apidocs" / "megatron.md"


def test_script_trains() -> None:
    [script] = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with parallel(2):
        names: dict[str, Any] = {"model": gpt()}
        exec(script, names)
        losses = train(names["model"], names["optimizer"], range(4))
        assert losses[3] < losses[0]
        muon = names["optimizer"].chained_optimizers[0].optimizer
        assert (muon.moment2_method, muon.weight_decay_method, muon.bias_correction) == ("namo_d", "adaptive", True)
