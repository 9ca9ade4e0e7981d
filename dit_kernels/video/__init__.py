"""Text to video on moving handwritten digits: data, training, sampling, evaluation, files."""
