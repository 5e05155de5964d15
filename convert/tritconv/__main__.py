"""`python -m tritconv`."""

from tritconv.cli import app

app(prog_name="tritconv")
