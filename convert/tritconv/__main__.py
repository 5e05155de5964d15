"""`python -m tritconv`."""

import sys

# -m puts the current folder first: a torch.py that lies there must not run in place of the library
if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]

from tritconv.cli import app

app(prog_name="tritconv")
