"""`python -m vitprune`, the same as the command `vitprune`."""

from vitprune.cli import main

if __name__ == "__main__":
    main()
