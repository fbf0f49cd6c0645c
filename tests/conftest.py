# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


torch.set_num_threads(1)  # on matrices this small a second thread only costs, and on a busy machine it costs much


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
