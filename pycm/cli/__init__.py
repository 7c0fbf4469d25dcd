"""The command line: `pycm demo`, `pycm match`, `pycm info`."""
