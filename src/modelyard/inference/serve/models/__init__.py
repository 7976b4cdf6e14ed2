"""The models served: versions, loading, memory, traffic."""
