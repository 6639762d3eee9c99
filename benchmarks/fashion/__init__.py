"""The parts of `fashion_mnist.py`: data, models, one training, and the page of all of them."""
