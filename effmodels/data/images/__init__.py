"""Images with captions: sources, preprocessing, a TFDS corpus, rows of packed image-text documents. A source is a file and a line."""
