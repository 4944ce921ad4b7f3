"""``python -m vdiff``: the same as the installed ``vdiff`` command."""

from vdiff.cli.main import main

if __name__ == "__main__":
    main()
