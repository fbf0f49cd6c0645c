# SPDX-License-Identifier: Apache-2.0
import os
import sys
from typing import get_args

import torch
import torch.nn as nn
from absl import flags, logging
from absl.testing import absltest, parameterized

from emerging_optimizers.orthogonalized_optimizers.adaptive_muon import AdaptiveMuon, Moment2MethodT


flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "Device to run tests on")
flags.DEFINE_integer("seed", None, "Random seed for reproducible tests")
FLAGS = flags.FLAGS
MOMENT2_METHODS = get_args(Moment2MethodT)
STEPS = 4


def setUpModule() -> None:
    if FLAGS.seed is not None:
        logging.info("Setting random seed to %d", FLAGS.seed)
        torch.manual_seed(FLAGS.seed)


def same_on_all_ranks(shape):
    """A random matrix that every rank has."""
    matrix = torch.randn(shape)
    torch.distributed.broadcast(matrix, src=0)
    return matrix


def run(initial, grads, *, partition_dim=None, **kwargs):
    """Weights after some steps of AdaptiveMuon."""
    param = nn.Parameter(initial.clone())
    if partition_dim is not None:
        param.partition_dim = partition_dim
    optimizer = AdaptiveMuon([param], lr=0.05, momentum=0.9, weight_decay=0.1, fp32_matmul_prec="highest", **kwargs)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def group_count():
    """How many pairs of ranks there are."""
    return torch.distributed.get_world_size() // 2


