"""pycm measured against its peers, interleaved in one process. `python -m benchmarks --help`."""
