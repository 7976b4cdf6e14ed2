"""Bytes on sockets ↔ requests and answers: HTTP/1.1, HTTP/2, gRPC."""
