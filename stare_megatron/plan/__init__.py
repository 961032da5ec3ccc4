"""What a run will take of each GPU, and how long: from its settings and the model's config.json alone."""
