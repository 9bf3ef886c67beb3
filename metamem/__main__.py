"""`python -m metamem`, and so `torchrun -m metamem`: the command line."""

from metamem.cli import app

app()
