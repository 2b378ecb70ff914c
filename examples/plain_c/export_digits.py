"""Writes scikit-learn's 1,797 handwritten digits as CSV: 64 pixels (0 to 16) and the label, a digit a line."""

import sys

import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()
np.savetxt(sys.argv[1], np.column_stack([digits.data, digits.target]), fmt="%d", delimiter=",")
