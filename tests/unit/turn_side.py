"""A side of a benchmark: turn_side.py STATUS --out FILE."""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    status, _, file = sys.argv[1:]
    began = time.monotonic()
    sys.stdin.readline()
    Path(file).write_text(json.dumps({"waited": time.monotonic() - began, "number": os.environ.get("NUMBER")}))
    time.sleep(0.3)
    sys.exit(int(status))
