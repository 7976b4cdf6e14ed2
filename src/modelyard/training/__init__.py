"""Makes models. Periodic, offline, throughput-bound; hands over a bundle and knows nothing of serving."""
