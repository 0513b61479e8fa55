"""`msense distill` as a file: `ray job submit -- python jobs/distill.py ...`, with the same flags."""

import sys

from msense.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
