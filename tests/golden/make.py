"""Writes the golden files: `python -m tests.golden.make [CASE ...]`."""

from __future__ import annotations

import sys

from tests.golden.paper import CASES, Golden, run
from tests.ranks import Ranks


def main(names: list[str]) -> None:
    """Write the files of the named cases, or of all."""
    with Ranks(1, timeout_s=600.0) as ranks:
        for name in names or CASES:
            golden: Golden = ranks.run(run, CASES[name])[0]
            for seed in range(3):
                changed: Golden = ranks.run(run, CASES[name], seed)[0]
                agree = changed.positions == golden.positions
                pairs = [(changed.parameters[key], kept) for key, kept in golden.parameters.items()]
                drift = max(float((one - other).abs().max()) for one, other in pairs)
                print(f"{name}: weights changed in their last bit, seed {seed}: {agree=}, parameters {drift:.1e}")
                if not agree:
                    sys.exit(f"{name}: round-off decides. Take another seed of colm.")
            golden.save(name)


if __name__ == "__main__":
    main(sys.argv[1:])
