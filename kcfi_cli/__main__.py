"""`python -m kcfi_cli`: what launchers of several processes start."""

import sys

from kcfi_cli import main

if __name__ == "__main__":
    sys.exit(main())
