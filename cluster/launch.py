"""Starts or resumes a study on the head of a Ray cluster; what `ray submit` and `ray job submit` run.

    ray submit cluster/onprem.yaml cluster/launch.py --study studies/quickstart.yaml

The study's driver outlives this script. `python cluster/launch.py --help` lists the options.
"""

import sys

from tunebench.cluster.launch import main

if __name__ == "__main__":
    sys.exit(main())
