#!/usr/bin/env python3
"""Fetch axe-core, which a test runs in the page, into tests/.axe.

`make parts` calls it. The archive is of one version, and its SHA-256 is
checked. Nothing of it is part of koi.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import urllib.request
from pathlib import Path

VERSION = "4.14.1"
URL = f"https://registry.npmjs.org/axe-core/-/axe-core-{VERSION}.tgz"
SHA256 = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
SCRIPT = Path(__file__).resolve().parent / ".axe" / f"axe-{VERSION}.js"


def fetch() -> None:
    """Write SCRIPT, unless it is there. Raises OSError and ValueError."""
    if SCRIPT.exists():
        return
    with urllib.request.urlopen(URL, timeout=60) as reply:
        archive = reply.read()
    if hashlib.sha256(archive).hexdigest() != SHA256:
        raise ValueError(f"{URL}: unexpected SHA-256")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        text = files.extractfile("package/axe.min.js").read()
    SCRIPT.parent.mkdir(exist_ok=True)
    SCRIPT.write_bytes(text)


if __name__ == "__main__":
    try:
        fetch()
    except (OSError, ValueError) as error:
        sys.exit(f"fetch_axe.py: error: {error}")
