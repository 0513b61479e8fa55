"""`msense make` as a file: `ray job submit -- python jobs/make.py ...`, with the same flags."""

import sys

from msense.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["make", *sys.argv[1:]]))
