"""Stated, seeded damage to pictures, recordings and texts: what robustness is measured with."""
