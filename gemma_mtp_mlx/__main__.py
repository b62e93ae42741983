"""`python -m gemma_mtp_mlx` is the command `mlx-gemma-mtp`."""

import sys

from gemma_mtp_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main())
