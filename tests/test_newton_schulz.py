# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz by every algorithm: against exact iteration in float64, on inputs that are hard for it."""

from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import product
from typing import Any, get_args

import pytest
import torch

from emerging_optimizers.adaptive_muon.orthogonalize import batches, cpu, gram
from emerging_optimizers.adaptive_muon.orthogonalize import newton_schulz as module
from emerging_optimizers.adaptive_muon.orthogonalize.gram import iterate
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz, NSAlgorithmT
from emerging_optimizers.adaptive_muon.orthogonalize.symmetric import symmetric_product
from emerging_optimizers.orthogonalized_optimizers.muon_utils import (
    _COEFFICIENT_SETS,
    NSCoeffT,
    get_coefficient_iterator,
    newton_schulz,
)
from emerging_optimizers.utils import FP32MatmulPrecT, fp32_matmul_precision


SETS = [name for name in get_args(NSCoeffT) if name != "custom"]
STEPS = sorted(
    {*((name, len(_COEFFICIENT_SETS[name])) for name in SETS), *((name, 5) for name in SETS), ("quintic", 9)}
)
# The short sides lie on both sides of every change of method.
SHAPES = [(64, 128), (96, 160), (160, 96), (500, 300), (512, 640), (640, 512)]
# Of the largest, most are left to the long sweep.
LARGE = [((512, 640), "quintic", 5), ((640, 512), "polar_express", 8)]
SWEEP = [
    pytest.param(shape, *each, marks=[] if max(shape) < 640 or (shape, *each) in LARGE else pytest.mark.long)
    for shape in SHAPES
    for each in STEPS
]


