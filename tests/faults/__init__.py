"""A campaign of faults: small training runs are killed, starved and corrupted on purpose, and must lose nothing.

    seed -> schedule (schedule.py, with the weights of rates.py)
         -> a run that is started again after every fault (campaign.py, starts.py; inside its processes hooks.py)
         -> comparison with a run that nothing disturbed (verdict.py)

README.md says what is drawn and what was seen. `python -m tests.faults --help` lists the commands.
"""
