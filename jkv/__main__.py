"""`python -m jkv`: the command line."""

from jkv.cli import main

if __name__ == "__main__":
    main()
