"""What a run measures, and where the values go. `catalogue` names every metric; `sinks.open_sinks` writes them."""
