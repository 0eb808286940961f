"""Read the files named on standard input in a process of its own; print one JSON line for each.

A file that hangs, or takes more memory than is allowed, ends this process, not the tests.
"""

import hashlib
import json
import resource
import signal
import sys
import time
import warnings

from em_data.reading import read_micrographs

SECONDS, MEMORY = 20, 3 * 2**30


def read(path):
    """Return the hashes and the notices of all images, or {"refused": message}; raise all else."""
    hashes, notices = [], []
    try:
        for micrograph in read_micrographs(path):
            content = repr(micrograph.image.shape).encode() + micrograph.image.tobytes()
            hashes.append(hashlib.sha256(content).hexdigest())
            notices += micrograph.metadata["notices"]
    except ValueError as error:
        return {"refused": str(error)}
    return {"hashes": hashes, "notices": notices}


if __name__ == "__main__":
    warnings.simplefilter("error")  # a warning to a user who sees no file name
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for path in map(str.rstrip, sys.stdin):
        signal.alarm(SECONDS)
        start = time.monotonic()
        outcome = read(path)
        outcome |= {"path": path, "seconds": time.monotonic() - start}
        print(json.dumps(outcome), flush=True)
