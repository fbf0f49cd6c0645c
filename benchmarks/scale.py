# SPDX-License-Identifier: Apache-2.0
"""The plan of a step at scale, from shapes alone, without processes or a GPU.

For models and numbers of ranks: how evenly the owners of "layer_sharded" work, what a rank sends and stores, and how long
planning takes; and the time that a rank's exchange spends in Python. Work is counted in multiplications of one product of
the iteration, rows x columns x min(rows, columns). The critical path is the sum over rounds of the busiest owner's work.
"""

import argparse
import copy
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from common import RESULTS, circumstances, save, table
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from shapes import SETS, ShapeSet
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange import Orthogonalize, Shards, make_mode
from emerging_optimizers.adaptive_muon.exchange.layer_sharded import Relayed
from emerging_optimizers.adaptive_muon.exchange.plan import Ready, Round, make_plan
from emerging_optimizers.adaptive_muon.options import Options
from emerging_optimizers.adaptive_muon.sharding.layout import Rectangle, ShardedLayout
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix, ShardShapes


GPU = torch.device("cuda")  # no tensor is made on it
MOMENTUM, RESULT = 4, 2  # bytes of an element of M' in messages, and of O from a 16-bit iteration


class Group:
    """Stands for a process group of this many ranks, in which this process has this rank."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        """Returns the number of ranks."""
        return self._size

    def rank(self) -> int:
        """Returns the rank of this process."""
        return self._rank


class Way(NamedTuple):
    """A way to shard a model."""

    title: str
    shards: int | None  # ranks that hold a replica together; None for all
    dims: tuple[int, ...] = (0,)  # along which matrices are split, in turn
    most_elements: float = math.inf  # of a model for which it is planned

    def replicas(self, ranks: int) -> int:
        """Returns how many replicas a number of ranks has."""
        return 1 if self.shards is None else ranks // self.shards


def llama(size: str, layers: int, hidden: int, key_value: int, inner: int) -> ShapeSet:
    """Returns the matrices of a Llama: queries, keys, values, output; gate, up, down."""
    layer = [(hidden, hidden), *[(key_value, hidden)] * 2, (hidden, hidden), *[(inner, hidden)] * 2, (hidden, inner)]
    return ShapeSet(f"Llama {size}", tuple(layer * layers))


def deepseek() -> ShapeSet:
    """Returns the matrices of DeepSeek-V3 but for embedding, head and routers; every expert's are parameters."""
    hidden, inner, expert, heads = 7168, 18432, 2048, 128
    attention = [(1536, hidden), (heads * (128 + 64), 1536), (512 + 64, hidden), (heads * (128 + 128), 512)]
    attention.append((hidden, heads * 128))

    def mlp(size: int) -> list[tuple[int, int]]:
        return [(size, hidden), (size, hidden), (hidden, size)]

    return ShapeSet("DeepSeek-V3", tuple((attention + mlp(inner)) * 3 + (attention + mlp(expert) * 257) * 58))


MODELS = {
    "gpt2": ShapeSet("GPT-2 124M", SETS["gpt2"].shapes),
    "llama8b": llama("8B", 32, 4096, 1024, 14336),
    "llama70b": llama("70B", 80, 8192, 1024, 28672),
    "llama405b": llama("405B", 126, 16384, 1024, 53248),
    "deepseek-v3": deepseek(),
}
WAYS = {
    "fsdp2": Way("FSDP2", None),
    "tp8": Way("TP 8, replicas", 8, (0, 1)),
    "hsdp8": Way("HSDP 8", 8),
    "hsdp64": Way("HSDP 64", 64),
    "ddp": Way("DDP", 1, most_elements=1e10),
}


