# SPDX-License-Identifier: Apache-2.0
"""The parts of ``make gpu``, see benchmarks/gpu.py."""
