"""Checks of the adopted families: `python -m tests.families`. `make test` runs them for one family per kind of seam."""
