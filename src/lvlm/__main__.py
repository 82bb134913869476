"""``python -m lvlm VERB …``."""

import sys

from lvlm.commands import main

sys.exit(main())
