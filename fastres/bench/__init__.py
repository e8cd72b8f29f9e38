"""`fastres bench`: whole networks, fastres beside its peers, each in a process of its own.

harness.py drives the contenders' processes (worker.py) in interleaved rounds; contenders.py and peers.py say what each
of them does; stats.py turns samples into medians, spreads and verdicts; report.py and plot.py show them; machine.py
says where it ran.
"""
