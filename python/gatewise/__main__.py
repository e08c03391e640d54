"""`python -m gatewise` is the `gatewise` command."""

import sys

from .cli import main

sys.exit(main())
