"""The decoder, its loss, and its parameter counts."""
