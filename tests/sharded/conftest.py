# SPDX-License-Identifier: Apache-2.0
"""Tests that run in every process of a torchrun; tests/test_sharded.py starts them in 1, 2 and 4 processes."""

from rank import *  # noqa: F403  hooks and fixtures
