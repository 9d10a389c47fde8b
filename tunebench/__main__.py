"""`python -m tunebench`: the `tunebench` command of this very interpreter."""

from tunebench.cli import main

if __name__ == "__main__":
    main()
