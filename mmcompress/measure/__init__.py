"""Size, latency, memory and quality, each with how sure it is."""
