"""`python -m puna` is the `puna` command."""

from __future__ import annotations

import sys

from puna.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
