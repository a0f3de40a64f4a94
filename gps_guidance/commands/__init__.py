"""The verbs of ``gps-guidance``, by what they work on."""
