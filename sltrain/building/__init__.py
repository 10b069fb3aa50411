"""Config or run folder -> objects. The one part that may see every room; commands use it, and `sltrain.load`.

model.py, trainer.py, data.py and memory.py are shared by what trains, plans or measures, saved.py by what opens a
trained model. The others are a command's: run.py is sltrain-train's, spectrum.py belongs to report.py, verify.py to
export.py.
"""
