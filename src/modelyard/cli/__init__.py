"""The command line: one file per command, each importing its world inside the command."""
