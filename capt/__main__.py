"""``python -m capt`` is the ``capt`` command."""

from __future__ import annotations

import sys

from capt.cli import main

if __name__ == "__main__":
    sys.exit(main())
