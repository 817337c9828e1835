"""The command line: argument parsing and printing over the public API; the only users of typer."""
