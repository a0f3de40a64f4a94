"""Control image generation and 3D with the GPS tag of a photo.

First implementation of "GPS as a Control Signal for Image Generation" (CVPR 2025). Importing the
package is cheap; import what you need from its modules, for example ``gps_guidance.geo``.
"""

__version__ = "0.1.0"
