# SPDX-License-Identifier: Apache-2.0
"""One module a framework. None is imported by the package itself, and each imports its framework only."""
