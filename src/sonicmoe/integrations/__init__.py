"""Adapters to the places where people already train. Each module is imported by itself; nothing above imports them."""
