# SPDX-License-Identifier: Apache-2.0
"""Trains one small GPT on real text with six optimizers, and says which learned fastest.

All start from the same weights and see the same batches. The table is printed; the measurements (JSON) and the curves
(PNG) are written to runs/.
"""

import json
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
        parser.error(f"--lr needs exactly one --method, got {len(methods)}: name it, or leave --lr out.")
    rates, protocol = Rates(), replace(Protocol(), steps=arguments.steps)
    try:
        chosen = {method: arguments.lr or rates.chosen(method) for method in methods}
        scalar_lr = arguments.lr if methods == ["adamw"] and arguments.lr else rates.chosen("adamw")
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

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
    records.sort(key=lambda record: record.final_loss)

    print(f"\n{report.table(records)}\n\n{report.footnote(records, protocol, text.source, arguments.seed)}")
    facts = report.document(records, protocol, text.describe(), arguments.seed, arguments.device)
    (arguments.out / "train_gpt.json").write_text(json.dumps(facts, indent=2) + "\n")
    plots.curves(records, arguments.out / "train_gpt.png")
    print(f"\nMeasurements: {arguments.out / 'train_gpt.json'}   Curves: {arguments.out / 'train_gpt.png'}")


if __name__ == "__main__":
    main()
