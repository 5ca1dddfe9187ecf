"""`python -m pic_rag` is `pic-rag`."""

from __future__ import annotations

import sys

from pic_rag.cli import main

if __name__ == "__main__":
    sys.exit(main())
