"""Studies on clusters: the start of a driver on the head, and the files that describe a cluster to Ray."""
