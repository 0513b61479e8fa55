"""`msense build` as a file: `ray job submit -- python jobs/build_dict.py ...`, with the same flags."""

import sys

from msense.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["build", *sys.argv[1:]]))
