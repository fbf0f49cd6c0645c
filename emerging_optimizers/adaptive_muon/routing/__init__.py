# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a model are matrices for AdaptiveMuon, and which are AdamW's."""
