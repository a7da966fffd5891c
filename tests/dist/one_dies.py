"""Rank 1 leaves without a word; rank 0 waits for it, and notes for how long."""

import os
import sys
import time
from pathlib import Path

from keel.errors import KeelError
from keel.training.ranks import joined

with joined("ddp", "cpu", 20.0) as ranks:
    ranks.gather(lambda: "here")
    if ranks.rank == 1:
        os._exit(0)
    begin = time.monotonic()
    try:
        ranks.gather(lambda: "still here")
    except KeelError as error:
        (Path(sys.argv[1]) / "waited").write_text(str(time.monotonic() - begin))
        print(error, flush=True)
        os._exit(2)
