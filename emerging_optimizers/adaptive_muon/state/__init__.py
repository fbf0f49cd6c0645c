# SPDX-License-Identifier: Apache-2.0
"""The optimizer's state: its buffers, and checkpoints of them."""
