"""`python -m crosstrace` is the command line."""

from crosstrace.cli import main

if __name__ == "__main__":
    main()
