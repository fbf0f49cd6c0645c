# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz orthogonalization of whole matrices."""
