"""The parts of `transfer.py`: a trained ViT-S, and the page of what it keeps of its accuracy once it is swapped."""
