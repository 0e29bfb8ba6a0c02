"""python -m batt_nb: the command line."""
from batt_nb.cli import app

app()
