"""What another package can bring to sltrain."""
