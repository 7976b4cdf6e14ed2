"""Makes a bundle smaller, faster and no worse: one technique a file, one measurement, one verdict."""
