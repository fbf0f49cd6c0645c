# SPDX-License-Identifier: Apache-2.0
"""Tests that run in every process of a torchrun; tests/test_automodel.py starts them in two processes."""

from rank import *  # noqa: F403  hooks and fixtures
