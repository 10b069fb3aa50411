"""What `sltrain-bench` measures. Everything comes in as an argument: modules, functions, and a place for progress."""
