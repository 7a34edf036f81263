"""python -m nanodeploy.serve MODEL ...: the same as `nanodeploy serve MODEL ...`"""

import sys

from nanodeploy.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))
