"""`python -m spvit.cli` is the command too; see `spvit_command`."""

import sys

from spvit_command import main

sys.exit(main())
