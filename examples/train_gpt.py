# SPDX-License-Identifier: Apache-2.0
"""Trains one small GPT on real text with six optimizers, and says which learned fastest.

All start from the same weights and see the same batches. The table is printed; the measurements (JSON), the curves and
what AdaptiveMuon's diagnostics show of the matrices meanwhile (PNG) are written to runs/.
"""

import math
from dataclasses import replace
from pathlib import Path

import options
import plots
import report
from rates import Rates
from training import Protocol, train


def main() -> None:
    """Trains, prints the table, writes the files."""
    parser = options.parser(__doc__.splitlines()[0], seed=1)
    parser.add_argument("--lr", type=options.positive_float, help="learning rate of the one --method given")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="directory to write to (default: %(default)s)")
    arguments, methods, text = options.parse(parser)
    if arguments.lr is not None and len(methods) != 1:
        parser.error(f"--lr must be given with exactly one --method, got {len(methods)}. Name it, or leave --lr out.")
    rates, protocol = Rates(), replace(Protocol(), steps=arguments.steps)
    try:
        chosen = {method: arguments.lr or rates.chosen(method) for method in methods}
        scalar_lr = arguments.lr if methods == ["adamw"] and arguments.lr else rates.chosen("adamw")
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    print(
        f"Text: {text.source}, of which {len(text.train) / 1e6:.1f} MB to train on and {len(text.validation) / 1e6:.1f} MB to "
        f"validate.\nEach method: {protocol.steps} steps of {protocol.batch} windows of {protocol.shape.context} bytes."
    )
    records = [
        train(
            method,
            text.train,
            text.validation,
            lr=lr,
            scalar_lr=scalar_lr,
            protocol=protocol,
            seed=arguments.seed,
            device=arguments.device,
        )
        for method, lr in chosen.items()
    ]
    records.sort(key=lambda record: (math.isnan(record.final_loss), record.final_loss))

    sweep = None if arguments.lr else rates.content["setting"]
    print(f"\n{report.table(records)}\n\n{report.footnote(protocol, arguments.seed, sweep)}")
    numbers, picture = arguments.out / "train_gpt.json", arguments.out / "train_gpt.png"
    numbers.write_text(report.document(records, protocol, text.describe(), arguments.seed, arguments.device))
    plots.curves(records, picture)
    print(f"\nMeasurements: {numbers}   Curves: {picture}")
    inside = arguments.out / "train_gpt_matrices.png"
    if plots.matrices(records, inside):
        print(f"The matrices through training: {inside}")


if __name__ == "__main__":
    main()
