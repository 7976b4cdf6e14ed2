"""A conformance suite for the Open Inference Protocol, version 2: point it at any server by URL.

    python -m modelyard.testing.open_inference http://localhost:8000 --model mymodel --grpc localhost:8001

or run the same checks under pytest (pytest_suite.py). REST needs the standard library and numpy alone, gRPC grpcio.
Which document each check follows stands in its `where`; docs/reference/open-inference-conformance.md tells the whole.
"""
