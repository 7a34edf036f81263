"""python -m nanodeploy"""

import sys

from nanodeploy.cli import main

sys.exit(main())
