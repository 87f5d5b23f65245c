"""Image networks of Hugging Face transformers, with their weights, image processor and class names."""
