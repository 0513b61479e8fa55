"""`msense evaluate` as a file: `ray job submit -- python jobs/evaluate.py ...`, with the same flags."""

import sys

from msense.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
