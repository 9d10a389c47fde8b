"""What is trained: data sources, prepared frames, labels, statistics, models and batch order."""
