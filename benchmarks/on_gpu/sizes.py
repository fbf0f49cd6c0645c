# SPDX-License-Identifier: Apache-2.0
"""How large everything is that ``make gpu`` measures: on a GPU, and in a rehearsal."""

from dataclasses import dataclass, field

from shapes import SETS, ShapeSet


@dataclass(frozen=True)
class Sizes:
    """The sizes of all measurements. The defaults are those for a GPU.

    Attributes:
        test_choice: pytest's ``-k`` for the tests of ordinary size.
        test_workers: Processes that share those tests.
        stand_in: The plugin that stands in for CUDA.
        copied: Elements of the float32 tensor that is copied to measure the bandwidth.
        side: Side of the float16 matrices whose product is measured.
        products: ``(batch, n, k)`` of symmetric products: of n x k matrices, and squares where k is n.
        sets: Sets of matrices to take steps on.
        rounds: Counted rounds of each step.
        model: Layers, width, heads, context and vocabulary of the model to train.
        micro_batch: Windows in a micro-batch.
        tokens: Tokens in a training step.
        exact: Shapes of the matrices of which the rounding is measured.
        worlds: Numbers of gloo ranks.
        precisions: What these ranks compare.
        sharded: Whole shapes of the matrices that these ranks hold in strips.
    """

    test_choice: str = "not 2_to_the_31 and not interpreter"
    test_workers: int = 6
    stand_in: str = ""
    copied: int = 2**30
    side: int = 8192
    products: tuple[tuple[int, int, int], ...] = (
        (12, 768, 768),
        (12, 768, 3072),
        (48, 768, 768),
        (4, 1024, 4096),
        (1, 2048, 2048),
        (1, 4096, 4096),
        (1, 4096, 14336),
        (48, 256, 256),
    )
    sets: dict[str, ShapeSet] = field(
        default_factory=lambda: {name: SETS[name] for name in ("gpt2", "llama8b-layer", "48x256", "200x64")}
    )
    rounds: int = 20
    model: tuple[int, int, int, int, int] = (12, 768, 12, 1024, 50304)
    micro_batch: int = 16
    tokens: int = 2**19
    exact: tuple[tuple[int, int], ...] = ((768, 3072), (3072, 768), (4096, 14336), (4096, 4096), (28672, 4096))
    worlds: tuple[int, ...] = (2, 4)
    precisions: tuple[str, ...] = ("highest", "medium")
    sharded: tuple[tuple[int, int], ...] = ((64, 48), (64, 48), (96, 160), (256, 512), (96, 160))


ON_GPU = Sizes()
REHEARSAL = Sizes(
    test_choice="takes_views or where_it_saves or (namo_d and (graph or capture)) or a_model or schedulers",
    stand_in="cuda_on_cpu",
    test_workers=1,
    copied=2**16,
    side=64,
    products=((2, 32, 32), (1, 32, 48)),
    sets={"gpt2": ShapeSet("three small matrices", ((16, 24),) * 3)},
    rounds=2,
    model=(1, 16, 2, 16, 64),
    micro_batch=2,
    tokens=128,
    exact=((24, 40), (40, 24), (24, 24)),
    worlds=(2,),
    precisions=("highest",),
    sharded=((16, 24), (24, 16)),
)
