"""`python -m tritrun`, the same as the `tritrun` command."""

from tritrun.cli import app

if __name__ == "__main__":
    app()
