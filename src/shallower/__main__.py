"""`python -m shallower`: the command line."""

from shallower.app.cli import main

if __name__ == "__main__":
    main()
