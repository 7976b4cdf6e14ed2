"""The server's processes: the supervisor, its workers, their lives."""
