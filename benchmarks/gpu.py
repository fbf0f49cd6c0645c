# SPDX-License-Identifier: Apache-2.0
"""All that only a GPU can say, in one command without network: ``make gpu PYTHON=python3 [WHEELS=folder]``.

Three parts, in order of worth: "right" runs the tests that need a GPU, "fast" measures ceilings, products, steps and a
training step, "exact" measures rounding and compares sharded with whole matrices. Each part is a process of its own,
and writes its JSON after every measurement: what was measured stays when a part fails or is stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch
from common import RESULTS
from on_gpu.record import RAISED, Record, failure
from on_gpu.sizes import ON_GPU, REHEARSAL
from on_gpu.summary import summary


MODULES = {"right": ("right",), "fast": ("products", "steps", "training", "variants"), "exact": ("exact", "ranks")}
# A part gets these further seconds to end by itself.
GRACE = 20


def main() -> int:
    """Runs the parts, prints the table, and returns 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--minutes", type=float, default=8, help="for each part (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="of the JSON files; in a rehearsal a temporary one")
    parser.add_argument("--rehearse", action="store_true", help="all of it at tiny sizes on the CPU")
    parser.add_argument(
        "--in-this-process", action="store_true", help="run one part here: what the parts are started with"
    )
    args = parser.parse_args()
    if args.in_this_process:
        run_part(args.parts[0], args.directory, args.minutes, args.rehearse)
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("the machine must have a GPU that torch finds, got none. Use --rehearse to try it on the CPU.")
    try:
        import_module("emerging_optimizers.adaptive_muon")
    except ImportError as error:
        parser.error(
            f"this Python must have emerging-optimizers and this package, got {error!r}. Use make gpu WHEELS=folder."
        )
    directory = args.directory or (Path(tempfile.mkdtemp(prefix="gpu-")) if args.rehearse else RESULTS)
    failed = [part for part in args.parts if not start_part(part, directory, args.minutes, args.rehearse)]
    print(f"\n{summary(directory)}\n\nwrote {directory}", flush=True)
    if failed:
        print("failed:", ", ".join(failed))
    return 1 if failed else 0


def start_part(part: str, directory: Path, minutes: float, rehearse: bool) -> bool:
    """Runs a part in a process of its own, and returns whether all that it measured went well."""
    print(f"\n== {part}", flush=True)
    path = directory / f"gpu-{part}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--in-this-process", "--parts", part, "--directory", str(directory)]
    command += ["--minutes", str(minutes), *(["--rehearse"] if rehearse else [])]
    # Tests, and what torch decides by itself, must not find the GPU in a rehearsal.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if rehearse else {}
    try:
        status = subprocess.run(command, env=os.environ | hidden, timeout=60 * minutes + GRACE, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {minutes:g} minutes", flush=True)
        return False
    if status or not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))["measurements"].values()
    return not any(each.get(RAISED) or each.get("failed") or each.get("status") for each in found)


def run_part(part: str, directory: Path, minutes: float, rehearse: bool) -> None:
    """Runs a part here."""
    if rehearse:
        torch.set_num_threads(1)
    device = torch.device("cpu" if rehearse else "cuda:0")
    sizes = REHEARSAL if rehearse else ON_GPU
    record = Record(
        directory / f"gpu-{part}.json",
        device,
        60 * minutes,
        asdict(sizes) | {"sets": [*sizes.sets], "rehearsal": rehearse},
    )
    for name in MODULES[part]:
        try:
            import_module(f"on_gpu.{name}").run(record, sizes)
        except Exception as error:  # of the module itself; a measurement's is noted under its name
            record.note(name, failure(error))
    record.close()


if __name__ == "__main__":
    sys.exit(main())
