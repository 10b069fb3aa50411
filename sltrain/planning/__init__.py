"""Parameters and bytes, counted on a model without memory before anything is allocated."""
