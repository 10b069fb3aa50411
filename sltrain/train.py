"""`torchrun -m sltrain.train KEY=VALUE ...`: the name under which torchrun starts `sltrain-train`."""

from sltrain.commands.train import main

if __name__ == "__main__":
    main()
