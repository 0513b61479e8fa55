"""`msense merge-teacher` as a file: `ray job submit -- python jobs/merge_teacher.py ...`, with the same flags."""

import sys

from msense.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["merge-teacher", *sys.argv[1:]]))
