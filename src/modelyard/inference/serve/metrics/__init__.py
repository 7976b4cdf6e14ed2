"""What the server tells of itself: metrics, access log, traces."""
