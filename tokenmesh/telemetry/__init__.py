"""What a mesh tells about itself: names, spans, metrics. No other module spells a name of either."""
