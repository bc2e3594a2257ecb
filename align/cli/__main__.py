"""Entry point of `python -m align.cli`."""

from align.cli import main

if __name__ == "__main__":
    main()
