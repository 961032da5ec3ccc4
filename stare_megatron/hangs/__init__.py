"""Who makes a run hang, from what its processes tell and what is seen of them."""
