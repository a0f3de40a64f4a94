"""Geotagged photos in, a clean dataset folder out. No torch."""
