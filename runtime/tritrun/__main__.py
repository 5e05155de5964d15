"""`python -m tritrun`, the same as the `tritrun` command."""

import sys

# -m puts the current folder first: a numpy.py that lies there must not run in place of the library
if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]

from tritrun.cli import app

if __name__ == "__main__":
    app()
