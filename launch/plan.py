"""Plan a run without starting it: `python launch/plan.py --config FILE.yaml --nodes 64 [--section.key value ...]`.

It prints memory per rank, traffic, time of a step and MFU. Nothing is written, and no GPU is needed.
"""

import sys

from megamult.runtime.console import whole_or_nothing

if __name__ == "__main__":
    with whole_or_nothing():
        from megamult.train.planning.main import main

        sys.exit(main())
