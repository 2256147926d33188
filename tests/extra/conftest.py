"""Tests of packages that are in no lock: `make test-extra` installs them into the folder HYBRIDRL_EXTRA names."""

import os
import sys

if "HYBRIDRL_EXTRA" in os.environ:
    sys.path.append(os.environ["HYBRIDRL_EXTRA"])  # last: what the lock installs stays what it is
else:
    collect_ignore_glob = ["test_*.py"]
