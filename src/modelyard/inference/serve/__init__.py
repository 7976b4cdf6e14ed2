"""The server: sockets at the edge, protocols as adapters over the same arrays, decisions pure."""
