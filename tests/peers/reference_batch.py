"""Runs many commands of the reference, release 1.1.1, in one process: JSON lists of arguments, one in a line, on standard
input; `done` or `failed: …` for each on standard output.

What its command line has no flags for goes through its Python interface: `["api", "sign" | "verify", MODEL, BUNDLE, KEY,
HASH, SHARD_SIZE]`, of files where SHARD_SIZE is 0."""

import contextlib
import io
import json
import pathlib
import sys

from model_signing import hashing, signing, verifying
from model_signing._cli import main


def api(action, model, bundle, key, algorithm, shard_size):
    model, bundle, key = pathlib.Path(model), pathlib.Path(bundle), pathlib.Path(key)
    how, size = hashing.Config(), int(shard_size)
    if size:
        how.use_shard_serialization(hashing_algorithm=algorithm, shard_size=size)
    else:
        how.use_file_serialization(hashing_algorithm=algorithm)
    how.set_ignored_paths(paths=[], ignore_git_paths=True)
    if action == "sign":
        signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(how).sign(model, bundle)
    else:
        verifying.Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(how).verify(model, bundle)


for line in sys.stdin:
    said = io.StringIO()
    try:
        job = json.loads(line)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            api(*job[1:]) if job[0] == "api" else main(job, standalone_mode=False)
        print("done")
    except BaseException as error:
        print("failed:", repr(error), said.getvalue().replace("\n", " ")[-300:])
