"""From 2D to 3D: GPS-guided score distillation."""
