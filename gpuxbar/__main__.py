"""`python -m gpuxbar`, the command line."""

from gpuxbar.cli import app

app(prog_name="gpuxbar")
