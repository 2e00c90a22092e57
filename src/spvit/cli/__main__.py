"""`python -m spvit.cli` is the command."""

import sys

from spvit_command import main

sys.exit(main())
