"""Ray: the cluster, trainer ranks and engines as actors. The only package that imports ray."""
