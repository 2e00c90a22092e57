"""`python -m spvit.cli` is the command."""

import sys

from spvit.cli.main import main

sys.exit(main())
