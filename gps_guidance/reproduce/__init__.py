"""``gps-guidance reproduce``: the paper's tables, ablations and figures, at either scale."""
