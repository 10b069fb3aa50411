"""`torchrun -m sltrain.train KEY=VALUE ...`: the name under which torchrun starts `sltrain-train`.

`import sltrain.train` puts this module in the place of the function `sltrain.train`; so it can be called as that one.
"""

import sys
from types import ModuleType
from typing import Any

from sltrain.api import public
from sltrain.commands.train import main


class _Callable(ModuleType):
    __wrapped__ = staticmethod(public.train)  # whose signature it has

    def __call__(self, *arguments: Any, **keys: Any) -> public.Run:
        return public.train(*arguments, **keys)


if __name__ == "__main__":
    main()
else:
    sys.modules[__name__].__class__ = _Callable
