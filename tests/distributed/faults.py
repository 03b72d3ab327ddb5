"""Faults that have happened in trainers of this kind, to show that the comparison of layouts sees them."""
