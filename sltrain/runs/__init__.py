"""Run folders: what is in one, which process may write to it, and what it says about its run."""
