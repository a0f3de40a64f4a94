"""``python launch.py --config NAME_OR_PATH --train``: threestudio's command, on any device."""

import sys

from gps_guidance.lift.engine import launch

if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
