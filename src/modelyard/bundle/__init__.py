"""The hand-over between training and inference: a documented directory on disk."""
