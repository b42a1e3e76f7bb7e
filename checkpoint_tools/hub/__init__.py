"""Publishing on a Hugging Face hub: what may be sent, the model card, and the upload."""
