"""Studies: several variants of one run, over seeds, resumable and in parallel."""
