"""Measurements beside bare references in the same run. `README.md` has the rules and the results."""
