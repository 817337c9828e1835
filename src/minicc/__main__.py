"""`minicc` on the command line; the commands are in `minicc.cli`."""

from __future__ import annotations

from minicc.cli.app import main

if __name__ == "__main__":
    main()
