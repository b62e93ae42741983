"""Average drafter checkpoints into DIR/drafter.pt: python -m training.average --out DIR A.pt B.pt.

Checkpoints that continued one another and ended their decays at different places of the same
valley are worth more together than each alone.
Source: Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization".
"""

import argparse
from pathlib import Path

import torch


def main() -> None:
    """Parse the command line and average."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    args = parser.parse_args()
    models = [torch.load(path, weights_only=True)["model"] for path in args.checkpoints]
    mean = {name: sum(model[name] for model in models) / len(models) for name in models[0]}
    torch.save({"model": mean}, args.out / "drafter.pt")


if __name__ == "__main__":
    main()