def spectra(n: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Singular values that are hard, by name."""
    index = torch.arange(n, dtype=torch.float64)
    for exponent in (3, 6, 9):
        yield f"condition 1e{exponent}", 10 ** (-exponent * index / (n - 1))
    for power in (0.25, 0.5, 1, 1.5, 2, 3):
        yield f"power law {power}", (index + 1) ** -power
    for small in (1e-1, 1e-3):
        yield f"one at 1, all others {small}", torch.where(index == 0, 1.0, small).double()
        yield f"an eighth at 1, the others {small}", torch.where(index < n / 8, 1.0, small).double()
    yield "all equal", torch.ones(n, dtype=torch.float64)
    yield "five sixths equal, the others zero", (index < 5 * n // 6).double()
    yield "rank 1", (index == 0).double()
    yield "rank 8", (index < 8).double() * (index + 1)


def hard_inputs(shape: tuple[int, int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Matrices that are hard to orthogonalize, by name, in float32."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    yield "normal", normal.float()
    yield "every third row zero", (normal * (torch.arange(shape[0]) % 3 > 0).unsqueeze(1)).float()
    yield "every third column zero", (normal * (torch.arange(shape[1]) % 3 > 0)).float()
    yield "normal of half rank", (normal[:, : min(shape) // 2] @ normal[: min(shape) // 2]).float()
    yield "columns of growing size", (normal * torch.logspace(-4, 0, shape[1], dtype=torch.float64)).float()
    for scale in (1e-12, 1e-30, 1e15):
        yield f"times {scale}", (normal * scale).float()
    for name, S in spectra(min(shape)):
        yield name, (U * S @ Vh).float()


def coefficients(name: str, steps: int) -> list[tuple[float, float, float]]:
    repeats_last = name in ("polar_express", "cans", "deepseekv4")
    mode: Any = "repeat_last" if repeats_last else "cycle"
    return list(get_coefficient_iterator(steps, _COEFFICIENT_SETS[name], mode=mode))


@lru_cache(maxsize=2)
def decomposed(shape: tuple[int, int]) -> list[tuple[str, torch.Tensor, tuple[torch.Tensor, ...]]]:
    """The hard inputs, and the singular value decomposition in float64 of what upstream's float32 division leaves."""
    found = []
    for what, x in hard_inputs(shape):
        X = torch.nn.functional.normalize(x, p=2.0, dim=(-2, -1), eps=1e-15).double()
        found.append((what, x, torch.linalg.svd(X, full_matrices=False)))
    return found


@lru_cache(maxsize=1)
def exactly(name: str, steps: int, shape: tuple[int, int]) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """The hard inputs, and what exact iteration makes of them: an odd polynomial of the singular values."""
    found = []
    for what, x, (U, S, Vh) in decomposed(shape):
        for a, b, c in coefficients(name, steps):
            S = a * S + b * S**3 + c * S**5
        found.append((what, x, U * S @ Vh))
    return found


@cache
def errors(
    algorithm: NSAlgorithmT, precision: FP32MatmulPrecT, name: NSCoeffT, steps: int, shape: tuple[int, int]
) -> dict[str, float]:
    """How far an algorithm is from exact iteration on every hard input, relative to the size of the result."""
    found, newton_schulz = {}, NewtonSchulz(name, steps, False, algorithm, precision)
    for what, x, should in exactly(name, steps, shape):
        off = newton_schulz(x).double() - should
        found[what] = float(off.norm() / should.norm())
    return found


@pytest.mark.parametrize(("shape", "name", "steps"), SWEEP, ids=str)
def test_rounds_no_more_than_a_few_times_the_standard(shape: tuple[int, int], name: Any, steps: int) -> None:
    """The default, in full precision: within five times of the standard's own error, whatever the input.

    Where that is below float32's resolution, as of a tiny matrix, which hardly leaves the linear part of the
    polynomials, it is the last bit's luck, which differs from one CPU's products to the next.
    """
    standard, own = (errors(each, "highest", name, steps, shape) for each in ("standard", "auto"))
    most = {what: 5 * max(error, torch.finfo(torch.float32).eps) for what, error in standard.items()}
    assert {what: own[what] / standard[what] for what in own if not own[what] <= most[what]} == {}


@pytest.mark.parametrize("algorithm", ["auto", "gram"])
@pytest.mark.parametrize(("name", "steps"), STEPS)
def test_rounds_less_than_the_standard_at_medium_precision(algorithm: Any, name: Any, steps: int) -> None:
    """In float32, which it takes for matrices of this size on every CPU."""
    standard, own = (errors(each, "medium", name, steps, (96, 160)) for each in ("standard", algorithm))
    assert all(own[what] <= standard[what] for what in own)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize(
    ("name", "steps", "shape"), [*((*each, (200, 320)) for each in STEPS), ("quintic", 5, (512, 400))], ids=str
)
def test_in_bfloat16_rounds_as_the_standard_does(
    monkeypatch: Any, name: Any, steps: int, shape: tuple[int, int], tiles: bool
) -> None:
    """The default on a CPU that is fast at it: the same steps, and where the CPU has no tiles half of each product."""
    monkeypatch.setattr(NewtonSchulz, "dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(cpu, "has_tiles", lambda: tiles)
    standard = errors("standard", "medium", name, steps, shape)
    for what, x, should in exactly(name, steps, shape):
        off = NewtonSchulz(name, steps)(x).double() - should
        assert off.norm() <= 1.5 * standard[what] * should.norm(), what


@pytest.mark.parametrize(
    ("shape", "name", "steps"),
    [
        *((shape, *each) for shape in ((96, 160), (320, 96)) for each in STEPS),
        # These take three steps at once first. What grows most beside the standard's, of all sets, is in cans.
        *(((512, 768), name, 5) for name in ("quintic", "polar_express", "cans")),
        *(((768, 512), name, steps) for name, steps in (("quintic", 5), ("cans", 5), ("deepseekv4", 10))),
    ],
    ids=str,
)
def test_float16_rounds_less_than_the_standards_bfloat16(
    monkeypatch: Any, shape: tuple[int, int], name: Any, steps: int
) -> None:
    """As it runs on CUDA, whose products of float16 sum in float32 as the CPU's do."""
    if min(shape) >= 512 and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 takes minutes for products of float16 into views, on a CPU")
    standard = errors("standard", "medium", name, steps, shape)
    monkeypatch.setattr(NewtonSchulz, "dtype", lambda *_: torch.float16)
    assert sum(error < 0.3 for error in standard.values()) >= (12 if steps > 5 else 20)
    for what, x, should in exactly(name, steps, shape):
        # The one is far below eps, and float16 takes it for zero; of the others bfloat16 has left nothing: what it
        # rounds where X is zero has grown to the size of the result.
        if what != "times 1e-30" and standard[what] < 0.3:
            off = NewtonSchulz(name, steps)(x).double() - should
            assert off.norm() <= standard[what] * should.norm(), what


@pytest.mark.parametrize(
    ("shape", "dtype", "blocks"),
    [
        ((94, 384), torch.float32, [1, 1, 1, 1, 1]),
        ((96, 384), torch.float32, [2, 2, 1]),
        ((384, 257), torch.float32, [1, 1, 1, 1, 1]),
        ((384, 256), torch.float32, [2, 2, 1]),
        ((768, 512), torch.float32, [3, 2]),
        ((500, 768), torch.float16, [2, 2, 1]),
        ((512, 768), torch.float16, [3, 2]),
    ],
    ids=str,
)
def test_as_many_steps_at_once_as_were_measured(
    monkeypatch: Any, shape: tuple[int, int], dtype: torch.dtype, blocks: list[int]
) -> None:
    """In float16 as many as in float32."""
    taken = []
    monkeypatch.setattr(NewtonSchulz, "dtype", lambda *_: dtype)
    monkeypatch.setattr(
        module, "iterate", lambda part, steps, *_: taken.append([len(at_once) for at_once in steps]) or part
    )
    NewtonSchulz("quintic", 5)(torch.ones(shape))
    assert taken == [blocks]


def test_all_steps_on_one_gram_matrix_would_fail() -> None:
    """Why it is made anew: the bound above is one that a bad recipe breaks."""
    standard = errors("standard", "highest", "quintic", 5, (96, 160))
    for what, x, should in exactly("quintic", 5, (96, 160)):
        if what == "power law 1":
            off = iterate(x.unsqueeze(0), [coefficients("quintic", 5)], torch.float32)[0].double()
            assert (off - should).norm() > 20 * standard[what] * should.norm()


@pytest.mark.parametrize(
    "shape", [(16, 48), (48, 16), (32, 32), (3, 24, 40), (2, 3, 40, 24), (0, 4, 6), (4, 0)], ids=str
)
@pytest.mark.parametrize("algorithm", get_args(NSAlgorithmT))
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_stack_is_its_matrices(shape: tuple[int, ...], algorithm: Any, precision: Any) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    orthogonalized = NewtonSchulz("quintic", 5, False, algorithm, precision)(x)
    with fp32_matmul_precision(precision):
        singly = [newton_schulz(matrix, 5, "quintic") for matrix in x.reshape(-1, *shape[-2:])] if x.numel() else []
    assert orthogonalized.shape == x.shape and torch.equal(x, before)
    tolerance = {"standard": 0.0}.get(algorithm, {"highest": 2e-5, "medium": 5e-2}[precision])
    for ours, theirs in zip(orthogonalized.reshape(-1, *shape[-2:]) if x.numel() else [], singly, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("steps", range(1, 13))
def test_steps_are_upstreams(name: Any, steps: int) -> None:
    """Also beyond the end of a set, where some sets begin again, others repeat their last, and others are refused."""
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    with fp32_matmul_precision("highest"):
        try:
            should = newton_schulz(x, steps, name)
        except ValueError:
            should = None
    for algorithm in get_args(NSAlgorithmT):
        if should is None:
            with pytest.raises(ValueError, match=f'must be .* with coefficient_type="{name}".*, got {steps}. Pass'):
                NewtonSchulz(name, steps, False, algorithm, "highest")
        else:
            found = NewtonSchulz(name, steps, False, algorithm, "highest")(x)
            torch.testing.assert_close(found, should, atol=1e-4, rtol=1e-3)


CUBIC = [(3.0, -2.5, 0.0), (2.5, -1.5, 0.0), (2.5, -1.5, 0.0), (2.25, -1.25, 0.0), (1.5, -0.5, 0.0)]


@pytest.mark.parametrize("algorithm", get_args(NSAlgorithmT))
def test_a_set_of_fixed_length_is_refused_with_other_numbers_of_steps(monkeypatch: Any, algorithm: Any) -> None:
    """Upstream's cubic5, also where the installed release does not have it yet."""
    monkeypatch.setitem(_COEFFICIENT_SETS, "cubic5", CUBIC)
    NewtonSchulz("cubic5", 5, algorithm=algorithm)  # type: ignore[arg-type]
    for steps in (4, 6):
        with pytest.raises(ValueError, match=f'num_ns_steps must be 5 with .*="cubic5".*, got {steps}. Pass 5, or'):
            NewtonSchulz("cubic5", steps, algorithm=algorithm)  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", [[1] * 5, [2, 2, 1], [3, 2], [5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=str)
def test_a_zero_coefficient_saves_its_product(
    monkeypatch: Any, shape: tuple[int, int], dtype: torch.dtype, at_once: list[int]
) -> None:
    """A set may have it in some steps only, in any place of a group. The result is the same."""
    if dtype == torch.bfloat16 and max(at_once) > 1:
        pytest.skip("several steps at once are not taken in bfloat16")
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    counted: list[int] = []
    monkeypatch.setattr(
        gram, "symmetric_product", lambda *given, **named: counted.append(1) or symmetric_product(*given, **named)
    )
    products = []
    for zeros in ([], [0], [1], [4], [0, 3], [0, 1, 2, 3, 4]):
        steps = [(a, b, 0.0 if index in zeros else 0.25) for index, (a, b, _) in enumerate(CUBIC)]
        parts, rest = [], iter(steps)
        for count in at_once:
            parts.append([next(rest) for _ in range(count)])
        result = iterate(x, parts, dtype)
        X = x.double() / x.double().norm(dim=(-2, -1), keepdim=True)
        for a, b, c in steps:
            A = X @ X.mT
            X = a * X + (b * A + c * A @ A) @ X
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
        assert (result - X).norm() <= tolerance * X.norm(), zeros
        products.append((len(counted), len(zeros)))
        counted.clear()
    assert [count + zeros for count, zeros in products] == [products[0][0]] * len(products)


@pytest.mark.parametrize("n", [1, 2, 95, 192, 512, 513, 576, 770])
@pytest.mark.parametrize("stack", [1, 3])
def test_symmetric_products(n: int, stack: int) -> None:
    """In halves or not: the product, to rounding, and symmetric to the last bit where half of it was computed."""
    X = torch.randn(stack, n, 7, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    P, out = torch.eye(n, dtype=torch.float64).expand(stack, n, n), torch.full((stack, n, n), torch.nan).double()
    symmetric_product(X, X.mT, out=out)
    torch.testing.assert_close(out, X @ X.mT)
    assert n != 512 or torch.equal(out[:, :256, 256:], out[:, 256:, :256].mT)
    for plus in (P, out.clone()):
        expected = 0.5 * plus + 2 * X @ X.mT
        symmetric_product(X, X.mT, plus=plus, beta=0.5, alpha=2.0, out=out)
        torch.testing.assert_close(out, expected)
    symmetric_product(X, X.mT, plus=out, out=out)  # in place of P
    torch.testing.assert_close(out, expected + X @ X.mT)


@pytest.mark.parametrize(("c", "diagonal"), [(0.0, 0.0), (0.0, 3.0), (0.5, 0.0), (0.5, 3.0)])
def test_polynomials_of_a_gram_matrix(c: float, diagonal: float) -> None:
    X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = X @ X.mT
    before, out = A.clone(), torch.full_like(A, torch.nan)
    F, f = gram.polynomial(A, -2.0, c, out, diagonal)
    torch.testing.assert_close(f * F, -2 * A + c * A @ A + diagonal * torch.eye(6, dtype=torch.float64))
    assert torch.equal(A, before) and (F is A) == (c == diagonal == 0.0)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# By what the CPU has: shapes that "auto" iterates on in bfloat16, and others.
CPUS = {
    "nothing": ((False, False, False), [], [(64, 64), (256, 256), (768, 3072)]),
    "tiles": ((True, True, False), [(192, 192), (192, 768), (3072, 768)], [(64, 64), (128, 512), (191, 4000)]),
    "Intel's vectors": ((True, False, False), [], [(64, 64), (256, 256), (768, 3072)]),
    "AMD's vectors": (
        (True, False, True),
        [(192, 192), (256, 256), (768, 1024)],
        [(64, 64), (191, 191), (256, 384), (768, 3072)],
    ),
}


@pytest.mark.parametrize("has", CPUS)
def test_dtypes_on_a_cpu(monkeypatch: Any, has: str) -> None:
    """At "medium" precision: bfloat16 by default only where that is faster, and never for several steps at once."""
    (units, tiles, amd), in_bfloat16, in_float32 = CPUS[has]
    monkeypatch.setattr(cpu, "has_bfloat16_units", lambda: units)
    monkeypatch.setattr(cpu, "has_tiles", lambda: tiles)
    monkeypatch.setattr(cpu, "is_amd_with_bfloat16_vectors", lambda: amd)
    device, taken = torch.device("cpu"), []
    monkeypatch.setattr(module, "iterate", lambda part, blocks, dtype: taken.append((blocks, dtype)) or part)
    for shapes, dtype in ((in_bfloat16, BF16), (in_float32, F32)):
        for shape in (each for of in shapes for each in (of, of[::-1])):
            of = [NewtonSchulz("quintic", 5, algorithm=each) for each in ("standard", "gram", "auto")]
            assert [each.dtype(device, shape) for each in of] == [BF16, F32, dtype]
            of[2](torch.ones(shape))
            blocks, used = taken.pop()
            assert used == dtype and (dtype == F32 or max(map(len, blocks)) == 1)


def test_dtypes_elsewhere() -> None:
    """bfloat16 by default where nothing is known; and at other precisions never anything but float32."""
    of = {each: NewtonSchulz("quintic", 5, algorithm=each) for each in get_args(NSAlgorithmT)}
    for device, dtypes in (("cuda", (BF16, F16, F16)), ("xpu", (BF16, F32, BF16))):
        assert tuple(each.dtype(torch.device(device), (64, 64)) for each in of.values()) == dtypes
    for precision, device, algorithm in product(("high", "highest"), ("cpu", "cuda", "xpu"), of):
        exact = NewtonSchulz("quintic", 5, False, algorithm, precision)
        assert exact.dtype(torch.device(device), (512, 512)) == F32


@pytest.mark.parametrize("scale", [1e-3, 1e-9, 1e-12], ids=str)
@pytest.mark.parametrize("algorithm", get_args(NSAlgorithmT))
@pytest.mark.parametrize("shape", [(24, 40), (150, 100), (400, 300)], ids=str)
def test_the_size_of_a_matrix_does_not_matter(shape: tuple[int, int], algorithm: Any, scale: float) -> None:
    """Down to norms of 1e-11: whoever divides by the norm takes the same least one for it."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    newton_schulz = NewtonSchulz("quintic", 5, False, algorithm, "highest")
    torch.testing.assert_close(newton_schulz(x * scale), newton_schulz(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_coefficients_and_products_are_those_of_a_call(precision: Any) -> None:
    """For an iteration elsewhere, such as that of a matrix in shards."""
    orthogonalize = NewtonSchulz("polar_express", 10, False, "auto", precision)
    x = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    X = x / x.norm()
    assert [*orthogonalize.coefficients] == coefficients("polar_express", 10)
    with orthogonalize.products(torch.float32):
        assert torch.get_float32_matmul_precision() == precision
        for a, b, c in orthogonalize.coefficients:
            A = X @ X.mT
            X = a * X + (b * A + c * A @ A) @ X
    torch.testing.assert_close(X, orthogonalize(x), atol=1e-4, rtol=1e-4)
    with orthogonalize.products(torch.float32, several_steps=True):
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_large_batch_goes_in_parts(monkeypatch: Any) -> None:
    """Whose temporary memory is bounded: the result is the same."""
    x = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(0))
    sizes = []
    monkeypatch.setattr(module, "iterate", lambda part, *rest: sizes.append(len(part)) or iterate(part, *rest))
    whole = NewtonSchulz("quintic", 5)(x)
    monkeypatch.setitem(batches.LIMITS, "cpu", (256, 2 * 4 * 12 * 20))
    torch.testing.assert_close(NewtonSchulz("quintic", 5)(x), whole, atol=1e-5, rtol=1e-5)
    monkeypatch.setitem(batches.LIMITS, "cpu", (8, 2**30))
    torch.testing.assert_close(NewtonSchulz("quintic", 5)(x), whole, atol=1e-5, rtol=1e-5)
    assert sizes == [5, 2, 2, 1, 1, 1, 1, 1, 1]


def test_float16_is_summed_in_float32(monkeypatch: Any) -> None:
    """Whatever cuBLAS is allowed otherwise, which is as it was afterwards."""
    flags, seen = torch.backends.cuda.matmul, []
    reduction, accumulation = "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"
    # In the order in which torch gained them: 2.6 has one, 2.9 two.
    names = [name for name in (reduction, accumulation, reduction + "_split_k") if hasattr(flags, name)]
    monkeypatch.setattr(NewtonSchulz, "dtype", lambda *_: torch.float16)

    def look() -> dict[str, bool]:
        return {name: getattr(flags, name) for name in names}

    def allow(values: dict[str, bool]) -> None:
        for name in names[:2]:
            pair = (values[name], values[name + "_split_k"]) if name + "_split_k" in values else None
            setattr(flags, name, pair or values[name])

    before = look()
    monkeypatch.setattr(module, "iterate", lambda part, *_: seen.append(look()) or part)
    try:
        for allowed, split_k in ((True, True), (False, False), (False, True)):  # torch refuses the fourth
            values = dict(zip(names, (allowed, True, split_k), strict=False))
            allow(values)
            NewtonSchulz("quintic", 5)(torch.ones(4, 6))
            inside = {**values, reduction: False, accumulation: False}
            assert seen.pop() == {name: inside[name] for name in names} and look() == values
    finally:
        allow(before)
