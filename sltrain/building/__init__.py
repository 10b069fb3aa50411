"""Configuration -> objects. The one package that takes a run's whole configuration apart; what is below it gets values.

model.py, trainer.py, data.py and memory.py are shared by what trains, plans or measures; run.py puts a training run
together from them and from machine.py, folder.py, start_text.py and memory_guard.py.
"""
