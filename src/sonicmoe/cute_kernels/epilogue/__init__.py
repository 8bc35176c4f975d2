"""What happens to the accumulators: one class each, over one driver that owns barriers, fences and TMA stores."""
