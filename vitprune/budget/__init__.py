"""Meeting a budget without training: thresholds from scores, where stages lie, and latency from a measured table."""
