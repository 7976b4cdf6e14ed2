"""The serving benchmark: our server and its peers, in turns, on one machine. Start with `python -m bench.serve --help`."""
