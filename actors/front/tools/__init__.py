"""Tool calls: what a request says of them, how chat formats write them, and finding them in what a model writes."""
