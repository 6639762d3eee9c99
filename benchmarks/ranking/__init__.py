"""The parts of `where.py`: a frozen network, scores of its blocks before a training, and the page of what they tell."""