def rectangles(shape: tuple[int, int], dim: int, ranks: int) -> tuple[Rectangle, ...]:
    """Returns the strips that torch cuts a matrix in."""
    size = -(-shape[dim] // ranks)
    ends = pairwise(min(index * size, shape[dim]) for index in range(ranks + 1))
    return tuple(
        Rectangle(start, end, 0, shape[1]) if dim == 0 else Rectangle(0, shape[0], start, end) for start, end in ends
    )


def sharded(model: ShapeSet, way: Way, group: Group) -> list[Ready]:
    """Returns what a plan depends on of a model's parameters, each a matrix with a layout of its own."""

    @cache
    def of(shape: tuple[int, int], dim: int) -> tuple[ShardedLayout, ShardShapes]:
        number = way.replicas(group.size())
        strips = rectangles(shape, dim, group.size() // number) * number
        replicas = tuple(rank * number // group.size() for rank in range(group.size())) if number > 1 else ()
        layout = ShardedLayout(cast(ProcessGroup, group), group.rank(), shape, strips, replicas)
        return layout, ShardShapes(None, tuple(strip.shape for strip in strips))

    ready = []
    for index, shape in enumerate(model.shapes):
        layout, shapes = of(shape, way.dims[index % len(way.dims)])
        matrix = Matrix(copy.copy(layout), shard_shapes=shapes)
        ready.append(Ready((matrix,), 0, torch.bfloat16, GPU, torch.Size(layout.own.shape)))
    return ready


def owned(one: Round) -> Iterator[tuple[ShardedLayout, int]]:
    """Yields the layout and the owner of every matrix in a round."""
    for batch in one.batches:
        for equal in batch.matrices:
            for owner in equal.owners:
                yield cast(ShardedLayout, equal.layout), owner


class Load(NamedTuple):
    """What a rank has in a round, in elements."""

    sent: int = 0  # shards of matrices that its replica owns
    held: int = 0  # shards of all matrices
    whole: int = 0  # all matrices that it owns
    copies: int = 0  # of results, that it sends
    largest: int = 0  # of these


class Busiest:
    """What the busiest rank does in a round, and in all."""

    def __init__(self, ranks: int, replicas: int) -> None:
        self._replicas = replicas
        self.critical_path = self.temporary = 0
        self._ranks, self._sent, self._received = ranks, [0] * ranks, [0] * ranks
        self._last = [[Load()] * ranks] * 2  # the loads of the last two rounds

    @property
    def sent(self) -> int:
        """The bytes to other ranks that the busiest sender sends."""
        return max(self._sent)

    @property
    def received(self) -> int:
        """The bytes from other ranks that the busiest receiver gets."""
        return max(self._received)

    def add(self, matrices: list[tuple[ShardedLayout, int]], *, relayed: bool = False) -> None:
        """Adds a round; one without matrices after the last. Results are relayed, or an owner sends a copy to each replica."""
        work, whole, own, largest, sent, held, copies = ([0] * self._ranks for _ in range(7))
        for layout, owner in matrices:
            area = math.prod(layout.whole)
            work[owner] += area * min(layout.whole)
            whole[owner] += area
            copies[owner] += area * (self._replicas if layout.is_split else 1)
            own[owner] += layout.rectangles[owner].area
            largest[owner] = max(largest[owner], area)
        of_replica = self._ranks // self._replicas
        for layout, number in Counter(layout for layout, _ in matrices).items():
            for rank, rectangle in enumerate(layout.rectangles):
                held[rank] += number * rectangle.area
        for (layout, replica), number in Counter((layout, owner // of_replica) for layout, owner in matrices).items():
            for rank in range(replica * of_replica, (replica + 1) * of_replica) if layout.is_split else ():
                sent[rank] += number * layout.rectangles[rank].area
        if relayed:
            copies = [W + S * (self._replicas - 1) for W, S in zip(whole, sent, strict=True)]
        self.critical_path += max(work)
        whole_in_messages = whole if any(sent) else [0] * self._ranks
        for rank, (S, H, W, C, both) in enumerate(zip(sent, held, whole_in_messages, copies, own, strict=True)):
            self._sent[rank] += MOMENTUM * max(S - both, 0) + RESULT * (C - both)
            self._received[rank] += MOMENTUM * max(W - both, 0) + RESULT * (H - both)
        loads = [Load(*each) for each in zip(sent, held, whole, copies, largest, strict=True)]
        self.temporary = max(self.temporary, *map(temporary_bytes, *self._last, loads))
        self._last = [self._last[1], loads]


def temporary_bytes(previous: Load, current: Load, following: Load) -> int:
    """Returns the most temporary bytes of a rank in a round, between two others.

    These are messages, M' of its shards, and M' and O of its matrices, without the iteration's own. The message with the
    next round's shards is on its way when the round is orthogonalized, as are the results of the one before.
    """
    ahead = MOMENTUM * (following.sent + following.whole) if following.sent else 0
    back = RESULT * (previous.held + previous.copies)
    M, O = MOMENTUM * current.whole, RESULT * current.whole
    return max(
        2 * M + back,  # the matrices are assembled
        M + back + MOMENTUM * following.sent + ahead,  # the next round's shards are sent
        M + RESULT * current.largest + back + ahead,  # each matrix is orthogonalized
        O + back + RESULT * previous.held + ahead,  # the round before ends
        O + RESULT * (current.held + current.copies) + ahead,  # the results are sent
    )


def least_of_busiest(costs: Sequence[int], ranks: int) -> int:
    """Returns a lower bound of the busiest owner's work, whoever owns the whole matrices.

    It is the least capacity for which the bound L2 on bins does not exceed the ranks (S. Martello and P. Toth, Knapsack
    Problems, 1990). Matrices with more than half the capacity need a bin each. Those that are larger than what the
    smallest of interest leave cannot share it with them.
    """
    counts = sorted(Counter(costs).items())

    def bins(capacity: int) -> int:
        most = 0
        for smallest in [0, *(cost for cost, _ in counts if 2 * cost <= capacity)]:
            alone = sum(n for cost, n in counts if cost > capacity - smallest)
            shared = [(cost, n) for cost, n in counts if 2 * cost > capacity >= cost + smallest]
            small = sum(cost * n for cost, n in counts if smallest <= cost and 2 * cost <= capacity)
            rest = small - sum((capacity - cost) * n for cost, n in shared)
            most = max(most, alone + sum(n for _, n in shared) + max(-(-rest // capacity), 0))
        return most

    low, high = max(-(-sum(costs) // ranks), max(costs)), sum(costs)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bins(middle) <= ranks else (middle + 1, high)
    return low


def planned(model: ShapeSet, way: Way, ranks: int, cap: int) -> dict[str, Any]:
    """Returns the figures of a model's plan."""
    ready, seconds = sharded(model, way, Group(ranks)), math.inf
    for _ in range(2):
        start = time.perf_counter()
        rounds = make_plan(ready, make_mode("layer_sharded"), cap)
        seconds = min(seconds, time.perf_counter() - start)
    busiest = Busiest(ranks, way.replicas(ranks))
    for one in rounds:
        busiest.add(list(owned(one)), relayed=isinstance(one.mode, Relayed))
    busiest.add([])
    costs = [math.prod(shape) * min(shape) for shape in model.shapes]
    ideal, least = sum(costs) / ranks, least_of_busiest(costs, ranks)
    return {
        "model": model.title,
        "way": way.title,
        "ranks": ranks,
        "matrices_per_owner": len(costs) / ranks,
        "over_ideal": busiest.critical_path / ideal,
        "over_best_of_whole_matrices": busiest.critical_path / least,
        "rounds": len(rounds),
        "bytes_sent": busiest.sent,
        "bytes_received": busiest.received,
        "temporary_bytes": busiest.temporary,
        "seconds_to_plan": seconds,
    }


def exchanged(model: ShapeSet, ranks: int) -> dict[str, Any]:
    """Returns the seconds of one rank's exchange of a model, with no message sent and matrices too small for any work.

    What is left is Python and the calls of torch's operations. Every matrix is by itself, as large ones are.
    """
    group, mode = Group(ranks), make_mode("layer_sharded")
    assert mode is not None
    small = ShapeSet(model.title, ((ranks, 8),) * len(model.shapes))
    ready = sharded(small, WAYS["fsdp2"], group)
    [one] = make_plan(ready, mode, 2**62)
    sums = [torch.ones(1, 1, 1) for _ in range(2)]
    batches = [
        Shards(
            torch.ones(1, *layout.own.shape), sums, layout, [owner], Orthogonalize([lambda matrix: matrix], (), False)
        )
        for layout, owner in owned(one)
    ]
    seconds = math.inf
    with patch("torch.distributed.all_to_all_single"):
        for _ in range(3):
            start = time.perf_counter()
            exchange = mode.exchange(cast(ProcessGroup, group), batches)
            exchange.assemble()
            exchange.orthogonalize()
            exchange.send_results()
            exchange.results()
            seconds = min(seconds, time.perf_counter() - start)
    most_owned = -(-len(small.shapes) // ranks)
    return {"model": model.title, "ranks": ranks, "owned": most_owned, "seconds_of_exchange": seconds}


def main() -> None:
    """Plans all, prints tables, and writes JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--worlds", type=int, nargs="+", default=[4, 16, 64, 256, 1024, 4096])
    parser.add_argument("--exchanges", type=int, nargs="*", default=[8, 64, 1024], help="ranks of simulated exchanges")
    parser.add_argument("--exchange-model", choices=MODELS, default="llama405b")
    parser.add_argument("--cap", type=int, default=Options().max_bytes_in_flight, help="max_bytes_in_flight")
    parser.add_argument("--name", default="scale", help="of the JSON file and the plot")
    parser.add_argument("--directory", type=Path, default=RESULTS)
    args = parser.parse_args()
    plans = [
        planned(MODELS[model], WAYS[way], ranks, args.cap)
        for model in args.models
        for way in args.ways
        for ranks in args.worlds
        if ranks >= (WAYS[way].shards or 1) and sum(map(math.prod, MODELS[model].shapes)) <= WAYS[way].most_elements
    ]
    exchanges = [exchanged(MODELS[args.exchange_model], ranks) for ranks in args.exchanges]
    report(plans, exchanges)
    settings = {"max_bytes_in_flight": args.cap, "worlds": args.worlds}
    result = {"machine": circumstances(torch.device("cpu")), "settings": settings}
    path = save(args.name, result | {"plans": plans, "exchanges": exchanges}, args.directory)
    draw(plans, path.with_suffix(".png"))
    print("\nwrote", path, "and", path.with_suffix(".png"))


def report(plans: Sequence[dict[str, Any]], exchanges: Sequence[dict[str, Any]]) -> None:
    """Prints a table of plans, and one of exchanges."""
    headings = ("", "ranks", "matrices per owner", "x ideal", "x best of whole matrices", "rounds")
    headings += ("GiB sent", "GiB received", "GiB temporary", "s to plan")
    rows = [
        (
            f"{each['model']}, {each['way']}",
            str(each["ranks"]),
            f"{each['matrices_per_owner']:.3g}",
            f"{each['over_ideal']:.3f}",
            f"{each['over_best_of_whole_matrices']:.3f}",
            str(each["rounds"]),
            *(f"{each[key] / 2**30:.3g}" for key in ("bytes_sent", "bytes_received", "temporary_bytes")),
            f"{each['seconds_to_plan']:.2g}",
        )
        for each in plans
    ]
    print(table(headings, rows), end="\n\n")
    headings = ("the exchange of", "ranks", "matrices owned", "ms in Python and torch's calls")
    rows = [
        (each["model"], str(each["ranks"]), str(each["owned"]), f"{1e3 * each['seconds_of_exchange']:.3g}")
        for each in exchanges
    ]
    print(table(headings, rows))


def draw(plans: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the critical paths and the temporary memory of models under FSDP2, over the number of ranks."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    shown = [each for each in plans if each["way"] == WAYS["fsdp2"].title]
    for number, model in enumerate(dict.fromkeys(each["model"] for each in shown)):
        of_model = [each for each in shown if each["model"] == model]
        ranks, style = [each["ranks"] for each in of_model], {"color": f"C{number}", "marker": "o", "label": model}
        left.plot(ranks, [each["over_best_of_whole_matrices"] for each in of_model], **style)
        right.plot(ranks, [each["temporary_bytes"] / 2**30 for each in of_model], **style)
    left.set(ylabel="critical path, x best of whole matrices", ylim=(0.95, None))
    right.set(ylabel="GiB of temporary memory of a rank", yscale="log")
    for axis in (left, right):
        _with_ranks(axis, sorted({each["ranks"] for each in shown}))
    left.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _with_ranks(axis: Axes, ranks: Sequence[int]) -> None:
    axis.set(xlabel="ranks, FSDP2", xscale="log")
    axis.set_xticks(ranks, [str(each) for each in ranks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
