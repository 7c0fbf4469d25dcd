"""pycm measured against its peers: op x case x provider, interleaved in one process (`pycm bench --help`).

cases.py says what is measured, data.py makes the arrays, providers/ holds the libraries, check.py compares their
results, machine.py measures the machine's own limits, run.py takes the times, tables.py and plot.py show them.
"""
