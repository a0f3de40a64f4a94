"""``python -m gps_guidance.nocompile.start FLAGS`` in threestudio's folder: its own launch.py.

Everything below runs at import, because the child processes in which threestudio embeds prompts
import this module again, under another name (multiprocessing would not, were it ``__main__.py``).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

LAUNCH = Path("launch.py")

logging.basicConfig(format="%(levelname)s %(message)s")
logging.getLogger("gps_guidance").setLevel(logging.INFO)
if not (LAUNCH.is_file() and Path("threestudio").is_dir()):
    sys.exit(f"{Path.cwd()} is no clone of threestudio: it has no launch.py and threestudio/.")
sys.path.insert(0, os.getcwd())

from gps_guidance.nocompile import host  # noqa: E402

host.prepare()
if __name__ == "__main__":
    host.load_extension()
    __file__ = str(LAUNCH)  # what launch.py and its tracebacks take for their own
    sys.argv[0] = str(LAUNCH)
    exec(compile(LAUNCH.read_text("utf-8"), LAUNCH.name, "exec"))
