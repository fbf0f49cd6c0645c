# SPDX-License-Identifier: Apache-2.0
"""What the optimizer shows of itself: measures of every matrix, their summary, and a report of what stands out."""
