# SPDX-License-Identifier: Apache-2.0
"""The JSON file of a part: written again after every measurement, so that what was measured outlives the part."""

import gc
import json
import math
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import circumstances, installed


# What stands in the place of a result.
RAISED, NOT_MEASURED = "raised", "not measured"


class Record:
    """The measurements of one part, by name, and the seconds that the part may take.

    A measurement is what a function returned, ``{RAISED: ...}`` with the exception's text, or ``{NOT_MEASURED: ...}`` with
    the reason.

    Args:
        path: The JSON file.
        device: The device to measure on.
        seconds: The time for the whole part.
        settings: What else decides the numbers.
    """

    def __init__(self, path: Path, device: torch.device, seconds: float, settings: Mapping[str, Any]) -> None:
        self.path, self.device, self._until = path, device, time.monotonic() + seconds
        self.content: dict[str, Any] = {
            "machine": machine(device),
            "settings": {**settings, "seconds": seconds},
            "complete": False,
            "measurements": {},
        }
        self._write()

    @property
    def seconds_left(self) -> float:
        """The seconds until the part must end."""
        return self._until - time.monotonic()

    def measure(self, name: str, function: Callable[[], Any], *, about: float, needs_gpu: bool = False) -> Any:
        """Note what a function returns, or why there is no result, and return the result or None.

        Args:
            name: The name of the measurement.
            function: What measures.
            about: Its seconds, as expected. It is skipped if fewer are left.
            needs_gpu: Whether it is skipped on a CPU.
        """
        if needs_gpu and self.device.type != "cuda":
            return self.note(name, {NOT_MEASURED: "needs a GPU"})
        if self.seconds_left < about:
            return self.note(name, {NOT_MEASURED: f"needs about {about:g} s, and {self.seconds_left:.0f} s are left"})
        start, result = time.monotonic(), None
        try:
            result = function()
            self.note(name, result, time.monotonic() - start)
        except Exception as error:
            self.note(name, failure(error), time.monotonic() - start)
        gc.collect()
        if self.device.type == "cuda":
            with suppress(Exception):  # a kernel that failed leaves a context in which everything raises
                torch.cuda.empty_cache()
        return result

    def note(self, name: str, result: Any, seconds: float | None = None, quiet: bool = False) -> None:
        """Add a measurement, write the file, and print one line, if quiet only of a failure."""
        self.content["measurements"][name] = _finite(result)
        self._write()
        what = next((f"{key}: {result[key]}" for key in (RAISED, NOT_MEASURED) if key in result), "measured")
        if quiet and RAISED not in result:
            return
        took = f" ({seconds:.1f} s)" if seconds is not None else ""
        print(f"  {name}: {what.splitlines()[0][:150]}{took}", flush=True)

    def close(self) -> None:
        """Mark the part as complete: all its measurements were made, noted as failed, or noted as skipped."""
        self.content["complete"] = True
        self._write()

    def _write(self) -> None:
        """Write the file, of which a reader never meets half."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def failure(error: BaseException) -> dict[str, str]:
    """Return what to note of an exception: its text, and the end of its traceback."""
    lines = traceback.format_exception(error)
    return {RAISED: f"{type(error).__name__}: {error}"[:2000], "traceback": "".join(lines)[-2000:]}


def worst(numbers: Iterable[float]) -> float:
    """Return the largest number, or NaN if one is: Python's own max may pass over it."""
    found = [float(each) for each in numbers]
    return next((each for each in found if math.isnan(each)), max(found))


def machine(device: torch.device) -> dict[str, Any]:
    """Return the machine, the card, and the versions that a result on a GPU depends on."""
    found = circumstances(device)
    found["versions"] |= {name: installed(name) for name in ("triton", "numpy")}
    if device.type == "cuda":
        found["versions"] |= {"cuda": torch.version.cuda, "driver": _driver()}
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def _driver() -> str:
    """The driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return done.stdout.strip()


def _finite(value: Any) -> Any:
    """The same, with text for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
