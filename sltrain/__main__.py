"""`python -m sltrain COMMAND ...`, also under torchrun: `torchrun --nproc_per_node=8 -m sltrain train ...`."""

from sltrain.commands.main import main

if __name__ == "__main__":
    main()
