"""``python -m lvlm VERB …``."""

import sys

from lvlm.main import main

sys.exit(main())
