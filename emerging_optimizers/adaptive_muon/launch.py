# SPDX-License-Identifier: Apache-2.0
"""Run an unmodified Megatron training script with our adaptive_muon and its flags.

torchrun ... -m emerging_optimizers.adaptive_muon.launch pretrain_gpt.py --optimizer adaptive_muon ...
"""

import functools
import runpy
import sys
from argparse import ArgumentParser
from pathlib import Path


def main() -> None:
    """Register adaptive_muon, add its flags to Megatron's command line and run the script as ``__main__``."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit("usage: torchrun ... -m emerging_optimizers.adaptive_muon.launch SCRIPT [ARGUMENTS OF THE SCRIPT]")
    del sys.argv[0]
    script = sys.argv[0]
    if not Path(script).is_file():
        sys.exit(f"launch: the first argument must be the file of a training script, got {script!r}. Check the path.")
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(script).resolve().parent)  # as Python does for a script; Megatron may lie beside it

    from megatron.training import arguments

    from emerging_optimizers.adaptive_muon.integrations.megatron import add_adaptive_muon_args, register

    register()
    add_megatron_arguments = arguments.add_megatron_arguments

    @functools.wraps(add_megatron_arguments)
    def with_ours(parser: ArgumentParser) -> ArgumentParser:
        return add_adaptive_muon_args(add_megatron_arguments(parser))

    arguments.add_megatron_arguments = with_ours
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
