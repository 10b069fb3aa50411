"""Config or run folder -> objects. The one part that may see every room; commands use it, and `sltrain.load`.

What a command needs is in the file of its name (sltrain-train's is run.py). The others are shared: model.py,
trainer.py, data.py and memory.py by whatever trains, plans or measures, saved.py by whatever opens a trained model.
"""

from collections.abc import Callable

Say = Callable[[str], None]  # tells the user a line
