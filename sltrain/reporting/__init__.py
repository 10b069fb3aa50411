"""Run folders -> one table, its figures and a page. Works on plain data and does not know how a run is made."""
