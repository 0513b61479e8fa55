"""`msense finetune` as a file: `ray job submit -- python jobs/finetune.py ...`, with the same flags."""

import sys

from msense.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
