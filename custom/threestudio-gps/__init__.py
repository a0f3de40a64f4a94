"""What threestudio loads from its ``custom/`` folder: GPS-guided score distillation.

Registers ``gps-sds-guidance``, ``gps-prompt-processor`` and ``gps-pyramid-grid``. The work is done
by the installed package ``gps_guidance``; here are only the classes that threestudio builds.
"""

from .requirements import check_requirements, fit_to_lightning, fit_to_torch

NAMES = ("gps-sds-guidance", "gps-prompt-processor", "gps-pyramid-grid")

check_requirements(NAMES)
fit_to_lightning()
fit_to_torch()

from .geometry import gps_pyramid_grid  # noqa: E402, F401
from .guidance import gps_sds_guidance  # noqa: E402, F401
from .prompt_processors import gps_prompt_processor  # noqa: E402, F401
