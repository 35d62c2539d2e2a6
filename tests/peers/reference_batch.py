"""Runs many commands of the reference, release 1.1.1, in one process: JSON lists of arguments, one in a line, on standard
input; `done` or `failed: …` for each on standard output."""

import contextlib
import io
import json
import sys

from model_signing._cli import main

for line in sys.stdin:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main(json.loads(line), standalone_mode=False)
        print("done")
    except BaseException as error:
        print("failed:", repr(error), said.getvalue().replace("\n", " ")[-300:])
