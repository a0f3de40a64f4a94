"""A procedural world with GPS-tagged photos and exact ground truth, and models trained on it."""
