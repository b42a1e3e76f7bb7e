"""Models: families, parameter rules, Hugging Face files, and the layers that training runs."""
