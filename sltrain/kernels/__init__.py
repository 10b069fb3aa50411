"""Products with a sparse matrix on a CPU, compiled from C++ on first use."""
