"""Published suites and small real bundles, for testing Modelyard itself and what others build on its protocols."""
