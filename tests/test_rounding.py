# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding by itself: the noise, its independence, and what a number becomes."""

import math

import pytest
import torch

from emerging_optimizers.adaptive_muon.noise import Noise, round_into, rounded
from emerging_optimizers.adaptive_muon.rounding import make_keys


INT32 = {"dtype": torch.int32}
COUNT = 2**16  # as many as there are values of the noise
SIDE = 512


def keys(*prefixes: tuple[int, ...], step: int = 1, on_device: bool = False) -> torch.Tensor:
    steps = [torch.tensor(float(step))] * len(prefixes)
    return make_keys(prefixes, steps, torch.device("cpu"), steps_on_device=on_device)


def field(*prefix: int, step: int = 1, top: int = 0, left: int = 0, side: int = SIDE) -> torch.Tensor:
    """The noise of a square, in float64, from 0 to 1."""
    noise = Noise(keys(prefix, step=step), top, left).at(slice(1), range(side), side)[0]
    assert noise.dtype == torch.int32 and noise.min() >= 0 and noise.max() < COUNT
    return (noise.double() + 0.5) / COUNT


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """The correlation, in units of the deviation that it has where there is none."""
    both = torch.stack([one.flatten(), other.flatten()])
    return float(torch.corrcoef(both)[0, 1]) * math.sqrt(one.numel())


# ------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("shift", [0, 8], ids=["low bits", "high bits"])
def test_the_noise_is_uniform(shift: int) -> None:
    """By chi-squared of 256 classes, over eight fields; it is about 255, with a deviation of 22.6."""
    for place in range(8):
        noise = Noise(keys((0, place, 0))).at(slice(1), range(SIDE), SIDE)
        counts = torch.bincount((noise.flatten() >> shift) & 255, minlength=256).double()
        expected = noise.numel() / 256
        assert 165 < float(((counts - expected) ** 2 / expected).sum()) < 380
        assert abs(float(noise.double().mean()) / COUNT - 0.5) < 5 / math.sqrt(12 * noise.numel())


def test_neighbors_are_independent() -> None:
    """Along rows, along columns, and the four corners of rectangles, which a sum of rows' and columns' noise would tie."""
    noise = field(0, 3, 0)
    for down, across in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 256), (256, 0)):
        one, other = noise[down:, across:], noise[: SIDE - down, : SIDE - across]
        assert abs(correlation(one, other)) < 4.5, (down, across)
    for down, across in ((1, 1), (2, 2), (16, 64), (256, 256)):
        a, b = noise[: SIDE - down, : SIDE - across], noise[: SIDE - down, across:]
        c, d = noise[down:, : SIDE - across], noise[down:, across:]
        assert abs(correlation(a + d, b + c)) < 4.5, (down, across)
        assert abs(correlation((a - 0.5) * (d - 0.5), (b - 0.5) * (c - 0.5))) < 4.5, (down, across)
        assert abs(float((((a + d) - (b + c)) ** 2).mean()) / (4 / 12) - 1) < 0.02, (down, across)


@pytest.mark.parametrize(
    "other",
    [{"step": 2}, {"step": 1001}, {"place": 1}, {"purpose": 1}, {"block": 1}],
    ids=lambda other: "".join(other),
)
def test_steps_parameters_blocks_and_purposes_are_independent(other: dict[str, int]) -> None:
    values = {"purpose": 0, "place": 0, "block": 0, "step": 1}
    one, two = (field(v["purpose"], v["place"], v["block"], step=v["step"]) for v in (values, values | other))
    for shift in (0, 1):
        assert abs(correlation(one[shift:], two[: SIDE - shift])) < 4.5
        assert abs(correlation(one[:, shift:], two[:, : SIDE - shift])) < 4.5


def test_of_a_long_run_no_step_has_the_noise_of_another() -> None:
    found = {
        tuple(field(0, place, 0, step=step, side=4).flatten().tolist()) for place in range(30) for step in range(100)
    }
    assert len(found) == 3000


def test_a_shard_has_the_noise_of_its_place() -> None:
    whole = field(0, 5, 0)
    assert torch.equal(field(0, 5, 0, top=100, left=37, side=200), whole[100:300, 37:237])


