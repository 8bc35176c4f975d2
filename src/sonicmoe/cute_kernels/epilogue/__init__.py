"""What happens to the accumulators: one class each, over one of two ways to hand results out (base.py, ring.py)."""
