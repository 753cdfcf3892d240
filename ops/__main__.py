"""`python -m ops`. Multiprocessing's spawn does not import a package's `__main__` again in the child."""

import sys

from ops.cli import main

sys.exit(main())