def test_a_count_on_the_device_gives_the_same_keys() -> None:
    """One is made of Python's numbers, the other of tensors."""
    prefixes = [(purpose, place, block) for purpose in range(3) for place in range(40) for block in range(4)]
    for step in (0, 1, 2, 77, 2**20 + 3):
        assert torch.equal(keys(*prefixes, step=step), keys(*prefixes, step=step, on_device=True))


# ---------------------------------------------------------------------------------------------------------- rounding

VALUES = [1.0, 1.001, -1.001, 0.1, -3.14159, 1e-30, -7e-39, 1e-40, 3e38, 255.999, 2.0**-149]


@pytest.mark.parametrize("value", VALUES)
def test_the_mean_over_all_noise_is_the_value(value: float) -> None:
    """Exactly: each noise once, and sums in float64. The results are the two neighbors in bfloat16."""
    values = torch.full((1, COUNT), value)
    result = rounded(values, torch.arange(COUNT, **INT32)[None])
    assert float(result.double().mean()) == float(values[0, 0].double())
    assert torch.equal(result.bfloat16().float(), result)
    nearest = values[0, 0].bfloat16()
    assert {*result.unique().bfloat16().tolist()} <= {
        *(torch.nextafter(nearest, torch.tensor(end).bfloat16()).item() for end in (-math.inf, math.inf)),
        nearest.item(),
    }
    assert len(result.unique()) == 1 + (nearest.float() != values[0, 0]).item()


def test_what_bfloat16_has_stays() -> None:
    """All its 65536 numbers, infinities and NaN among them, with the largest noise."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    result = rounded(every.float()[None], torch.full((1, COUNT), COUNT - 1, **INT32))[0]
    assert torch.equal(result.bfloat16().view(torch.int16)[~every.isnan()], every.view(torch.int16)[~every.isnan()])
    assert torch.equal(result.isnan(), every.isnan())


def test_nan_of_any_bits_stays_nan_and_nothing_overflows() -> None:
    low_bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], **INT32).view(torch.float32)
    assert low_bits.isnan().all()
    largest = torch.finfo(torch.float32).max
    for noise in (0, 1, COUNT - 1):
        result = rounded(
            torch.cat([low_bits, torch.tensor([largest, -largest])])[None], torch.full((1, 6), noise, **INT32)
        )[0]
        assert result[:4].isnan().all() and result.bfloat16()[:4].isnan().all()
        assert result[4:].tolist() == [torch.finfo(torch.bfloat16).max, -torch.finfo(torch.bfloat16).max]


@pytest.mark.parametrize("shape", [(3, 5), (700, 130), (40, 5000), (2, 300, 200), (3, 0), (1, 70000)], ids=str)
def test_many_are_rounded_as_each_by_itself(shape: tuple[int, ...]) -> None:
    """Whatever is rounded at once; also where rows are not contiguous, and transposes."""
    *lead, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for _ in range(3)]
    many = make_keys(
        [(0, i, 0) for i in range(3)], [torch.tensor(1.0)] * 3, torch.device("cpu"), steps_on_device=False
    )
    if lead:
        many = many[..., None] + torch.arange(lead[0], **INT32)
    tensors = [torch.zeros(*lead, columns, rows, dtype=torch.bfloat16).mT for _ in range(3)]
    round_into(tensors, values, Noise(many, 7, 9))
    for i in range(3):
        noise = Noise(many[:, i : i + 1], 7, 9).at(slice(1), range(rows), columns)
        assert torch.equal(tensors[i], rounded(values[i][None], noise)[0].bfloat16())
    for i, row in ((0, rows // 2), (2, rows - 1)):  # one by one, from the definition of a shard
        noise = Noise(many[:, i : i + 1], 7 + row, 9).at(slice(1), range(1), columns)
        assert torch.equal(
            tensors[i][..., row : row + 1, :], rounded(values[i][None, ..., row : row + 1, :], noise)[0].bfloat16()
        )


def test_without_noise_it_is_to_nearest() -> None:
    value, tensor = torch.tensor([[1.001, 1.003]]), torch.zeros(1, 2, dtype=torch.bfloat16)
    round_into([tensor], [value], None)
    assert torch.equal(tensor, value.bfloat16())
