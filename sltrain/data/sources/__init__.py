"""The built-in sources of text, one file each, found by name. data/documents.py defines what a source is."""
