"""The method: advantages, selection, token weights, losses. Pure torch; collectives only through `Comm`."""
