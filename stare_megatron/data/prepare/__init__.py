"""Published data sets of mathematical problems as prompt files: read, cleaned, deduplicated, decontaminated."""