def shard(matrix, group, dim, sizes=None):
    """This rank's shard of a matrix."""
    size = group.size()
    sizes = sizes or [matrix.size(dim) // size] * size
    return matrix.split(sizes, dim=dim)[group.rank()]


def run_in_shards(initial, grads, group, partition_dim, sizes=None, **kwargs):
    """Weights of this rank's shard after the same steps."""
    first, *others = (shard(matrix, group, partition_dim, sizes) for matrix in (initial, *grads))
    return run(first, others, partition_dim=partition_dim, tp_group=group, **kwargs)


class DistributedAdaptiveMuonCpuTest(parameterized.TestCase):
    @parameterized.product(
        shape=((16, 24), (24, 16), (64, 8), (8, 64)),
        moment2_method=MOMENT2_METHODS,
        partition_dim=(0, 1),
        tp_mode=("duplicated", "distributed"),
    )
    def test_shards_are_the_whole(self, shape, moment2_method, partition_dim, tp_mode) -> None:
        """Test that a matrix in shards takes the path of the whole one."""
        group = torch.distributed.group.WORLD
        initial, grads = same_on_all_ranks(shape), [same_on_all_ranks(shape) for _ in range(STEPS)]
        kwargs = {"moment2_method": moment2_method, "nesterov": True, "correct_bias": True}
        whole = run(initial, grads, **kwargs)
        mine = run_in_shards(initial, grads, group, partition_dim, tp_mode=tp_mode, **kwargs)
        # An element of adamuon's O close to zero is divided by its own size, which enlarges its rounding.
        tolerance = 1e-5 if tp_mode == "duplicated" or moment2_method != "adamuon" else 1e-3
        torch.testing.assert_close(mine, shard(whole, group, partition_dim), atol=tolerance, rtol=tolerance)

    @parameterized.product(moment2_method=MOMENT2_METHODS, partition_dim=(0, 1))
    def test_state_of_a_shard(self, moment2_method, partition_dim) -> None:
        """Test that a reduced buffer is the whole matrix's, and an elementwise one is a shard."""
        group = torch.distributed.group.WORLD
        grad = same_on_all_ranks((16, 24))
        buffers = []
        for matrix in (grad, shard(grad, group, partition_dim)):
            param = nn.Parameter(torch.zeros_like(matrix))
            param.grad, param.partition_dim = matrix.clone(), partition_dim
            tp_group = None if matrix is grad else group
            optimizer = AdaptiveMuon([param], 0.1, 0.9, 0.0, moment2_method=moment2_method, tp_group=tp_group)
            optimizer.step()
            buffers.append(optimizer.state[param]["moment2_buffer"])
        whole, actual = buffers
        expected = shard(whole, group, partition_dim) if whole.shape == grad.shape else whole
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)

    @parameterized.product(moment2_method=("namo", "namo_d"), partition_dim=(0, 1))
    def test_adaptive_decay_in_shards(self, moment2_method, partition_dim) -> None:
        """Test that weight decay is scaled as for the whole matrix."""
        group = torch.distributed.group.WORLD
        initial, grads = same_on_all_ranks((16, 24)), [same_on_all_ranks((16, 24)) for _ in range(STEPS)]
        kwargs = {"moment2_method": moment2_method, "weight_decay_method": "adaptive"}
        whole = run(initial, grads, **kwargs)
        mine = run_in_shards(initial, grads, group, partition_dim, **kwargs)
        torch.testing.assert_close(mine, shard(whole, group, partition_dim), atol=1e-5, rtol=1e-5)

    @parameterized.product(moment2_method=MOMENT2_METHODS, partition_dim=(0, 1))
    def test_shards_of_different_sizes(self, moment2_method, partition_dim) -> None:
        """Test that "distributed" takes them, and "duplicated" refuses."""
        group = torch.distributed.group.WORLD
        sizes = [3 + rank for rank in range(group.size())]
        shape = (sum(sizes), 12) if partition_dim == 0 else (12, sum(sizes))
        initial, grads = same_on_all_ranks(shape), [same_on_all_ranks(shape) for _ in range(STEPS)]
        whole = run(initial, grads, moment2_method=moment2_method)
        args = (initial, grads, group, partition_dim, sizes)
        # All collectives come before a comparison that could fail on one rank only.
        with self.assertRaisesRegex(ValueError, "shards of one size"):
            run_in_shards(*args, tp_mode="duplicated", moment2_method=moment2_method)
        mine = run_in_shards(*args, tp_mode="distributed", moment2_method=moment2_method)
        expected = shard(whole, group, partition_dim, sizes)
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=1e-3)

    @parameterized.product(moment2_method=("normuon", "namo", "namo_d"), partition_dim=(0, 1))
    def test_subgroups(self, moment2_method, partition_dim) -> None:
        """Test that only the ranks of the group are summed over: others hold other matrices."""
        group, _ = torch.distributed.new_subgroups(2)
        pair = torch.distributed.get_rank() // 2
        of_pairs = [[same_on_all_ranks((16, 24)) for _ in range(1 + STEPS)] for _ in range(group_count())]
        initial, *grads = of_pairs[pair]
        whole = run(initial, grads, moment2_method=moment2_method)
        mine = run_in_shards(initial, grads, group, partition_dim, moment2_method=moment2_method)
        torch.testing.assert_close(mine, shard(whole, group, partition_dim), atol=1e-5, rtol=1e-5)

    def test_whole_parameters_beside_shards(self) -> None:
        """Test that parameters without partition_dim, or with -1, are whole."""
        group = torch.distributed.group.WORLD
        initial, grads = same_on_all_ranks((16, 24)), [same_on_all_ranks((16, 24)) for _ in range(STEPS)]
        whole = run(initial, grads, moment2_method="namo")
        for partition_dim in (None, -1):
            mine = run(initial, grads, partition_dim=partition_dim, moment2_method="namo", tp_group=group)
            torch.testing.assert_close(mine, whole, atol=0.0, rtol=0.0)

    def test_bad_partition_dim_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "partition_dim"):
            run(
                torch.randn(4, 6),
                [torch.randn(4, 6)],
                partition_dim=2,
                moment2_method="namo",
                tp_group=torch.distributed.group.WORLD,
            )


if __name__ == "__main__":
    torch.distributed.init_process_group(backend="gloo")
    torch.set_float32_matmul_precision("highest")

    rank = torch.distributed.get_rank()

    for i, arg in enumerate(sys.argv):
        if arg.startswith("--xml_output_file="):
            base, ext = os.path.splitext(arg)

            # Attach rank to the output file name
            sys.argv[i] = f"{base}_rank{rank}{ext}"
            break

    absltest.main()

    torch.distributed.destroy_process_group()
