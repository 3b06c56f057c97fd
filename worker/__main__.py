"""`python -m worker [--no-broker]`: run a worker."""

import sys

from worker.app import main

main(sys.argv[1:])
