"""Run folders: what lies in one, who may write to it, and what it says of its run."""
