"""`python -m spvit.cli` is the command, for launchers such as torchrun."""

import sys

from spvit_command import main

sys.exit(main())
