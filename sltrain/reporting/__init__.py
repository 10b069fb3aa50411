"""Run folders -> one table, its figures and a page. Knows plain data, and nothing of how a run is made."""
