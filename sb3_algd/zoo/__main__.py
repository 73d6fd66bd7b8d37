"""``python -m sb3_algd.zoo <command>``, the same as ``sb3-algd <command>``."""

from sb3_algd.cli import main

if __name__ == "__main__":
    main()
