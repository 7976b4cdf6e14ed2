"""Models trained elsewhere → one ONNX graph, one library per file."""
