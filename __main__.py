"""``python -m bpwise``: the command line, where no ``bpwise`` is on the path."""

from .cli import main

if __name__ == "__main__":
    main()
