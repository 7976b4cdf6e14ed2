"""What clients say, one protocol a file: adapters over the same packed inputs and outputs."""
