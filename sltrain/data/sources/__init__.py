"""Where documents come from: one file a source, found by name. What a source is: data/documents.py."""
