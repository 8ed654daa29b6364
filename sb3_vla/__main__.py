"""``python -m sb3_vla`` is ``sb3-vla``."""

import sys

from sb3_vla.cli import main

sys.exit(main())
